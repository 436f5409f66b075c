"""Does the synthesised negative stay among the real reports? One run's checkpoints, epoch by epoch.

  python scripts/research/inspect_negatives.py --load results/iu_xray/epoch_*.pth --out results/iu_xray/negatives

Train with --keep_epochs true to have them. For every training record: where the synthesised negative lies among the
real report features, whose report is nearest, and which words the decoder reads when the hidden states of the hard
negative are moved there; at the hardness of each epoch and over a range of it. docs/ABLATIONS.md says how each number
is made. Written are negatives.json, negatives.md and negatives.png: numbers, no report text.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.flags import Parser, add_flags, given_flags
from modules.inference.study_files import checkpoint_name, require_checkpoint
from modules.runtime.environment import check_python
from modules.runtime.errors import run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

OVERRIDES = (
    "ann_path image_dir negative_index label_path label_columns feature_cache shards "
    "detection_features follow_links batch_size num_workers seed device n_gpu"
).split()
GRID = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load", required=True, nargs="+", metavar="PTH", help="checkpoints of one run at several epochs")
    add("--out", required=True, metavar="FOLDER", help="for negatives.json, negatives.md and negatives.png")
    add(
        "--samples",
        type=_positive,
        metavar="INT",
        help="training records to look at, drawn by --seed; their negatives join them in the bank (default: all)",
    )
    add(
        "--lambdas",
        type=_hardness,
        nargs="+",
        default=list(GRID),
        metavar="FLOAT",
        help=f"hardnesses beside each epoch's own (default: {' '.join(f'{value:g}' for value in GRID)})",
    )
    add_flags(parser.add_argument_group("in place of what the checkpoints were trained with"), OVERRIDES)
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 on")
    return int(text)


def _hardness(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from 0 to 1")
    return value


def check(arguments: argparse.Namespace) -> None:
    """InputError where the folder has files of these names that this program did not write."""
    table = Path(arguments.out) / "negatives.json"  # is written first: without it the others are somebody's own
    own = {
        "negatives.json": contains('"epochs":', '"lambdas":'),
        "negatives.md": lambda _: table.is_file(),
        "negatives.png": lambda _: table.is_file(),
    }
    check_outputs(
        Output("--out", table.with_name(name), "an output of this program", recognises)
        for name, recognises in own.items()
    )


def main() -> None:
    """Embed the training reports with each checkpoint, place the negatives among them, read the words, write."""
    check_python()
    arguments = build_parser().parse_args()
    for path in arguments.load:
        require_checkpoint(path)
    check(arguments)

    from modules.runtime.environment import file_sha256, provenance
    from modules.runtime.memory import explain_out_of_memory
    from modules.runtime.records import private_folder, write_private, write_results
    from scripts.research.negative_bank import Inspection
    from scripts.research.negative_tables import figure, to_markdown

    folder = private_folder(arguments.out)
    grid = sorted(set(arguments.lambdas))
    with explain_out_of_memory("lower --samples or --batch_size"):
        inspection = Inspection(arguments.load, given_flags(arguments, OVERRIDES), arguments.samples)
        epochs = [
            {"checkpoint": checkpoint_name(path), "checkpoint_sha256": file_sha256(path)} | inspection.look(path, grid)
            for path in inspection.paths
        ]
    write_results(
        folder / "negatives.json",
        {"epochs": epochs, **inspection.described, "lambdas": grid, "provenance": provenance(str(inspection.device))},
    )
    title = f"Synthesised negatives of {inspection.name}"
    write_private(folder / "negatives.md", to_markdown(epochs, title=title, notes=inspection.notes))
    write_private(folder / "negatives.png", figure(epochs, title=title))
    print(f"{folder}: negatives.json, negatives.md, negatives.png")


if __name__ == "__main__":
    run_entry_point(main)
