"""Which lines of the project make the launches of a training step, counted on the null device.

A backward launch belongs to the line whose gradient it computes.

  python benchmarks/host_places.py --backbone r2gencmn                              ITHN in bfloat16, by file
  python benchmarks/host_places.py --backbone r2gen --precision float32 --lines     by line
"""

import argparse
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import null_device
from benchmarks.host_path import STRATEGIES, total
from modules.flags import Parser
from modules.runtime.errors import run_entry_point

ROOT = Path(__file__).resolve().parents[1]
OWN = tuple(f"{ROOT / room}{os.sep}" for room in ("modules", "models"))
ELSEWHERE = "elsewhere"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", default="r2gencmn", help="default %(default)s")
    parser.add_argument("--strategy", default="ithn", choices=list(STRATEGIES), help="default %(default)s")
    parser.add_argument("--precision", default="bfloat16", help="default %(default)s")
    parser.add_argument("--lines", action="store_true", help="by line, not by file")
    return parser


def place_of(stack: Any) -> str:
    """The innermost line of this project in ``stack``, outermost first, of (file, line) pairs."""
    own = [(file, line) for file, line in stack if file.startswith(OWN)]
    return f"{Path(own[-1][0]).relative_to(ROOT)}:{own[-1][1]}" if own else ELSEWHERE


def count(null: null_device.NullDevice, arguments: argparse.Namespace) -> Counter[tuple[str, str]]:
    """Launches of a step by line, and by "forward" or "backward"."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks.host_cases import StepCase, Steps, make_batch, make_trainer

    found: Counter[tuple[str, str]] = Counter()

    class ByPlace(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            before = null.counts()
            result = func(*given, **(named or {}))
            launched = total(null.counts()) - total(before)
            if launched and (node := torch._C._current_autograd_node()) is not None:
                made_at = "".join(node.metadata.get("traceback_") or ())
                lines = [line.split('"') for line in made_at.splitlines() if line.startswith("  File")]
                stack = [(file, rest.split("line ")[1].split(",")[0]) for _, file, rest in lines]
                found[place_of(stack), "backward"] += launched
            elif launched:
                stack = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe(1))]
                found[place_of(stack[::-1]), "forward"] += launched
            return result

    steps = Steps(null, "resnet101")
    case = StepCase(arguments.backbone, STRATEGIES[arguments.strategy], precision=arguments.precision)
    objective = steps.objective(case)
    trainer, group = make_trainer(objective, case, steps.device), [make_batch(objective.uses_negatives)]
    trainer._step(group)
    # Anomaly detection notes where each gradient's forward pass was; the backward pass then stays in this thread.
    with torch.autograd.set_multithreading_enabled(False), torch.autograd.detect_anomaly(check_nan=False), ByPlace():
        trainer._step(group)
    return found


def main() -> None:
    arguments = build_parser().parse_args()
    null_device.start_on_it()
    found = count(null_device.prepare(), arguments)
    table: dict[str, Counter[str]] = {}
    for (place, direction), number in found.items():
        name = place if arguments.lines else place.split(":")[0]
        table.setdefault(name, Counter())[direction] += number
    print(f"{'':<48}{'forward':>9}{'backward':>10}")
    for name, counts in sorted(table.items(), key=lambda row: -row[1].total()):
        print(f"{name:<48}{counts['forward']:>9}{counts['backward']:>10}")
    print(f"{'all':<48}{sum(found.values()):>19}")


if __name__ == "__main__":
    run_entry_point(main)
