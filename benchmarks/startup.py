"""Seconds from typing a command to its help text, for every program, compared with starting Python and importing torch.

python benchmarks/startup.py --out startup.json
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import parser_of, prepare, print_header, print_row, save
from modules.runtime.errors import InputError, run_entry_point

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--programs", nargs="+", help="default: main_*.py and every command in scripts/")
    return parser


def programs() -> list[str]:
    """Entry points with a command line, main_train.py first."""
    scripts = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "scripts").rglob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
    ]
    return ["main_train.py", "main_test.py", *scripts]


def commands(names: list[str]) -> dict[str, list[str]]:
    """What is started, by the name of its row."""
    own = {f"{name} --help": [sys.executable, str(ROOT / name), "--help"] for name in names}
    yardsticks = {"python alone": [sys.executable, "-c", ""], "import torch": [sys.executable, "-c", "import torch"]}
    return own | yardsticks


def start(command: list[str], clock: str) -> float:
    """Seconds until ``command`` has ended, or those of its processor. InputError where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "100"})
    wall = time.perf_counter() - began
    if done.returncode:
        raise InputError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime if clock == "cpu" else wall


def main() -> None:
    """Start everything in rounds, print the table, write the JSON file."""
    arguments = build_parser().parse_args()
    _, made_by = prepare(arguments)
    works = commands(arguments.programs or programs())
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for counted in [False] + [True] * arguments.rounds:
        for name, command in works.items():
            took = start(command, arguments.clock)
            if counted:
                seconds[name].append(took)
    print_header("start-up")
    for name, values in seconds.items():
        print_row(name, values)
    save(arguments.out, {"benchmark": "startup", **made_by, "seconds": seconds})


if __name__ == "__main__":
    run_entry_point(main)
