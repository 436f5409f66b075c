"""Break runs in every way that a cluster does, many times, and count what survives.

  python benchmarks/fault_campaign.py --out benchmarks/results/fault_campaign.json     # 100 kills and all the rest
  python benchmarks/fault_campaign.py --share 0.02                                      # a quick look
  python benchmarks/fault_campaign.py --only kills signals

Trains tiny models on synthetic data in a temporary folder. Survived: all that docs/RELIABILITY.md promises for that
fault held. Lost: optimiser steps that had to be made again. Identical: trials whose run, resumed to its end, has the
undisturbed run's weights, optimiser state, random numbers and logged losses, bit by bit.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

if TYPE_CHECKING:
    from benchmarks.fault_trials import Trial

# Trials of the whole campaign.
NUMBERS = {
    "kills": 70,
    "kills_in_writes": 30,
    "signals": 50,
    "truncations": 200,
    "bit_flips": 200,
    "full_disks": 20,
    "killed_workers": 20,
    "killed_ranks": 20,
    "random_batches": 10_000,
    "annotations": 2000,
    "checkpoints": 1000,
    "dicoms": 2000,
    "deep_images": 200,
    "odd_paths": 20,
    "umasks": 10,
    "clocks_set_back": 10,
    "slow_disks": 10,
    "changed_directories": 10,
    "stopped_jobs": 10,
    "read_only_folders": 10,
    "killed_self_critical": 10,
    "killed_shards": 10,
    "ranks_to_one": 5,
}
TITLES = {
    "kills": "kill -9 at a random instant",
    "kills_in_writes": "kill -9 inside a checkpoint's write",
    "signals": "SIGTERM or SIGINT at a random instant",
    "truncations": "checkpoint cut short",
    "bit_flips": "checkpoint with one bit changed",
    "full_disks": "disk full",
    "killed_workers": "data-loading process killed",
    "killed_ranks": "one of two ranks killed",
    "random_batches": "random batch through the objective, three precisions",
    "annotations": "damaged annotation read",
    "checkpoints": "damaged checkpoint read, no checksum",
    "dicoms": "damaged DICOM uploaded",
    "deep_images": "image with NaN and infinities",
    "odd_paths": "very long and odd paths",
    "umasks": "umask 000 and 077",
    "clocks_set_back": "clock set back or ahead",
    "slow_disks": "slow file system",
    "changed_directories": "working directory changed or deleted",
    "stopped_jobs": "whole job stopped and continued",
    "read_only_folders": "results folder becomes read-only",
    "killed_self_critical": "kill -9 in the self-critical stage",
    "killed_shards": "kill -9 in a training from shards",
    "ranks_to_one": "two ranks killed, one resumes",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="X",
        help="part of the whole campaign's trials, at least one of each (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=NUMBERS, metavar="FAULT", help="these faults only: " + ", ".join(NUMBERS)
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where to write the table with machine and versions")
    return parser


def main() -> int:
    """Run the trials, print the table; 1 where a trial did not survive."""
    arguments = build_parser().parse_args()
    if not 0 < arguments.share <= 1:
        raise InputError(f"--share {arguments.share}: must be above 0 and at most 1")
    check_outputs([Output("--out", arguments.out, "a result of a campaign", contains('"faults":', '"seed":'))])
    import torch

    from benchmarks.fault_runs import Bench
    from modules.runtime.environment import provenance
    from modules.runtime.records import write_results

    torch.set_num_threads(1)  # the processes are forked: threads would not come along
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder))
        print(f"an undisturbed run: {bench.steps} steps in {bench.seconds:.1f} s")
        for name in arguments.only or NUMBERS:
            number = max(1, round(NUMBERS[name] * arguments.share))
            rows.append(run(name, number, bench, random.Random(f"{arguments.seed} {name}")))
            if arguments.out:  # after every fault: the whole takes most of an hour
                write_results(arguments.out, {**provenance("cpu"), "seed": arguments.seed, "faults": rows})
    print("\n" + table(rows))
    return 0 if all(row["survived"] == row["trials"] for row in rows) else 1


def faults() -> dict[str, Callable[..., "Iterator[Trial]"]]:
    """The trials by name."""
    from benchmarks import fault_conditions, fault_readers, fault_trials

    places = (fault_trials, fault_readers, fault_conditions)
    return {name: next(getattr(place, name) for place in places if hasattr(place, name)) for name in NUMBERS}


def run(name: str, number: int, bench: Any, rng: random.Random) -> dict[str, Any]:
    """All trials of one fault, as a row of the table."""
    from tqdm import tqdm

    started = time.monotonic()
    trials = list(tqdm(faults()[name](bench, rng, number), total=number, desc=TITLES[name], leave=False))
    for trial in trials:
        if trial.why:
            print(trial.why, file=sys.stderr)
    lost = [trial.lost for trial in trials if trial.lost is not None]
    ends = [trial.identical for trial in trials if trial.identical is not None]
    seconds = [trial.seconds for trial in trials if trial.seconds is not None]
    return {
        "fault": TITLES[name],
        "trials": len(trials),
        "survived": sum(trial.survived for trial in trials),
        "lost_mean": statistics.mean(lost) if lost else None,
        "lost_most": max(lost, default=None),
        "identical": sum(ends) if ends else None,
        "resumed": len(ends),
        "longest_seconds": max(seconds, default=None),
        "minutes": (time.monotonic() - started) / 60,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| fault | trials | survived | steps lost, mean (most) | bit-identical after resuming | longest end, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lost = "–" if row["lost_most"] is None else f"{row['lost_mean']:.1f} ({row['lost_most']})"
        same = "–" if row["identical"] is None else f"{row['identical']} of {row['resumed']}"
        longest = "–" if row["longest_seconds"] is None else f"{row['longest_seconds']:.1f}"
        lines.append(f"| {row['fault']} | {row['trials']:,} | {row['survived']:,} | {lost} | {same} | {longest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
