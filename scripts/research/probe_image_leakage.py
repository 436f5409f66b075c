"""Does a report's feature follow the report, or the image under which the decoder read it?

  python scripts/research/probe_image_leakage.py --load results/iu_xray/model_best.pth

Report i is read under the image of the study before it, j. Its feature is then held against z_i, the image that it
describes, and z_j, the one that the decoder saw. A feature that says what the report says is nearer to z_i. One table,
a row for each checkpoint and split: how often, the mean cosines, and the retrieval accuracy within batches as trained.
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

OVERRIDES = (
    "ann_path",
    "image_dir",
    "label_path",
    "label_columns",
    "feature_cache",
    "shards",
    "detection_features",
    "follow_links",
    "batch_size",
    "num_workers",
    "device",
)
HEAD = (
    "checkpoint",
    "split",
    "retrieval in batch",
    "nearer to the image it was read under",
    "cosine to that image",
    "cosine to its own image",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--load", required=True, nargs="+", metavar="PTH", help="checkpoints trained with ITHN")
    add_flags(parser.add_argument_group("in place of what the checkpoints were trained with"), OVERRIDES)
    return parser


def measure(objective: Any, loader: Any, device: Any) -> dict[str, float]:
    """Means over the samples of whole batches: the last one, which may have a single sample, is left out if it has."""
    import torch

    sums = dict.fromkeys(("retrieval", "read_under", "cos_under", "cos_own", "samples"), 0.0)
    with torch.inference_mode():
        for batch in loader:
            pair = batch.to(device).positive
            if len(pair.tokens) < 2:
                continue
            own = objective.embed(pair)  # z and u as in training
            swapped = dataclasses.replace(pair, images=pair.images.roll(1, 0), view_mask=pair.view_mask.roll(1, 0))
            moved = objective.embed(swapped, own_image=True).report  # (B, E)
            under, described = (moved * own.image.roll(1, 0)).sum(1), (moved * own.image).sum(1)
            right = (own.image @ own.report.T).argmax(1) == torch.arange(len(moved), device=moved.device)
            for name, values in zip(
                sums, (right, under > described, under, described, torch.ones_like(under)), strict=True
            ):
                sums[name] += float(values.sum())
    samples = sums.pop("samples")
    return {name: value / samples for name, value in sums.items()} | {"samples": samples}


def rows(path: str, given: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows of one checkpoint, for train and test."""
    from modules.data.tokenizers import tokenizer_from_state
    from modules.flags import resolve_config
    from modules.run.build import build_objective, load_weights, prepare_device
    from modules.run.data import build_dataset, build_split_loader, cache_features, read_data
    from modules.run.resuming import own_settings
    from modules.runtime.run_log import Bar
    from modules.training.checkpoint import load_checkpoint

    content = load_checkpoint(path)
    settings = own_settings(content, path) | {
        "load": "",
        "precision": "float32",
        "previous_epoch_start": False,
        "clamp_segment": False,
    }
    if content["strategy"] == "off":
        raise InputError(f"--load {path}: trained without ITHN, so that it has no joint embedding")
    # Strategies have the same projections: which of them a run was trained with makes no difference here.
    config = dataclasses.replace(resolve_config(given, settings), ithn="on", strategy="contrastive")
    device = prepare_device(config)
    data = read_data(config, tokenizer=tokenizer_from_state(content["vocabulary"]))
    objective = build_objective(config, data, device, pretrained=False).eval()
    extractor = objective.backbone.visual_extractor
    load_weights(objective, content["state_dict"], path)
    cache_features(config, data, extractor, device)
    found = []
    for split in ("train", "test"):
        dataset = build_dataset(config, data, split, augment=False, extractor=extractor)
        loader = build_split_loader(config, dataset, device, shuffle=False)
        values = measure(objective, Bar(loader, f"{split} reports under other images"), device)
        found.append(
            (path, split, *(f"{values[name]:.3f}" for name in ("retrieval", "read_under", "cos_under", "cos_own")))
        )
    return found


def main() -> None:
    """Swap, compare, print."""
    check_python()
    arguments = build_parser().parse_args()
    for path in arguments.load:
        require_checkpoint(path)
    lines = [HEAD, ("---",) * len(HEAD)]
    for path in arguments.load:
        lines += rows(path, given_flags(arguments, OVERRIDES))
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


if __name__ == "__main__":
    run_entry_point(main)
