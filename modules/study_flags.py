"""Arguments of the programs that read studies with a trained model: predict, serve, index, plot."""

import argparse

GROUPS = ("none", "folder", "all")  # how images on a command line make studies (modules/inference/study_files.py)


def add_study_arguments(parser: argparse.ArgumentParser, paths: str = "+") -> None:
    """The arguments of the programs that write reports: which checkpoint reads which studies (``paths``: how many)."""
    parser.add_argument("paths", nargs=paths, metavar="PATH", help="images (PNG, JPEG, DICOM, ...) or folders of them")
    add_load(parser)
    parser.add_argument(
        "--group",
        choices=GROUPS,
        default="none",
        help="none: every image is a study; folder: the images in a folder are the views of one study; "
        "all: all images are (default: %(default)s)",
    )
    add_batch_size(parser)


def add_load(parser: argparse.ArgumentParser) -> None:
    """--load, of the programs that take a trained model in any form."""
    parser.add_argument(
        "--load",
        required=True,
        metavar="MODEL",
        help="a checkpoint of main_train.py (model_best.pth), a folder that scripts/export.py wrote, or such a folder "
        "on the Hugging Face hub: hf://OWNER/NAME",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """--batch_size, in studies."""
    parser.add_argument("--batch_size", "--eval_batch_size", type=_positive, default=16, help="studies at a time (16)")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 1")
    return int(text)
