"""Faults of benchmarks/fault_campaign.py that do not stop a run, and stages of their own that are killed.

A run under a strange condition ends as the undisturbed one, bit by bit; a stage that was killed ends as itself.
"""

import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fault_runs import Bench, load, same
from benchmarks.fault_trials import Trial, _ranks_at_work, _reached

ODD_NAMES = (
    "a name with spaces",
    "'quotes' \"and\" $HOME `ls` ;&|",
    "line\nbreak",
    "Überprüfung-胸部-📁",
    "-starts-with-a-dash",
    "%s %d {0} [x] *",
    "n" * 200,
    "/".join(["deep" * 40] * 20),
)


def _ends_alike(bench: Bench, folder: Path, *flags: str, before: Callable[[], None] | None = None) -> Trial:
    code = bench.wait(bench.start(folder, *flags, before=before))
    identical = code == 0 and same(bench.reference, load(folder))
    trial = Trial(code == 0, identical=identical, why="" if code == 0 else f"{folder.name[:40]!r} ended with {code}")
    shutil.rmtree(folder, ignore_errors=True)
    return trial


def _from_step(last: int, change: Callable[[], Any]) -> None:
    """In the child: call ``change`` before the optimiser step ``last``."""
    from modules.training.trainer import Trainer

    step = Trainer._step

    def changing(self: Trainer, group: list) -> None:
        if self.position.total_steps == last:
            change()
        step(self, group)

    Trainer._step = changing


def odd_paths(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """Results in folders with spaces, quotes, line breaks, other scripts, long names and paths of 3,200 letters."""
    for trial in range(number):
        top = bench.folder / f"odd-{trial}"
        place = top / ODD_NAMES[trial % len(ODD_NAMES)]
        place.mkdir(parents=True)
        yield _ends_alike(bench, place / "run")
        shutil.rmtree(top, ignore_errors=True)


def umasks(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """umask 000 and 077: the run ends alike, and what it writes is its owner's alone."""
    for trial in range(number):
        folder, mask = bench.folder / f"umask-{trial}", (0o000, 0o077)[trial % 2]
        code = bench.wait(bench.start(folder, before=lambda mask=mask: os.umask(mask)))
        modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
        private = modes == {0o600} and stat.S_IMODE(folder.stat().st_mode) == 0o700
        why = "" if code == 0 and private else f"ended with {code}, modes {modes}"
        yield Trial(not why, identical=code == 0 and same(bench.reference, load(folder)), why=why)
        shutil.rmtree(folder, ignore_errors=True)


def clocks_set_back(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """The clock of the day goes back by a day, or ahead by a year, in the middle of a run."""
    for trial in range(number):
        last, shift = rng.randrange(1, bench.steps), rng.choice((-86_400.0, 31_536_000.0))

        def before(last: int = last, shift: float = shift) -> None:
            now, local = time.time, time.gmtime

            def change() -> None:
                time.time = lambda: now() + shift
                time.gmtime = lambda seconds=None: local(now() + shift if seconds is None else seconds)

            _from_step(last, change)

        yield _ends_alike(bench, bench.folder / f"clock-{trial}", before=before)


def slow_disks(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """Every call that opens, flushes or renames a file takes up to a twentieth of a second."""
    for trial in range(number):

        def before(seed: int = trial) -> None:
            draw = random.Random(seed)

            def slowly(function: Callable) -> Callable:
                def call(*arguments: Any, **keywords: Any) -> Any:
                    time.sleep(draw.uniform(0.0, 0.05))
                    return function(*arguments, **keywords)

                return call

            for name in ("open", "fsync", "replace", "link"):
                setattr(os, name, slowly(getattr(os, name)))

        yield _ends_alike(bench, bench.folder / f"slow-{trial}", before=before)


def changed_directories(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """The working directory is left for another, or deleted, in the middle of a run that was given whole paths."""
    for trial in range(number):
        place = bench.folder / f"place-{trial}"
        place.mkdir()

        def before(last: int = rng.randrange(bench.steps), place: Path = place, kind: int = trial % 2) -> None:
            os.chdir(place)
            _from_step(last, place.rmdir if kind else lambda: os.chdir("/"))

        yield _ends_alike(bench, bench.folder / f"directory-{trial}", before=before)


def stopped_jobs(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """SIGSTOP for the whole job, longer than --worker_timeout, and SIGCONT: it goes on as if nothing had been."""
    for trial in range(number):
        folder = bench.folder / f"stopped-{trial}"
        pid = bench.start(folder, "--num_workers", "2", "--worker_timeout", "6")
        bench.reach(pid, folder, rng)
        for kind, pause in ((signal.SIGSTOP, 9.0), (signal.SIGCONT, 0.0)):
            try:
                os.killpg(pid, kind)
            except ProcessLookupError:
                break
            time.sleep(pause)
        code = bench.wait(pid)
        log = (bench.folder / f"{folder.name}.log").read_text()
        why = "" if code == 0 else f"ended with {code}: {log[-500:]}"
        yield Trial(code == 0, identical=code == 0 and same(bench.reference, load(folder)), why=why)
        shutil.rmtree(folder, ignore_errors=True)


def read_only_folders(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """The results folder can no longer be written from some step on: one line, exit 2, the last checkpoint loads."""
    for trial in range(number):
        folder = bench.folder / f"readonly-{trial}"

        def before(last: int = rng.randrange(2, bench.steps)) -> None:
            opened = os.open

            def refuse(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:
                if flags & (os.O_WRONLY | os.O_RDWR):
                    raise OSError(30, "Read-only file system", str(path))
                return opened(path, flags, *rest, **keywords)

            _from_step(last, lambda: setattr(os, "open", refuse))

        code = bench.wait(bench.start(folder, before=before))
        log = (bench.folder / f"{folder.name}.log").read_text()
        kept = _reached(folder)
        survived = code == 2 and "cannot be written" in log and "Traceback" not in log and kept is not None
        why = "" if survived else f"ended with {code}: {log[-500:]}"
        lost = None if kept is None else max(0, bench.progress.steps - kept)
        yield Trial(survived, lost=lost, identical=bench.resume(folder), why=why)
        shutil.rmtree(folder, ignore_errors=True)


def _killed_stage(bench: Bench, rng: random.Random, number: int, name: str, flags: list[str]) -> Iterator[Trial]:
    """kill -9 in runs with ``flags``: each ends as an undisturbed run with them."""
    whole = bench.folder / f"{name}-reference"
    code = bench.wait(bench.start(whole, *flags))
    assert code == 0, f"the undisturbed run ended with {code}: see {whole}.log"
    reference = load(whole)
    for trial in range(number):
        folder = bench.folder / f"{name}-{trial}"
        pid = bench.start(folder, *flags)
        bench.reach(pid, folder, rng)
        os.kill(pid, signal.SIGKILL)
        bench.wait(pid)
        kept, made = _reached(folder), bench.progress.steps
        code = bench.wait(bench.start(folder, "--resume", "auto", *flags))
        why = "" if kept is not None and code == 0 else f"ended with {code}, checkpoint of {kept} steps"
        lost = None if kept is None else max(0, made - kept)
        yield Trial(not why, lost=lost, identical=code == 0 and same(reference, load(folder)), why=why)
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(whole)


def killed_self_critical(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """kill -9 in the self-critical stage."""
    start = str(bench.folder / "reference" / "model_best.pth")
    flags = ["--self_critical", "true", "--load", start, "--ithn", "off", "--scst_samples", "2", "--epochs", "2"]
    yield from _killed_stage(bench, rng, number, "critical", flags)


def killed_shards(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """kill -9 in a training that reads shards."""
    import sys

    from benchmarks.fault_runs import quiet
    from scripts import make_shards

    shards = bench.folder / "shards"
    if not shards.is_dir():
        paths = dict(zip(bench.argv[::2], bench.argv[1::2], strict=False))
        names = ("--ann_path", "--image_dir")
        words = [word for name in names for word in (name, paths[name])]
        words += ["--negative_index", paths["--negative_index"], "--out", str(shards), "--shard_mb", "0.02"]
        before, sys.argv = sys.argv, ["make_shards.py", *words]
        try:
            with quiet(bench.folder / "shards.log"):
                make_shards.main()
        finally:
            sys.argv = before
    yield from _killed_stage(bench, rng, number, "shards", ["--shards", str(shards)])


def ranks_to_one(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """A training of two processes is killed, and one process resumes it to its end."""
    import subprocess
    import sys

    main = Path(__file__).resolve().parent.parent / "main_train.py"
    for trial in range(number):
        folder = bench.folder / f"two-{trial}"
        log = bench.folder / f"{folder.name}.log"
        with open(log, "wb") as file:
            words = [
                sys.executable,
                str(main),
                "--save_dir",
                str(folder),
                *bench.argv,
                "--n_gpu",
                "2",
                "--epochs",
                "40",
            ]
            job = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
        _ranks_at_work(job, folder)
        time.sleep(rng.uniform(0.0, 1.0))
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        kept = _reached(folder)
        epoch = load(folder)["position"]["epoch"] + 1
        code = bench.wait(bench.start(folder, "--resume", "auto", "--n_gpu", "1", "--epochs", str(epoch)))
        why = "" if kept and code == 0 else f"ended with {code}, checkpoint of {kept} steps; see {folder}.log"
        yield Trial(not why, why=why)
        shutil.rmtree(folder, ignore_errors=True)
