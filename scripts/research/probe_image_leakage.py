"""Does a report's feature follow the report, or the image under which the decoder read it?

  python scripts/research/probe_image_leakage.py --load results/iu_xray/model_best.pth results/plain/model_best.pth

One table, a row for each checkpoint and split. Report i is read under the image of another study, j; its feature is
then compared with z_i, the image that it describes, and z_j, the one that the decoder saw. A feature that says what the
report says is nearer to z_i. As controls, the retrieval accuracy within batches ("own report is the nearest") is given

- as trained, each report read under its own image;
- with every report read under the mean training image, which says nothing about the study (XProNet, which chooses its
  prototypes by labels, has the same labels for all reports of a batch then; otherwise labels go with the image);
- by the text alone: a ridge regression from the report's tf-idf to z, which never sees an image;

and a grid of --grid reports read under --grid images, of which the variance of the hidden states is split into shares
of the image, the report and their interaction. The last is also given for checkpoints without a joint embedding
(--ithn off), as the plain backbone's reference. Of an image with several captions the first is read.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.flags import Parser, add_flags, given_flags
from modules.inference.study_files import require_checkpoint
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from scripts.research.probe_numbers import Row, check_numbers, keep_numbers

PROBE = Path(__file__).stem
OVERRIDES = (
    "ann_path image_dir label_path label_columns feature_cache "
    "shards detection_features follow_links batch_size num_workers device"
).split()
# A run's settings that reading its reports must not follow: all strategies and forms have the same projections.
SETTINGS = {"load": "", "precision": "float32"}
READING = {
    "ithn": "on",
    "strategy": "contrastive",
    "contrastive_form": "standard",
    "negatives_as": "average",
    "previous_epoch_start": False,
    "clamp_segment": False,
}
HEAD = (
    "checkpoint",
    "split",
    "retrieval in batch",
    "under the mean image",
    "by the text alone",
    "nearer to the image it was read under",
    "cosine to that image",
    "cosine to its own image",
    "variance by image / report / both",
)
COLUMNS = ("retrieval", "retrieval_mean", "text_only", "read_under", "cos_under", "cos_own")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--load", required=True, nargs="+", metavar="PTH", help="checkpoints of main_train.py")
    parser.add_argument(
        "--grid",
        type=int,
        default=16,
        metavar="K",
        help="reports and images of the grid, of one batch at most; default %(default)s",
    )
    parser.add_argument("--numbers", type=Path, metavar="JSON", help="also keep the numbers, for draw_mechanism.py")
    add_flags(parser.add_argument_group("in place of what the checkpoints were trained with"), OVERRIDES)
    return parser


def rows(path: str, given: dict[str, Any], grid: int) -> list[Row]:
    """What is found for one checkpoint, for train and test."""
    from modules.evaluation.tester import mean_patches
    from modules.flags import resolve_config
    from modules.run.build import build_objective, load_weights, prepare_device
    from modules.run.data import build_dataset, build_split_loader, cache_features, one_per_image, read_data
    from modules.run.resuming import own_settings
    from modules.run.vocabulary import tokenizer_from_state
    from modules.runtime.run_log import Bar
    from modules.training.checkpoint import load_checkpoint
    from scripts.research import image_leakage as leakage

    content = load_checkpoint(path)
    joint = content["strategy"] != "off"
    config = resolve_config(given, own_settings(content, path) | SETTINGS | (READING if joint else {}))
    device = prepare_device(config)
    data = read_data(config, tokenizer=tokenizer_from_state(content["vocabulary"]))
    splits = {name: one_per_image(config, studies) for name, studies in data.annotation.splits.items()}
    data.annotation = dataclasses.replace(data.annotation, splits=splits)
    objective = build_objective(config, data, device, pretrained=False).eval()
    extractor = objective.backbone.visual_extractor
    load_weights(objective, content["state_dict"], path)
    cache_features(config, data, extractor, device)
    found, readings = [], {}
    for split in ("train", "test"):
        dataset = build_dataset(config, data, split, augment=False, extractor=extractor)
        loader = build_split_loader(config, dataset, device, shuffle=False)
        studies = leakage.study_groups(dataset.studies)
        groups = [studies[row] for row, _ in dataset.samples]
        row: Row = {"checkpoint": path, "epoch": content["epoch"], "split": split}
        if joint:
            if split == "train":
                objective.backbone.mean_patches = mean_patches(
                    objective.backbone, Bar(loader, "mean training image"), device, config.precision
                )
            batches = Bar(loader, f"{split} reports under other images")
            readings[split] = leakage.read_batches(objective, batches, groups, device)
            row |= leakage.follow(readings[split])
            row["text_only"] = leakage.text_only_retrieval(readings["train"], readings[split])
        row["variance"] = leakage.variance_shares(leakage.grid_features(objective, loader, groups, grid, device))
        found.append(row)
    return found


def cells(row: Row) -> tuple[str, ...]:
    """The table's line."""
    values = [f"{row[name]:.3f}" if name in row else "–" for name in COLUMNS]
    return row["checkpoint"], row["split"], *values, " / ".join(f"{share:.2f}" for share in row["variance"].values())


def main() -> None:
    """Read, compare, print."""
    check_python()
    arguments = build_parser().parse_args()
    if arguments.grid < 2:
        raise InputError(f"--grid {arguments.grid}: must be 2 or more")
    for path in arguments.load:
        require_checkpoint(path)
    check_numbers(arguments.numbers, PROBE)
    found: list[Row] = []
    for path in arguments.load:
        found += rows(path, given_flags(arguments, OVERRIDES), arguments.grid)
        if arguments.numbers:
            keep_numbers(arguments.numbers, PROBE, found)
    lines = [HEAD, ("---",) * len(HEAD), *map(cells, found)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


if __name__ == "__main__":
    run_entry_point(main)
