"""The arguments of the programs that draw synthetic films; light, so that --help comes at once."""

import argparse
import os
from pathlib import Path

from modules.runtime.errors import InputError

SMALLEST, LARGEST = 64, 2048


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, from which seed, how large and by how many processes films are drawn."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, empty or earlier output folder")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default %(default)s")
    parser.add_argument("--size", type=int, default=256, metavar="PX", help="image side (default %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="W",
        help="processes that draw (default %(default)s)",
    )


def check_drawing(arguments: argparse.Namespace) -> None:
    """InputError for values out of range."""
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: must be 0 or more")
    if not SMALLEST <= arguments.size <= LARGEST:
        raise InputError(f"--size {arguments.size}: must lie between {SMALLEST} and {LARGEST} pixels")
    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers}: must be 1 or more")
