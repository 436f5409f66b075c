"""Convert checkpoints of R2Gen, R2GenCMN, XProNet and the released ITHN code to this project's and back.

  python scripts/convert_checkpoint.py r2gencmn_iu_xray.pth --to ours --out models/r2gencmn.pth --backbone r2gencmn
  python scripts/convert_checkpoint.py results/iu_xray/model_best.pth --to published --out r2gencmn.pth

Published files hold weights alone. This project's also hold vocabulary and settings, which is all that predict.py
needs: give the annotation that the model was trained on (--ann_path), from which the vocabulary is rebuilt, and the
flags that it was trained with. "published" is what the backbone's own code loads, "released_ithn" what the released
ITHN code loads.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import MODELS
from modules.config import BACKBONE_SETTINGS, DataSettings, NetworkSettings, settings_of
from modules.decoding.options import DecodingOptions
from modules.flags import Parser, add_flags, given_flags, resolve_config
from modules.runtime.environment import check_python, provenance
from modules.runtime.errors import InputError, run_entry_point

# A converted checkpoint has no mean training image to be guided by.
FLAGS = settings_of(DataSettings, NetworkSettings, DecodingOptions, *BACKBONE_SETTINGS) - {"guidance"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    usage = "%(prog)s IN.pth --to {ours,published,released_ithn} --out OUT.pth [--flag value ...]"
    parser = Parser(usage=usage, description=__doc__)
    parser.add_argument("source", metavar="IN.pth", help="the checkpoint to read")
    parser.add_argument("--to", required=True, choices=("ours", "published", "released_ithn"), help="what to write")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT.pth", help="a new file")
    group = parser.add_argument_group("with --to ours: how the model was trained, as for main_test.py")
    group.add_argument(
        "--backbone",
        default=argparse.SUPPRESS,
        choices=tuple(MODELS),
        help="take that backbone's published settings; flags on the command line override them",
    )
    add_flags(group, FLAGS, shown=True)
    return parser


def to_ours(source: str, given: dict) -> dict:
    """This project's checkpoint with the weights of a published one; InputError where they do not fit."""
    from modules.ithn.objective import Objective
    from modules.run.build import build_backbone, build_extractor, load_weights, prepare_device
    from modules.run.data import read_data
    from modules.training.checkpoint import FORMAT, load_checkpoint

    content = load_checkpoint(source)
    if content.get("format") == FORMAT:
        raise InputError(f"{source}: is a checkpoint of this project already")
    if "backbone" in given:
        given.setdefault("model_name", given["backbone"])
    config = resolve_config({"suppress_unk": False, **given})  # the published figures were made with <unk>
    data = read_data(config, trained_with="unknown")
    device = prepare_device(config)
    extractor = build_extractor(config, device, pretrained=False)
    backbone = build_backbone(config, extractor, data.tokenizer, pretrained=False)
    load_weights(Objective(backbone), content["state_dict"], source)
    weights = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    return {
        "format": FORMAT,
        "epoch": int(content.get("epoch") or 0),
        "state_dict": weights,
        "config": dataclasses.asdict(config),
        "vocabulary": data.tokenizer.state(),
        "vocabulary_sha256": data.tokenizer.sha256,
        "annotation_sha256": data.annotation.sha256,
        "history": [],
        "strategy": "unknown",
        "provenance": provenance("cpu"),
    }


def to_published(source: str, heads: bool) -> dict:
    """The content of a published code's checkpoint with the weights of this project's.

    InputError for other checkpoints.
    """
    from modules.inference.hub_format import published_weights
    from modules.training.checkpoint import FORMAT, TESTED, load_checkpoint, require_entries

    content = load_checkpoint(source)
    if content.get("format") != FORMAT:
        raise InputError(f"{source}: not a checkpoint of this project; convert it with --to ours")
    require_entries(content, source, TESTED)
    if context := content["config"].get("context"):
        raise InputError(f"{source}: trained with --context {context}, which the published codes do not know")
    return {"epoch": content["epoch"], "state_dict": published_weights(content["state_dict"], heads=heads)}


def write(path: Path, content: dict) -> None:
    """Save tensors and plain values, whole or not at all, for their owner alone."""
    import io

    import torch

    from modules.runtime.records import write_private

    file = io.BytesIO()
    torch.save(content, file)
    write_private(path, file.getvalue())


def main() -> None:
    """Read one checkpoint, write the other."""
    check_python()
    arguments = build_parser().parse_args()
    given = given_flags(arguments, FLAGS | {"backbone"})
    if arguments.to != "ours" and given:
        raise InputError(f"--{next(iter(given))} says how a published model was trained: it goes with --to ours only")
    if arguments.out.exists():
        raise InputError(f"--out {arguments.out}: is there already; name a new file")
    if arguments.to == "ours":
        content = to_ours(arguments.source, given)
    else:
        content = to_published(arguments.source, arguments.to == "released_ithn")
    write(arguments.out, content)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    run_entry_point(main)
