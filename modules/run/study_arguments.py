"""The arguments of the programs that read a checkpoint and some images; light, so that --help comes at once."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from modules.inference.study_files import GROUPS
from modules.runtime.errors import InputError


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which checkpoint reads which studies."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images (PNG, JPEG, DICOM, ...) or folders of them")
    parser.add_argument("--load", required=True, metavar="PTH", help="a checkpoint of main_train.py: model_best.pth")
    parser.add_argument(
        "--group",
        choices=GROUPS,
        default="none",
        help="none: every image is a study; folder: the images in a folder are the views of one study; "
        "all: all images are (default: %(default)s)",
    )
    add_batch_size(parser)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """--batch_size, in studies."""
    parser.add_argument(
        "--batch_size", type=_positive, default=16, metavar="INT", help="studies at a time (default: %(default)s)"
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 on")
    return int(text)


def given_flags(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    """Those of the flags ``names`` that were given, by name."""
    return {name: vars(arguments)[name] for name in names if name in arguments}


def checkpoint_name(path: str) -> str:
    """How results name the checkpoint: its file and folder, not where they lie."""
    return str(Path(*Path(path).absolute().parts[-2:]))


def require_checkpoint(path: str) -> None:
    """InputError where ``--load`` names no file: before torch is imported, which takes seconds."""
    if not Path(path).is_file():
        raise InputError(f"--load {path}: no such file; it takes a checkpoint of main_train.py, such as model_best.pth")
