"""Starts a program as several processes on this machine, as torchrun does; under torchrun nothing is left to start.

Free of torch until processes are started, so that flags are read and mistakes found in a moment.
"""

import dataclasses
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from modules.runtime.cores import share_threads
from modules.runtime.errors import InputError

# Whole seconds between a signal to the launcher and the kill: time for a checkpoint in the middle of an epoch.
SHUTDOWN_SECONDS = 30


def launched() -> bool:
    """Whether torchrun, or ``start_processes``, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def process_number() -> int:
    """Number of this process among all that were launched together, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def process_device(device: str) -> str:
    """The part of ``device`` (as in --device) that this process works on: of several, each has a GPU of its own."""
    if not launched() or device == "cpu":
        return device
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    count = int(os.environ["LOCAL_WORLD_SIZE"])
    check_processes(count, device, flag="nproc_per_node")
    return f"cuda:{os.environ['LOCAL_RANK']}" if count > 1 else device


def check_processes(count: int, device: str, flag: str = "n_gpu") -> None:
    """InputError where ``device`` (auto, cpu, cuda) cannot take ``count`` processes."""
    if device == "cpu" or count == 1:
        return
    import torch

    if device not in ("auto", "cuda"):
        raise InputError(f"--device {device}: several processes take a GPU each; leave it out, or give --device cpu")
    found = torch.cuda.device_count()
    if found < count:
        there = "is 1 GPU" if found == 1 else f"are {found or 'no'} GPUs"
        fewer = f"--{flag} {found}, or " if found else ""
        raise InputError(
            f"--{flag} {count}: there {there} here; give {fewer}--device cpu for {count} processes without GPUs"
        )


def start_processes(count: int, *, device: str, max_restarts: int = 0, argv: Sequence[str] | None = None) -> int:
    """Run ``argv`` (this program's own command line) in ``count`` processes; returns the exit code for all of them.

    A process that fails ends the others. With ``max_restarts`` all are then started again, up to that many times,
    unless the failure was a mistake of the user, which a process has named: the code is 2 then. It is 128 + n where
    signal n ended this launcher, which hands it on, and else 1.
    """
    check_processes(count, device)
    # torchrun sets 1 where nothing is set: on a CPU the processes may share all cores.
    share_threads(count)
    command = list(sys.argv if argv is None else argv)
    for left in range(max_restarts, -1, -1):
        code, reason = _run(count, command)
        if reason is None:
            return code
        outcome = f"starting all {count} again" if left else "the others were stopped; continue with --resume auto"
        print(f"\nerror: {reason}; {outcome}", file=sys.stderr, flush=True)
    return code


def _run(count: int, command: list[str]) -> tuple[int, str | None]:
    """The exit code of one start of all processes, and why it failed where another start may help."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a page about every failure: the processes say enough
    # Releases without the setting wait 30 seconds too.
    has_timeout = "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}
    patience: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if has_timeout else {}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **patience,
    )
    try:
        elastic_launch(settings, sys.executable)(*command)
    except ChildFailedError as error:
        return _failure({number: failure.exitcode for number, failure in error.failures.items()}, count)
    except SignalException as error:
        return 128 + int(error.sigval), None
    return 0, None


def _failure(exit_codes: dict[int, int], count: int) -> tuple[int, str | None]:
    """Exit code and reason; the processes that were stopped because of another's failure got SIGTERM."""
    if 2 in exit_codes.values():
        return 2, None
    stopped = (-signal.SIGTERM, 128 + signal.SIGTERM)
    # A kill comes before the code 1 of those that lost the connection to the process that was killed.
    code, number = min((code in stopped, code, number) for number, code in exit_codes.items())[1:]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return 1, f"process {number} of {count} {how}"
