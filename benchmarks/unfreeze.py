"""Cost of a training step by what is trained of the visual extractor: all of it, its last stage, and its last stage on
stored features of the others (--unfreeze last:1 --feature_cache DIR), in the same rounds.

  python benchmarks/unfreeze.py                        ResNet-101 and the sizes of run_iu_xray.sh
  python benchmarks/unfreeze.py --clock cpu --threads 1 --batch_size 4 --views 1 --out unfreeze.json
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import in_rounds, parser_of, prepare, print_header, print_row, save
from benchmarks.train_step import build_step
from modules.runtime.errors import run_entry_point

SIZES = ("batch_size", "views", "max_seq_length", "image_size", "vocab_size")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=3)
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="default %(default)s")
    add("--views", type=int, default=2, help="images of a study; default %(default)s")
    add("--max_seq_length", type=int, default=60, help="default %(default)s")
    add("--strategy", default="off", choices=("off", "ithn"), help="default %(default)s")
    add("--unfreeze", default="last:1", help="last:N; default %(default)s")
    add("--visual_extractor", default="resnet101", help="default %(default)s")
    add("--image_size", type=int, default=224, help="default %(default)s")
    add("--vocab_size", type=int, default=760, help="default %(default)s")
    parser.set_defaults(model_name="r2gencmn")
    return parser


def cases(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is measured, by its name in the table."""
    sizes = ("batch_size", "views", "max_seq_length", "strategy")
    case = {name: getattr(arguments, name) for name in sizes} | {"precision": "float32", "compile": False}
    part = case | {"unfreeze": arguments.unfreeze}
    return {"all": case, arguments.unfreeze: part, f"{arguments.unfreeze}, stored": part | {"stored": True}}


def main() -> None:
    """Measure, print the table and the ratios, write the JSON file."""
    arguments = build_parser().parse_args()
    device, made_by = prepare(arguments, SIZES)
    steps = {name: build_step(arguments, device, case) for name, case in cases(arguments).items()}
    seconds = in_rounds({name: step.run for name, step in steps.items()}, arguments.rounds, arguments.clock, device)
    print_header(f"step of R2GenCMN with {arguments.visual_extractor}, by what is trained of it", "full over it")
    ratios = {}
    for name, values in seconds.items():
        ratios[name] = statistics.median(a / b for a, b in zip(seconds["all"], values, strict=True))
        print_row(name, values, f"{ratios[name]:.2f}")
    save(arguments.out, {"benchmark": "unfreeze", **made_by, "seconds": seconds, "full_over": ratios})


if __name__ == "__main__":
    run_entry_point(main)
