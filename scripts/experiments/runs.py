"""Makes what the runs of a table need, and runs main_train.py or main_test.py for each."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from modules.runtime.environment import ROOT, file_sha256
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_bytes
from modules.runtime.records import private_folder, write_results
from scripts.experiments.files import DataSet
from scripts.experiments.plan import BEST, CUT, RECORD, RESULTS, START, UNTESTED, Index, Run

CONSOLE = "console.log"
LOCK = ".lock"
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 30  # for a checkpoint, when this script is stopped


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keep a second runner out of ``out``; the trainings inherit the lock, in case this process is killed.

    InputError where there is one.
    """
    with open(private_folder(out) / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--out {out}: another run_experiments.py works there, or a training that it left behind; wait for it, "
                "or stop it"
            ) from error
        yield file.fileno()


def prepare(datasets: Mapping[DataSet, Collection[str]]) -> None:
    """Make the files of each data set that are missing, for all rows or for its rows' models."""
    for dataset, models in datasets.items():
        for step in dataset.prepare:
            if not Path(step.makes).exists() and (not step.model or step.model in models):
                print(f"{dataset.name}: making {step.makes}", flush=True)
                _call([str(ROOT / step.script), *step.arguments])


def mine(runs: Sequence[Run]) -> None:
    """Mine the hard negatives that ``runs`` share and that are missing, once each."""
    indices: dict[Path, Index] = {run.index.path: run.index for run in runs if run.index is not None}
    for path, index in indices.items():
        if path.is_file():
            continue
        print(f"mining hard negatives with {index.text_encoder} into {path}", flush=True)
        flags = {
            "ann_path": index.ann_path,
            "dataset_name": index.dataset_name,
            "text_encoder": index.text_encoder,
            "top_k": index.top_k,
            "examples": 0,
            "out": path,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        _call([str(ROOT / "scripts" / "mine_hard_negatives.py"), *words])


def _call(command: Sequence[str]) -> None:
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code if code > 0 else 1)  # it has printed its error line


def execute(runs: Sequence[Run], *, jobs: int, lock: int, keep: Path | None = None) -> dict[str, str]:
    """Run what is given, ``jobs`` at a time; returns the reason of each run that failed, by the run's name.

    The numbers of each are written below ``keep``, if given, as soon as it is done. A failure ends its own run only.
    However this function ends, no training stays behind.
    """
    waiting, failed = list(runs), {}
    active: dict[subprocess.Popen, tuple[Run, int]] = {}  # with the size of the console file before
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                process, before = start(run, lock)
                active[process] = run, before
                print(f"{run.name}: started, {len(waiting)} more to come ({run.folder / CONSOLE})", flush=True)
            for process, (run, before) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[process]
                if process.returncode or not (run.folder / RESULTS).is_file():
                    failed[run.name] = _last_words(run, before, process.returncode)
                elif keep is not None:
                    from scripts.experiments.kept import pack

                    try:
                        pack(run, keep)
                    except InputError as error:
                        failed[run.name] = str(error)
                print(f"{run.name}: {'failed: ' + failed[run.name] if run.name in failed else 'done'}", flush=True)
            if active:
                time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        _stop(list(active))
    return failed


def command(run: Run) -> list[str]:
    """The command line of a run."""
    if run.weights or run.state == UNTESTED:
        weights = run.weights or run.folder / BEST
        return [sys.executable, str(ROOT / "main_test.py"), "--load", str(weights), *run.flags]
    loaded = ["--load", str(run.start)] if run.start else []
    resume = ["--resume", "auto"] if run.state == CUT else []
    return [sys.executable, str(ROOT / "main_train.py"), *run.flags, *loaded, *resume]


def start(run: Run, lock: int) -> tuple[subprocess.Popen, int]:
    """Start a run; returns its process and the size in bytes that its console file had."""
    private_folder(run.folder)
    record = {"row": run.row.name, "seed": run.seed, "flags": list(run.flags), "settings": run.settings}
    write_results(run.folder / RECORD, record | ({START: file_sha256(run.start)} if run.start else {}))
    with open(os.open(run.folder / CONSOLE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as console:
        streams = {"stdin": subprocess.DEVNULL, "stdout": console, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command(run), **streams, pass_fds=[lock]), console.seek(0, os.SEEK_END)


def _last_words(run: Run, before: int, code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    lines = read_bytes(run.folder / CONSOLE, MAX_ANNOTATION)[before:].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors[-1:] or [line.strip() for line in lines if line.strip()][-1:] or [f"exit code {code}"])[0]


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    # A second Ctrl-C would leave the trainings behind.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)


def move_aside(runs: Sequence[Run]) -> None:
    """Rename the folders of ``runs``, to make them again; nothing is deleted."""
    for run in runs:
        number = 1
        while (aside := run.folder.with_name(f"{run.folder.name}.old{number}")).exists():
            number += 1
        run.folder.rename(aside)
        print(f"{run.name}: {run.folder} is now {aside}")


def states(runs: Sequence[Run], failed: Collection[str] = ()) -> str:
    """One line per run: its state and, where there is one, the reason."""
    width = max(len(run.name) for run in runs)
    lines = [(run, "failed" if run.name in failed else run.state) for run in runs]
    return "\n".join(
        f"{run.name:<{width}}  {state}" + (f": {run.reason}" if run.reason else "") for run, state in lines
    )
