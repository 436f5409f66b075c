"""Where a trained model loses what its images show: linear probes of the 14 classes at four places of the network.

patches: the visual extractor's mean feature; encoder: the mean of the encoder's output over present views;
cross-attention: what the last decoder layer takes from the image; decoder: its last hidden states. The decoder reads
the same text for every study, the commonest training report, so that only the image can tell studies apart. One
logistic regression per class, as in probe_images.py; the table has the AUROC on the test split.

  python scripts/research/probe_decoder.py --load results/demo/model_best.pth --label_path data/demo/labels.csv
"""

import argparse
import dataclasses
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.flags import Parser, add_flags, given_flags
from modules.inference.study_files import require_checkpoint
from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError, run_entry_point

if TYPE_CHECKING:
    from torch import Tensor

OVERRIDES = ("ann_path", "image_dir", "batch_size", "num_workers", "device", "feature_cache")
PLACES = ("patches", "encoder", "cross-attention", "decoder")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--load", required=True, metavar="PTH", help="checkpoint of main_train.py")
    parser.add_argument(
        "--label_path", required=True, metavar="FILE", help="labels of every study, as in main_train.py"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the intervals; default %(default)s")
    add_flags(parser.add_argument_group("in place of what the checkpoint was trained with"), OVERRIDES)
    return parser


def mean_of_present(states: "Tensor", mask: "Tensor | None") -> "Tensor":
    """Mean (B, D) of ``states`` (B, S, D), or (B, levels, S, D), over the S that ``mask`` (B, S) leaves; None: all."""
    states = states.mean(1) if states.dim() == 4 else states
    if mask is None:
        return states.mean(1)
    weights = mask.unsqueeze(-1).to(states.dtype)  # (B, S, 1)
    return (states * weights).sum(1) / weights.sum(1)


def features_of(path: str, given: dict) -> tuple:
    """The annotation, and place -> split -> (N, D) features; InputError where a model has no cross-attention."""
    import torch

    from modules.flags import resolve_config
    from modules.run.build import build_objective, load_weights, prepare_device
    from modules.run.data import build_dataset, build_split_loader, cache_features, read_data
    from modules.run.resuming import own_settings
    from modules.run.vocabulary import tokenizer_from_state
    from modules.runtime.run_log import Bar
    from modules.training.checkpoint import load_checkpoint
    from scripts.research.probe_images import NEEDED

    content = load_checkpoint(path)
    config = resolve_config(given, own_settings(content, path) | {"ithn": "off", "views": "paired"})
    device = prepare_device(config)
    data = read_data(config, tokenizer=tokenizer_from_state(content["vocabulary"]))
    objective = build_objective(config, data, device, pretrained=False).eval()
    load_weights(objective, content["state_dict"], path)
    layers = objective.backbone.cross_attention()
    if not layers:
        raise InputError(f"--load {path}: --model_name {config.model_name} has no cross-attention to look at")
    cache_features(config, data, objective.backbone.visual_extractor, device)
    reports = Counter(study.report for study in data.annotation.splits["train"])
    text = torch.tensor(data.tokenizer.encode(reports.most_common(1)[0][0])[: config.max_seq_length], device=device)
    seen: list = []  # outputs of the last cross-attention
    layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    found: dict[str, dict] = {place: defaultdict(list) for place in PLACES}
    with torch.inference_mode():
        for split in NEEDED:
            dataset = build_dataset(config, data, split, augment=False, extractor=objective.backbone.visual_extractor)
            for batch in Bar(build_split_loader(config, dataset, device, shuffle=False), f"features of {split}"):
                pair = batch.to(device).positive
                features = objective.extract(pair)
                tokens = text.expand(len(pair.tokens), -1)
                fixed = dataclasses.replace(pair, tokens=tokens, token_mask=torch.ones_like(tokens, dtype=torch.bool))
                encoded = objective.backbone.encode(features)[0]  # (B, S, D), or with levels (B, L, S, D)
                hidden = objective.read(fixed, features)
                attended = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]  # (B, T, D)
                rows = (features.pooled, mean_of_present(encoded, features.patch_mask), attended.mean(1), hidden)
                for place, row in zip(PLACES, rows, strict=True):
                    found[place][split].append(row.float().cpu())
    joined = {place: {split: torch.cat(rows).numpy() for split, rows in by.items()} for place, by in found.items()}
    return data.annotation, joined


def main() -> None:
    """Look at every image once, fit at every place, print."""
    arguments = build_parser().parse_args()
    require_checkpoint(arguments.load)

    from modules.labels.study_labels import read_labels
    from modules.runtime.run_log import Bar
    from scripts.research.probe_images import NEEDED, probe

    annotation, features = features_of(arguments.load, given_flags(arguments, OVERRIDES))
    given = read_labels(arguments.label_path)
    labels = {split: given.of(annotation.splits[split]) > 0 for split in NEEDED}
    lines = ["| class | " + " | ".join(PLACES) + " |", "|---" * (1 + len(PLACES)) + "|"]
    for column, name in enumerate(Bar(CLASSES, "probes")):
        own = {split: rows[:, column] for split, rows in labels.items()}
        if all(min(rows.sum(), (~rows).sum()) >= NEEDED[split] for split, rows in own.items()):
            scores = [probe(features[place], own, arguments.seed)["auroc"] for place in PLACES]
            lines.append(f"| {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")
        else:
            lines.append(f"| {name} | too few |" + " |" * (len(PLACES) - 1))
    print("\n".join(lines))


if __name__ == "__main__":
    run_entry_point(main)
