"""SIGTERM and SIGINT wherever they meet a training: what was reached is saved, and no process is left behind."""

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from modules.evaluation import tester
from modules.runtime.errors import run_entry_point
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.checkpoint import load_checkpoint
from modules.training.checkpoint_folder import CURRENT, CheckpointFolder
from modules.training.trainer import Trainer
from tests.conftest import TINY

MAIN = Path(__file__).resolve().parents[2] / "main_train.py"


def forked(work) -> int:
    """The exit code of ``work`` in a process group of its own, of which nothing may be left; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        try:
            run_entry_point(work)
        except SystemExit as left:
            # What the interpreter does at its end, without pytest's own.
            import multiprocessing.util

            multiprocessing.util._exit_function()
            os._exit(left.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # not on into the other tests, in a second process
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert_nothing_left(pid)
    return code


def assert_nothing_left(group: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def send(number: int) -> None:
    """Have this process get a signal."""
    os.kill(os.getpid(), number)


# ---- the requests themselves


def test_a_signal_ends_the_block_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with pytest.raises(Stopped) as stopped, GracefulShutdown():
            send(number)
            pytest.fail("the signal was not raised")
        assert stopped.value.code == code
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_deferred_block_runs_to_its_end():
    reached = []
    with pytest.raises(Stopped), GracefulShutdown() as shutdown:
        with shutdown.deferred():
            send(signal.SIGTERM)
            reached.append("inside")
        reached.append("behind")
    assert reached == ["inside"]


def test_further_sigterms_change_nothing():
    with GracefulShutdown() as shutdown:
        with pytest.raises(Stopped), shutdown.deferred():
            send(signal.SIGTERM)
        shutdown.accept()
        send(signal.SIGTERM)
        with shutdown.deferred():
            send(signal.SIGTERM)


def test_an_exception_that_a_destructor_swallowed_is_raised_again(monkeypatch):
    class Swallows:
        def __del__(self):
            send(signal.SIGTERM)

    monkeypatch.setattr("modules.runtime.stopping.SECONDS_TO_TRY_AGAIN", 0.5)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(Stopped), GracefulShutdown():
        Swallows()
        time.sleep(30)
        pytest.fail("the signal was lost")


def test_a_second_sigint_leaves_at_once_even_where_the_first_must_wait():
    def work():
        with GracefulShutdown() as shutdown, shutdown.deferred():
            send(signal.SIGINT)
            send(signal.SIGINT)
            time.sleep(30)

    assert forked(work) == 130


# ---- a training


@pytest.fixture
def training(demo, tmp_path, monkeypatch):
    """``training(*flags)`` is main_train.py's exit code; the folder is ``training.folder``."""
    monkeypatch.setattr("modules.run.training.training_curves", lambda history: b"")

    def run(*flags):
        argv = [
            "--ann_path",
            demo / "annotation.json",
            "--image_dir",
            demo / "images",
            "--save_dir",
            tmp_path / "run",
            "--record_dir",
            tmp_path / "records",
            *TINY,
            "--visual_extractor",
            "test_efficientnet",
            "--epochs",
            3,
            "--batch_size",
            2,
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["main_train.py", *map(str, argv)])
        return forked(runpy.run_path(str(MAIN))["main"])

    run.folder = tmp_path / "run"
    return run


def position(folder):
    return load_checkpoint(folder / CURRENT)["position"]


def after_calls(number, original, then):
    """``original``, and at its ``number``-th call ``then`` before it."""
    calls = []

    def call(*arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            then()
        return original(*arguments, **keywords)

    return call


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_in_a_step_the_step_is_finished_and_saved(training, monkeypatch, number, code):
    monkeypatch.setattr(Trainer, "_update", after_calls(9, Trainer._update, lambda: send(number)))
    assert training() == code
    assert position(training.folder)["total_steps"] == 9
    log = (training.folder / "train.log").read_text()
    assert f"{signal.Signals(number).name}: stopped in epoch 2 after step 2 of it" in log
    assert f"continue with --resume auto --save_dir {training.folder}" in log


def test_while_waiting_for_data_the_processes_that_read_end_too(training, monkeypatch):
    def hang(self, key):
        if torch.utils.data.get_worker_info().id == 1:  # the last one to be started
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("modules.data.datasets.ReportDataset.__getitem__", hang)
    assert training("--num_workers", 2) == 143
    assert position(training.folder)["total_steps"] == 0


def test_in_the_middle_of_a_beam_nothing_waits_for_its_end(training, monkeypatch):
    def hang():
        send(signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("models.r2gencmn.R2GenCMN.generate", lambda *_, **__: hang())
    assert training() == 143
    assert position(training.folder)["trained"]
    assert training("--resume", "auto") == 143  # it begins with the validation


def test_java_does_not_outlive_a_signal(training, monkeypatch, tmp_path):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nread line\nkill -INT $PPID\nexec sleep 60\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{java.parent}:{os.environ['PATH']}")
    assert training("--meteor", "true") == 130
    assert position(training.folder)["trained"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_in_the_test_everything_is_saved_already(training, monkeypatch):
    monkeypatch.setattr(tester.Tester, "predict", after_calls(2, tester.Tester.predict, lambda: send(signal.SIGTERM)))
    assert training("--epochs", 1) == 143
    saved = load_checkpoint(training.folder / CURRENT)
    assert saved["epoch"] == 1 and saved["best"]["epoch"] == 1


def test_a_second_sigint_in_a_save_leaves_the_last_checkpoint(training, monkeypatch):
    def twice():
        send(signal.SIGINT)
        send(signal.SIGINT)

    monkeypatch.setattr(CheckpointFolder, "_put", after_calls(2, CheckpointFolder._put, twice))
    assert training("--checkpoint_steps", 2) == 130
    assert position(training.folder)["total_steps"] == 2
    assert list(training.folder.glob(".*.tmp"))
    folder = CheckpointFolder(training.folder)
    folder.sweep()
    assert not list(training.folder.glob(".*.tmp")) and folder.newest_valid()[0].name == CURRENT


@pytest.mark.thorough
def test_the_program_itself_stops_and_goes_on(demo, tmp_path):
    """As a cluster does it: SIGTERM for every process of the group."""
    command = [
        sys.executable,
        str(MAIN),
        "--ann_path",
        str(demo / "annotation.json"),
        "--image_dir",
        str(demo / "images"),
        "--epochs",
        "200",
        "--save_dir",
        str(tmp_path / "run"),
        "--record_dir",
        str(tmp_path / "records"),
        *TINY,
        "--visual_extractor",
        "test_efficientnet",
        "--num_workers",
        "2",
        "--log_period",
        "1",
        "--resume",
        "auto",
    ]
    for _ in range(2):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "step 1: " in line:
                break
        os.killpg(process.pid, signal.SIGTERM)
        seen.append(process.stdout.read())
        assert process.wait(timeout=60) == 143, "".join(seen)
        assert_nothing_left(process.pid)
        assert "Traceback" not in "".join(seen)
    assert "resuming from" in "".join(seen)
    assert CheckpointFolder(tmp_path / "run").newest_valid()[0].name == CURRENT
