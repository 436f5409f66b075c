"""How much of the processor is this process's: cores, threads, and processes that read images. Free of torch."""

import contextlib
import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MOST_WORKERS = 16  # of one process: more have not been seen to help
AUTO = -1  # the number of processes that stands for "choose it"
_threads_were_given = True


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, and no more than a container's quota, at least 1."""
    quota, cores = cpu_quota(), _cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the control groups of this process may use per unit of time, None without a limit.

    The smallest limit from the process's own group up to the root counts, of version 2 (cpu.max) and of version 1.
    """
    limits = []
    for line in _read(own).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [cgroups / controllers, cgroups / "cpu"] if controllers else [cgroups]
        for root in roots:
            # In a container the path may be that of the host, of which only the root is seen.
            for folder in {root, *(root / part for part in _upwards(path))}:
                limits += [limit for limit in (_limit(folder),) if limit is not None]
    return min(limits, default=None)


def _upwards(path: str) -> list[Path]:
    inside = Path(path.lstrip("/"))
    return [] if ".." in inside.parts else [inside, *inside.parents]


def _limit(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    with contextlib.suppress(ValueError, ZeroDivisionError):  # "max", or nothing
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def choose_threads() -> None:
    """Bound the threads of torch, which is to be imported afterwards, unless the environment says otherwise.

    torch counts the cores of the host, whatever a container's quota is. And a thread of OpenMP that has nothing to do
    spins, which on a machine with other work takes the core from the thread that it waits for: it is to sleep.
    """
    global _threads_were_given
    _threads_were_given = "OMP_NUM_THREADS" in os.environ
    if (usable := usable_cores()) < _cores():  # elsewhere torch chooses better: one for each physical core
        os.environ.setdefault("OMP_NUM_THREADS", str(usable))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def share_threads(processes: int) -> None:
    """Divide the cores among ``processes`` that are about to be started, unless the user gave OMP_NUM_THREADS."""
    if not _threads_were_given or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))


def worker_processes(asked: int) -> int:
    """``asked`` processes that read images, and for AUTO this process's part of the cores: 1 to MOST_WORKERS."""
    if asked != AUTO:
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST_WORKERS, usable_cores() // here))
