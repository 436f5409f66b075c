"""Where the gradient of the contrastive terms goes, and whether it opposes that of the cross entropy.

  python scripts/research/probe_gradients.py --load results/iu_xray/epoch_5.pth results/iu_xray/model_best.pth

For each checkpoint (main_train.py --keep_epochs true leaves one of every epoch) and each part of the network, means
over --batches training batches: the share of the gradient's squared norm that the part receives, its norm over that of
the cross entropy's gradient there, and the cosine of the two. Each term has the weight that it was trained with. With a
cosine below 0 a step along one gradient raises the other loss; a ratio of 0 means that nothing arrives. Without
dropout, so that all terms are of the same pass; the hardness is that of the checkpoint's epoch, and MoCHi's queue holds
the samples that it held at its end. Harder negatives start at the mined one, with --previous_epoch_start too.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.flags import Parser, add_flags, given_flags
from modules.inference.study_files import require_checkpoint
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from scripts.research.probe_numbers import Row, check_numbers, keep_numbers

if TYPE_CHECKING:  # --help does not wait for torch
    from torch import Tensor

    from modules.ithn.objective import Objective

PROBE = Path(__file__).stem
OVERRIDES = (
    "ann_path image_dir negative_index label_path label_columns feature_cache batch_size num_workers device"
).split()
PARTS = ("extractor", "encoder", "memory", "decoder", "projections")
# Components of a parameter's name that place it before the decoder, in every backbone.
ENCODING = {"encoder", "att_embed", "projection", "label_head", "study_context"}
MEMORY = {"cmn", "memory_matrix", "protypes", "dim_reduction"}  # read by images and words alike
TERMS = {"contrastive": "L_CP", "cosine": "L_CS"}
VALUES = ("share", "ratio", "cosine")
HEAD = ("checkpoint", "epoch", "term", "part", "share of its squared norm", "norm over cross entropy's", "cosine to it")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--load", required=True, nargs="+", metavar="PTH", help="checkpoints of main_train.py")
    parser.add_argument("--batches", type=int, default=8, metavar="N", help="training batches; default %(default)s")
    parser.add_argument("--numbers", type=Path, metavar="JSON", help="also keep the numbers, for draw_mechanism.py")
    add_flags(parser.add_argument_group("in place of what the checkpoints were trained with"), OVERRIDES)
    return parser


def part_of_name(name: str) -> str:
    """The part of the network that the objective's parameter ``name`` belongs to."""
    first, *components = name.split(".")
    if first != "backbone":
        return "projections"
    if components[0] == "visual_extractor":
        return "extractor"
    if MEMORY.intersection(components):
        return "memory"
    if components[:2] == ["encoder_decoder", "fuse_feature"]:  # XProNet's, of images; that of words is the model's
        return "encoder"
    # The outermost decides: the layers of a BERT that decodes are called encoder.
    outermost = next((part for part in components if part in ENCODING or part == "decoder"), "decoder")
    return "encoder" if outermost in ENCODING else "decoder"


def gradients(objective: "Objective", batch: Any, epoch: int, weights: dict[str, float]) -> "dict[str, Tensor]":
    """The gradient of the loss with these ``weights`` of its contrastive terms, one vector for each part."""
    import torch

    before = objective.settings
    named = {f"{name}_weight": weight for name, weight in weights.items()}
    objective.settings = dataclasses.replace(before, **named)
    try:
        loss = objective(batch, epoch)["loss"]
    finally:
        objective.settings = before
    known = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(known.values()), allow_unused=True)
    parts: dict[str, list] = {part: [] for part in PARTS}
    for (name, value), gradient in zip(known.items(), found, strict=True):
        parts[part_of_name(name)].append((torch.zeros_like(value) if gradient is None else gradient).flatten())
    return {part: torch.cat(values).double() if values else torch.zeros(0) for part, values in parts.items()}


def compared(objective: "Objective", batch: Any, epoch: int) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(share, ratio, cosine) of each term and part for one batch; a term's gradient is what it adds to the others'."""
    none = dict.fromkeys(TERMS, 0.0)
    entropy = gradients(objective, batch, epoch, none)  # with the backbone's auxiliary losses
    found = {}
    for term in TERMS:
        weight = getattr(objective.settings, f"{term}_weight")
        if not weight:
            continue
        whole = gradients(objective, batch, epoch, none | {term: weight})
        own = {part: whole[part] - entropy[part] for part in PARTS}
        total = sum(float(value.square().sum()) for value in own.values())
        for part, value in own.items():
            norm, other = float(value.norm()), float(entropy[part].norm())
            product = norm * other
            found[term, part] = (
                norm**2 / total if total else 0.0,
                norm / other if other else float("nan"),
                float(value @ entropy[part]) / product if product else 0.0,
            )
    return found


def means(found: Iterable[dict[tuple[str, str], tuple[float, float, float]]]) -> dict[tuple[str, str], list[float]]:
    """Means over batches of what ``compared`` gives."""
    rows = list(found)
    return {
        key: [sum(values) / len(rows) for values in zip(*(row[key] for row in rows), strict=True)] for key in rows[0]
    }


def rows_of(path: str, given: dict[str, Any], count: int) -> list[Row]:
    """What is found for one checkpoint, by term and part; InputError for one trained without contrastive terms."""
    from modules.flags import resolve_config
    from modules.run.build import build_objective, load_weights, prepare_device
    from modules.run.data import build_dataset, build_split_loader, cache_features, read_data
    from modules.run.resuming import own_settings
    from modules.run.vocabulary import tokenizer_from_state
    from modules.runtime.run_log import Bar
    from modules.training.checkpoint import load_checkpoint

    content = load_checkpoint(path)
    if content["strategy"] == "off":
        raise InputError(f"--load {path}: trained without contrastive terms")
    config = resolve_config(given, own_settings(content, path) | {"load": "", "precision": "float32", "compile": False})
    device = prepare_device(config)
    data = read_data(config, tokenizer=tokenizer_from_state(content["vocabulary"]))
    objective = build_objective(config, data, device, pretrained=False)
    load_weights(objective, content["state_dict"], path)
    if objective.queue is not None:
        prefix = "queue."
        objective.queue.load_state_dict(
            {
                name.removeprefix(prefix): value
                for name, value in content["objective"].items()
                if name.startswith(prefix)
            }
        )
    objective.eval()
    extractor, epoch = objective.backbone.visual_extractor, content["epoch"]
    cache_features(config, data, extractor, device)
    dataset = build_dataset(config, data, "train", augment=False, extractor=extractor, negatives=True)
    batches = itertools.islice(build_split_loader(config, dataset, device, shuffle=True), count)
    found = means(compared(objective, batch.to(device), epoch) for batch in Bar(batches, "gradients"))
    return [
        {"checkpoint": path, "epoch": epoch, "term": TERMS[term], "part": part}
        | {name: None if math.isnan(value) else value for name, value in zip(VALUES, values, strict=True)}
        for (term, part), values in found.items()
    ]


def main() -> None:
    """Read, compare, print."""
    check_python()
    arguments = build_parser().parse_args()
    if arguments.batches < 1:
        raise InputError(f"--batches {arguments.batches}: must be 1 or more")
    for path in arguments.load:
        require_checkpoint(path)
    check_numbers(arguments.numbers, PROBE)
    given = given_flags(arguments, OVERRIDES)
    found: list[Row] = []
    for path in arguments.load:
        found += rows_of(path, given, arguments.batches)
        if arguments.numbers:
            keep_numbers(arguments.numbers, PROBE, found)
    cells = [
        (
            *(str(row[name]) for name in ("checkpoint", "epoch", "term", "part")),
            *("–" if row[name] is None else f"{row[name]:.3f}" for name in VALUES),
        )
        for row in found
    ]
    lines = [HEAD, ("---",) * len(HEAD), *cells]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


if __name__ == "__main__":
    run_entry_point(main)
