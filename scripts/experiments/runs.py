"""Makes what the runs of a table need, and runs main_train.py for each, with one bar over all epochs."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modules.runtime.environment import ROOT, file_sha256
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder, write_results
from scripts.experiments.files import DataSet
from scripts.experiments.plan import BEST, CUT, RECORD, RESULTS, START, UNTESTED, Index, Run, fingerprint

if TYPE_CHECKING:
    from tqdm import tqdm

CONSOLE = "console.log"
LOCK = ".lock"
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 30  # for a checkpoint, when this script is stopped


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keep a second runner out of ``out``; the trainings inherit the lock and hold it where this process is killed."""
    with open(private_folder(out) / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"--out {out}: another run_experiments.py works there, or a training that it left "
                "behind; wait for it or stop it"
            ) from error
        yield file.fileno()


def prepare(datasets: Mapping[DataSet, Collection[str]]) -> None:
    """Make the files that are not there and that a script of ours can make, for each data set and its rows' models."""
    for dataset, models in datasets.items():
        for step in dataset.prepare:
            if Path(step.makes).exists() or (step.model and step.model not in models):
                continue
            print(f"{dataset.name}: making {step.makes}", flush=True)
            _call([str(ROOT / step.script), *step.arguments])


def mine(runs: Sequence[Run]) -> None:
    """Mine the hard negatives that ``runs`` share and that are not there yet, once each."""
    indices: dict[Path, Index] = {run.index.path: run.index for run in runs if run.index is not None}
    for path, index in indices.items():
        if path.is_file():
            continue
        print(f"mining hard negatives with {index.text_encoder} into {path}", flush=True)
        _call(
            [
                str(ROOT / "scripts" / "mine_hard_negatives.py"),
                "--ann_path",
                index.ann_path,
                "--dataset_name",
                index.dataset_name,
                "--text_encoder",
                index.text_encoder,
                "--top_k",
                str(index.top_k),
                "--examples",
                "0",
                "--out",
                str(path),
            ]
        )


def _call(command: Sequence[str]) -> None:
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code if code > 0 else 1)  # it has printed its error line


@dataclass
class _Active:
    run: Run
    process: subprocess.Popen
    before: int  # bytes of the console file that earlier attempts wrote
    epochs: int = 0  # that the bar has counted


def execute(runs: Sequence[Run], *, jobs: int, lock: int) -> dict[str, str]:
    """Run what is given, ``jobs`` at a time; returns the reason of each run that failed, by the run's name.

    A failure ends its run only. However this function is left, no training stays behind.
    """
    from tqdm import tqdm

    waiting, active, failed = list(runs), [], {}
    # A log file gets a line every half minute instead of two a second.
    bar = tqdm(
        total=sum(run.epochs for run in runs),
        desc="experiments",
        unit="epoch",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(_start(waiting.pop(0), lock))
            bar.set_postfix_str(", ".join(item.run.name for item in active), refresh=False)
            for item in list(active):
                _count(bar, item, _epochs(item.run))
                if item.process.poll() is None:
                    continue
                active.remove(item)
                _count(bar, item, item.run.epochs)  # stopped early, or failed: its other epochs will not come
                if item.process.returncode or not (item.run.folder / RESULTS).is_file():
                    failed[item.run.name] = _last_words(item)
                    tqdm.write(f"{item.run.name} failed: {failed[item.run.name]} ({item.run.folder / CONSOLE})")
            if active:
                time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        bar.close()
        _stop([item.process for item in active])
    return failed


def command(run: Run) -> list[str]:
    """The command line of a run."""
    if run.weights or run.state == UNTESTED:
        weights = run.weights or run.folder / BEST
        return [sys.executable, str(ROOT / "main_test.py"), "--load", str(weights), *run.flags]
    start = ["--load", str(run.start)] if run.start else []
    resume = ["--resume", "auto"] if run.state == CUT else []
    return [sys.executable, str(ROOT / "main_train.py"), *run.flags, *start, *resume]


def _start(run: Run, lock: int) -> _Active:
    private_folder(run.folder)
    write_results(
        run.folder / RECORD,
        {
            "row": run.row.name,
            "seed": run.seed,
            "hash": fingerprint(run.settings),
            "flags": list(run.flags),
            "settings": run.settings,
        }
        | ({START: file_sha256(run.start)} if run.start else {}),
    )
    with open(os.open(run.folder / CONSOLE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as console:
        before = console.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command(run), stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, pass_fds=[lock]
        )
    return _Active(run, process, before)


def _count(bar: "tqdm", item: _Active, epochs: int) -> None:
    bar.update(max(epochs - item.epochs, 0))
    item.epochs = max(epochs, item.epochs)


def _epochs(run: Run) -> int:
    """Epochs that a run has behind it."""
    try:
        return len(json.loads((run.folder / "history.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return 0


def _last_words(item: _Active) -> str:
    code = item.process.returncode
    lines = (item.run.folder / CONSOLE).read_bytes()[item.before :].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return (errors[-1:] or [last])[0] if code >= 0 else f"killed by signal {-code}"


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


def put_aside(runs: Sequence[Run]) -> None:
    """Rename the folders of ``runs`` so that they can be made anew; nothing is deleted."""
    for run in runs:
        number = 1
        while (aside := run.folder.with_name(f"{run.folder.name}.old{number}")).exists():
            number += 1
        run.folder.rename(aside)
        print(f"{run.name}: {run.folder} is now {aside}")


def states(runs: Sequence[Run], failed: Mapping[str, str]) -> str:
    """One line per run: its state and, where there is one, the reason."""
    width = max(len(run.name) for run in runs)
    return "\n".join(
        f"{run.name:<{width}}  {failed.get(run.name, run.state)}" + (f": {run.reason}" if run.reason else "")
        for run in runs
    )
