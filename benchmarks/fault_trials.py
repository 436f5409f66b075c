"""The faults of benchmarks/fault_campaign.py: what is done to a run, and what must be true afterwards."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_runs import Bench, group_is_gone, load

SIGNAL_SECONDS = 25.0  # from a signal to the end of the run
FAILURE_SECONDS = 60.0  # from the death of a worker or a rank to the end of the run
KILLS_PER_RUN = 5


@dataclass(frozen=True)
class Trial:
    """One fault. ``survived``: all that is promised held. ``lost``: steps that had to be made again, None: not asked.
    ``identical``: whether the run's end was the undisturbed run's, None: not asked. ``why`` it did not survive.
    """

    survived: bool
    lost: int | None = None
    identical: bool | None = None
    seconds: float | None = None
    why: str = ""


def kills(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """kill -9 at random instants; a run is killed KILLS_PER_RUN times before it may end."""
    yield from _killed(bench, rng, number, inside_write=False)


def kills_in_writes(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """kill -9 between two calls of the operating system while a checkpoint is written and put in its place."""
    yield from _killed(bench, rng, number, inside_write=True)


def _killed(bench: Bench, rng: random.Random, number: int, inside_write: bool) -> Iterator[Trial]:
    done = 0
    while done < number:
        folder = bench.folder / f"killed-{inside_write}-{done}"
        trials, count = [], min(KILLS_PER_RUN, number - done)
        while len(trials) < count:
            trap = _trap_in_write(rng) if inside_write else None
            flags = ["--resume", "auto"] if folder.exists() else []
            pid = bench.start(folder, *flags, before=trap)
            if not inside_write:
                bench.reach(pid, folder, rng)
                os.kill(pid, signal.SIGKILL)
            if bench.wait(pid) == -signal.SIGKILL:
                trials.append((bench.progress.steps, _reached(folder)))
            elif bench.progress.steps >= bench.steps or folder.exists() and _finished(bench, folder):
                shutil.rmtree(folder, ignore_errors=True)  # it ended before it was killed: a new run for the rest
        identical = bench.resume(folder)
        for made, kept in trials:
            yield Trial(
                survived=kept is not None, identical=identical, lost=None if kept is None else max(0, made - kept)
            )
        done += count
        shutil.rmtree(folder, ignore_errors=True)


def _finished(bench: Bench, folder: Path) -> bool:
    reached = _reached(folder)
    return reached is not None and reached >= bench.steps


def _trap_in_write(rng: random.Random) -> Callable[[], None]:
    """Kills the process at the n-th call that changes a file of the checkpoint folder, n at random."""
    number = rng.randint(1, 60)

    def trap() -> None:
        from modules.training import checkpoint, checkpoint_folder

        calls = []

        def dying(function: Callable) -> Callable:
            def call(*arguments, **keywords):
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for name in ("replace", "fsync", "link", "open"):
            setattr(checkpoint_folder.os, name, dying(getattr(os, name)))
        checkpoint._Hashed.write = dying(checkpoint._Hashed.write)

    return trap


def _reached(folder: Path) -> int | None:
    """Optimiser steps in the newest valid checkpoint: 0 without any, None where there are some but none is valid."""
    from modules.runtime.errors import InputError
    from modules.training.checkpoint_folder import CheckpointFolder

    if not folder.is_dir():
        return 0
    try:
        found = CheckpointFolder(folder).newest_valid()
    except InputError:
        return None
    return found[1]["position"]["total_steps"] if found else 0


def signals(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """SIGTERM or SIGINT at random instants: the run saves what it reached and ends with 143 or 130."""
    done = 0
    while done < number:
        folder = bench.folder / f"signalled-{done}"
        kind, code = rng.choice(((signal.SIGTERM, 143), (signal.SIGINT, 130)))
        pid = bench.start(folder)
        bench.reach(pid, folder, rng)
        started = time.monotonic()
        os.kill(pid, kind)
        ended = bench.wait(pid)
        seconds = time.monotonic() - started
        if ended == 0:
            shutil.rmtree(folder, ignore_errors=True)
            continue  # it was through before the signal came
        kept, made = _reached(folder), bench.progress.steps
        gone = group_is_gone(pid)
        survived = ended in (code, -kind) and seconds < SIGNAL_SECONDS and gone and kept is not None
        log = (bench.folder / f"{folder.name}.log").read_text()
        why = "" if survived else f"{kind.name}: {_account(ended, seconds, made, kept, gone, log)}"
        yield Trial(
            survived,
            lost=None if kept is None else max(0, made - kept),
            identical=bench.resume(folder),
            seconds=seconds,
            why=why,
        )
        shutil.rmtree(folder, ignore_errors=True)
        done += 1


def _account(code: int | None, seconds: float, made: int, kept: int | None, gone: bool, log: str) -> str:
    """What is needed to understand a trial that did not survive."""
    return (
        f"ended with {code} in {seconds:.1f} s after {made} steps, checkpoint of {kept} steps, processes "
        f"{'gone' if gone else 'left'}; the log ends with {log[-1500:]!r}"
    )


def truncations(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """The current checkpoint cut short: the run names it and resumes from another one."""
    yield from _damaged(bench, rng, number, lambda content: content[: rng.randrange(len(content))])


def bit_flips(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """One bit of the current checkpoint changed, likewise."""

    def flip(content: bytes) -> bytes:
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]

    yield from _damaged(bench, rng, number, flip)


def _damaged(bench: Bench, rng: random.Random, number: int, damage: Callable[[bytes], bytes]) -> Iterator[Trial]:
    from modules.training.checkpoint_folder import CURRENT, CheckpointFolder

    folder = bench.folder / "damaged"
    shutil.copytree(bench.folder / "reference", folder)
    whole = (folder / CURRENT).read_bytes()
    for _ in range(number):
        (folder / CURRENT).unlink()  # it may be one file with the best
        (folder / CURRENT).write_bytes(damage(whole))
        checkpoints = CheckpointFolder(folder)
        found = checkpoints.newest_valid()
        taken = found is not None and found[0].name != CURRENT
        yield Trial(
            taken and len(checkpoints.problems) == 1 and CURRENT in checkpoints.problems[0],
            lost=bench.steps - found[1]["position"]["total_steps"] if found else None,
        )
    shutil.rmtree(folder)


def full_disks(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """From some step on no file may grow beyond part of a checkpoint: one line, exit 2, the one before loads."""
    from modules.training.checkpoint_folder import CURRENT

    size = (bench.folder / "reference" / CURRENT).stat().st_size
    for trial in range(number):
        folder = bench.folder / f"full-{trial}"
        last, part = rng.randrange(2, bench.steps), rng.uniform(0.05, 0.95)

        def limit(last: int = last, part: float = part) -> None:
            from modules.training.trainer import Trainer

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            step = Trainer._step

            def filling(self: Trainer, group: list) -> None:
                if self.position.total_steps == last:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * part), resource.RLIM_INFINITY))
                step(self, group)

            Trainer._step = filling

        code = bench.wait(bench.start(folder, before=limit))
        log = (bench.folder / f"{folder.name}.log").read_text()
        kept, made = _reached(folder), bench.progress.steps
        survived = (
            code == 2
            and "cannot be written" in log
            and "Traceback" not in log
            and kept is not None
            and not list(folder.glob(".*.tmp"))
        )
        yield Trial(survived, lost=None if kept is None else max(0, made - kept), identical=bench.resume(folder))
        shutil.rmtree(folder, ignore_errors=True)


def killed_workers(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """kill -9 for one of two data-loading processes: one line, exit 2 within a minute, no orphan."""
    done = 0
    while done < number:
        folder = bench.folder / f"worker-{done}"
        pid = bench.start(folder, "--num_workers", "2")
        bench.reach(pid, folder, rng)
        started = time.monotonic()
        if not _kill_one(_children(pid), rng):
            bench.wait(pid)
            shutil.rmtree(folder, ignore_errors=True)
            continue  # it was between two epochs, or through
        code = bench.wait(pid)
        seconds = time.monotonic() - started
        if code == 0:
            shutil.rmtree(folder, ignore_errors=True)
            continue  # a worker that had nothing left to read
        log = (bench.folder / f"{folder.name}.log").read_text()
        kept, made = _reached(folder), bench.progress.steps
        gone = group_is_gone(pid)
        survived = (
            code == 2
            and seconds < FAILURE_SECONDS
            and "was killed" in log
            and "Traceback" not in log
            and gone
            and kept is not None
        )
        why = "" if survived else _account(code, seconds, made, kept, gone, log)
        yield Trial(
            survived,
            lost=None if kept is None else max(0, made - kept),
            identical=bench.resume(folder),
            seconds=seconds,
            why=why,
        )
        shutil.rmtree(folder, ignore_errors=True)
        done += 1


def _kill_one(pids: list[int], rng: random.Random) -> bool:
    """kill -9 for one of the processes; whether it was still there."""
    if not pids:
        return False
    try:
        os.kill(rng.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def killed_ranks(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """kill -9 for one of two processes of a training: the job ends within a minute, and what was saved is valid."""
    main = Path(__file__).resolve().parent.parent / "main_train.py"
    flags = [*bench.argv, "--n_gpu", "2", "--epochs", "40"]
    for trial in range(number):
        folder = bench.folder / f"rank-{trial}"
        log = bench.folder / f"{folder.name}.log"
        with open(log, "wb") as file:
            job = subprocess.Popen(
                [sys.executable, str(main), "--save_dir", str(folder), *flags],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        ranks = _ranks_at_work(job, folder)
        time.sleep(rng.uniform(0.0, 1.0))
        started = time.monotonic()
        assert _kill_one(ranks, rng), f"the processes ended by themselves: see {log}"
        try:
            code = job.wait(timeout=2 * FAILURE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            code = job.wait()
        seconds = time.monotonic() - started
        kept = _reached(folder)
        yield Trial(
            code not in (0, None)
            and seconds < FAILURE_SECONDS
            and group_is_gone(job.pid)
            and kept is not None
            and kept > 0,
            seconds=seconds,
        )
        shutil.rmtree(folder, ignore_errors=True)


def _ranks_at_work(job: subprocess.Popen, folder: Path, limit: float = 120.0) -> list[int]:
    """The job's two processes, once the first checkpoint is there."""
    from modules.training.checkpoint_folder import CURRENT

    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if (folder / CURRENT).is_file() and load(folder)["position"]["total_steps"] > 0:
            return _children(job.pid)
        time.sleep(0.2)
    raise AssertionError(f"two processes did not begin to train within {limit:g} s: see {folder}.log")
