"""What the benchmarks share: clocks, rounds, the matrix product that rates are held against, memory, results."""

import argparse
import ctypes
import gc
import inspect
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.flags import Parser
from modules.runtime.environment import choose_device, provenance
from modules.runtime.errors import InputError
from modules.runtime.output_files import Output, check_outputs, contains

PRODUCT_SIDE = 2048


def parser_of(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has; ``description`` is its page of help."""
    parser = Parser(description=description)
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="counted runs, after one that is not; default %(default)s")
    add("--threads", type=int, help="of torch; default: all")
    add("--device", default="cpu", help="cpu, cuda or cuda:N; default %(default)s")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of this process, for machines that other work shares; default %(default)s",
    )
    add("--out", type=Path, help="JSON file to write")
    return parser


def prepare(arguments: argparse.Namespace, positive: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The device, and what goes with every result: machine, versions, threads, clock, settings.

    InputError for a flag of ``positive`` (or rounds, threads) that is less than 1, and where --out is another file.
    """
    check_outputs([Output("--out", arguments.out, "a result of a benchmark", contains('"benchmark":', '"settings":'))])
    for name in ("rounds", "threads", *positive):
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise InputError(f"--{name} {number}: must be 1 or more")
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = str(choose_device(arguments.device))
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    made_by = {**provenance(device), "threads": torch.get_num_threads(), "clock": arguments.clock, "settings": settings}
    print(
        f"{made_by['device_name']}, {made_by['threads']} thread(s), torch {torch.__version__}, "
        f"{arguments.clock} time, medians of {arguments.rounds}"
    )
    return device, made_by


def now(clock: str, device: str) -> float:
    """Seconds by ``clock`` once the device has nothing left to do."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
    return time.process_time() if clock == "cpu" else time.perf_counter()


def timed(work: Callable[[], object], clock: str, device: str) -> float:
    """Seconds of one run."""
    start = now(clock, device)
    work()
    return now(clock, device) - start


def in_rounds(
    works: Mapping[str, Callable[[], object]], rounds: int, clock: str, device: str
) -> dict[str, list[float]]:
    """Seconds of every work in every round, after one round that is not counted.

    Each round runs everything once, so that other work on the machine weighs on all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for counted in [False] + [True] * rounds:
        for name, work in works.items():
            took = timed(work, clock, device)
            if counted:
                seconds[name].append(took)
    return seconds


def product_rate(
    device: str, clock: str, precision: str = "float32", shapes: Sequence[tuple[int, int, int]] = ()
) -> float:
    """Best operations per second of a matrix product: of two squares, and of (n, k) @ (k, m) for ``shapes``."""
    import torch

    rates = []
    for n, k, m in ((PRODUCT_SIDE,) * 3, *shapes):
        left, right = (torch.rand(shape, device=device).to(getattr(torch, precision)) for shape in ((n, k), (k, m)))
        left @ right
        seconds = min(timed(lambda left=left, right=right: left @ right, clock, device) for _ in range(5))
        rates.append(2 * n * k * m / seconds)
    return max(rates)


def operations(work: Callable[[], object]) -> int:
    """Multiplications and additions of ``work``, by torch's counter.

    That of torch 2.10 leaves out fused attention on a CPU, which is counted here as on a GPU.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    aten = torch.ops.aten
    missing = {
        aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
    }
    known = {name: inspect.unwrap(flop_registry[like]) for name, like in missing.items() if name not in flop_registry}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops()


def peak_memory(work: Callable[[], object], device: str) -> tuple[float, float]:
    """MiB that ``work`` takes at most beyond what was there before, and in all: of the GPU, or of this process."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        most = torch.cuda.max_memory_allocated(device)
        return (most - before) / 2**20, most / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed is not the present work's
    Path("/proc/self/clear_refs").write_text("5")  # makes the high-water mark the present size
    before = _high_water_mark()
    work()
    return _high_water_mark() - before, _high_water_mark()


def _high_water_mark() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_header(title: str, *columns: str) -> None:
    """The head of a table whose first columns are median, fastest and slowest run."""
    names = ("median s", "fastest", "slowest", *columns)
    print(f"\n{title}\n{'':<44}" + "".join(f"{name:>12}" for name in names))


def print_row(name: str, seconds: Sequence[float], *more: str) -> None:
    """One line of it."""
    numbers = [f"{value:.4g}" for value in (statistics.median(seconds), min(seconds), max(seconds))]
    print(f"{name:<44}" + "".join(f"{text:>12}" for text in (*numbers, *more)))


def save(out: Path | None, result: Mapping[str, Any]) -> None:
    """Write the JSON file, if one was asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
