"""A training step in one process and in several on this machine: what bringing their gradients together costs.

Every process has a batch of its own, and on a CPU one thread unless --threads says more. Beside the step as training
takes it, in the same rounds: the step with each process's gradients left where they are, and the all-reduce of as many
bytes alone. From these two follows, as benchmarks/cluster.py calculates, the share of the time left for computing with
nothing of the all-reduce hidden behind the backward pass and with all that fits; the measured one is given next to it.
Seconds of the processor (--clock cpu) hide behind nothing.

  python benchmarks/processes.py                                     two processes, gloo, R2GenCMN with ITHN, batch 4
  python benchmarks/processes.py --device cuda --processes 8 --batch_size 64     a GPU each, NCCL
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cluster import add_sizes, efficiency
from benchmarks.measurement import now, parser_of, prepare, print_header, print_row, save
from benchmarks.train_step import build_step
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.launch import check_processes

STEP, APART, ALONE = "step", "step without all-reduce", "all-reduce alone"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=5)
    parser.set_defaults(threads=1)
    parser.add_argument("--processes", type=int, default=2, help="default %(default)s")
    add_sizes(parser, batch_size=4)
    return parser


def one_process(number: int, count: int, arguments: argparse.Namespace, folder: str) -> None:
    """Measure as process ``number`` of ``count``; the first one writes ``folder``/``count``.json."""
    import torch
    from torch import distributed as dist

    from modules.runtime import distributed

    gpu = arguments.device != "cpu"
    device = f"cuda:{number}" if gpu else "cpu"
    torch.set_num_threads(arguments.threads)
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{folder}/meet{count}", rank=number, world_size=count
    )
    case = {
        "batch_size": arguments.batch_size,
        "views": arguments.views,
        "max_seq_length": arguments.max_seq_length,
        "precision": "float32",
        "compile": False,
        "strategy": arguments.strategy,
    }
    step = build_step(arguments, device, case)
    parallel = distributed.data_parallel(step.objective)
    gradients = torch.zeros(sum(parameter.numel() for parameter in step.objective.parameters()), device=device)

    def whole() -> None:
        parallel(step.batch, 1)["loss"].backward()
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)

    def apart() -> None:
        with distributed.no_gradient_sync(parallel):
            whole()

    works = {STEP: whole, APART: apart, ALONE: lambda: dist.all_reduce(gradients)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for counted in [False] + [True] * arguments.rounds:
        for name, work in works.items():
            dist.barrier()
            start = now(arguments.clock, device)
            work()
            if counted:
                seconds[name].append(now(arguments.clock, device) - start)
    if number == 0:
        found = {"seconds": seconds, "gradients": 4 * len(gradients)}
        Path(folder, f"{count}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds by kind of work in one process and in all, and what follows from them."""
    from torch.multiprocessing import start_processes

    with tempfile.TemporaryDirectory() as folder:
        for count in (1, arguments.processes):
            start_processes(one_process, (count, arguments, folder), count)
        one, many = (
            json.loads(Path(folder, f"{count}.json").read_text(encoding="utf-8")) for count in (1, arguments.processes)
        )
    compute, wire = (statistics.median(many["seconds"][name]) for name in (APART, ALONE))
    without, overlap = efficiency(compute, wire)
    sent = many["gradients"] * 2 * (arguments.processes - 1) / arguments.processes
    measured = statistics.median(a / b for a, b in zip(many["seconds"][APART], many["seconds"][STEP], strict=True))
    return {
        "one": one["seconds"][STEP],
        "several": many["seconds"],
        "sent": sent,
        "calculated": {"no overlap": without, "overlap": overlap},
        "measured": measured,
        "of_one_process": statistics.median(one["seconds"][STEP]) / statistics.median(many["seconds"][STEP]),
    }


def report(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the table."""
    print_header(
        f"{arguments.model_name}, {arguments.visual_extractor}, strategy {arguments.strategy}, "
        f"batch {arguments.batch_size} in each process"
    )
    print_row("1 process: step", found["one"])
    for name, seconds in found["several"].items():
        print_row(f"{arguments.processes} processes: {name}", seconds)
    # Seconds of the processor are not those of the wire.
    rate = f", {found['sent'] / statistics.median(found['several'][ALONE]) / 1e9:.2f} GB/s"
    print(f"sent by each: {found['sent'] / 1e6:.0f} MB{rate if arguments.clock == 'wall' else ''}")
    calculated = found["calculated"]
    print(
        f"share of the time left for computing: calculated {calculated['no overlap']:.1%} (nothing overlapped) to "
        f"{calculated['overlap']:.1%} (all that fits), measured {found['measured']:.1%}"
    )
    print(f"one process's step over theirs, which share the machine's memory and caches: {found['of_one_process']:.1%}")


def main() -> None:
    """Measure, print, write the JSON file."""
    arguments = build_parser().parse_args()
    _, made_by = prepare(arguments, ("batch_size", "views", "max_seq_length", "processes"))
    if arguments.processes < 2:
        raise InputError(f"--processes {arguments.processes}: must be 2 or more, one process is measured beside")
    check_processes(arguments.processes, arguments.device, flag="processes")
    found = measure(arguments)
    report(arguments, found)
    save(arguments.out, {"benchmark": "processes", **made_by, **found})


if __name__ == "__main__":
    run_entry_point(main)
