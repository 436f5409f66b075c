"""Processes that read data and fail: one line, soon, and none of them is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from modules.data import loaders
from modules.data.loaders import build_loader
from modules.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
OTHERS = set()  # processes that other tests keep


@pytest.fixture(autouse=True)
def others():
    OTHERS.clear()
    OTHERS.update(multiprocessing.active_children())


def new_children():
    return set(multiprocessing.active_children()) - OTHERS


class Numbers(Dataset):
    """``act`` is what happens where sample ``at``, or one of a range, is read."""

    def __init__(self, at, act):
        self.at, self.act = range(12)[at] if isinstance(at, slice) else [at], act

    def __len__(self):
        return 12

    def __getitem__(self, key):
        if key[1] in self.at:
            self.act()
        return torch.tensor(key[1])


class Numbered(list):
    replaced = 0


def made(act, monkeypatch, *, at=5, patience=30.0, **changes):
    monkeypatch.setattr(loaders, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(loaders, "_collate_or_report", Numbered)
    return build_loader(Numbers(at, act), 2, shuffle=False, num_workers=2, patience=patience, **changes)


def kill_self(number):
    os.kill(os.getpid(), number)


def assert_ends(loader, reason):
    read = []
    with pytest.raises(InputError, match=reason) as error:
        for batch in loader:
            read += batch
    assert "\n" not in str(error.value)
    # What the dead process had read and not yet handed over is lost with it; nothing is skipped.
    assert [int(number) for number in read] == list(range(len(read))) and len(read) <= 4
    assert not new_children()


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, r"process \d+ was killed, .* memory runs out: lower --batch_size or --num_workers \(now 2\)"),
        (signal.SIGBUS, r"no room in shared memory \(/dev/shm\)"),
        (signal.SIGUSR1, "ended by SIGUSR1"),
    ],
)
def test_a_worker_that_is_killed_is_named(monkeypatch, number, reason, persistent):
    loader = made(lambda: kill_self(number), monkeypatch, persistent_workers=persistent)
    assert_ends(loader, reason)


def test_a_worker_that_exits_is_named(monkeypatch):
    assert_ends(made(lambda: os._exit(3), monkeypatch), "ended with exit code 3")


@pytest.mark.parametrize("act", [lambda: kill_self(signal.SIGSTOP), lambda: time.sleep(600)], ids=["stopped", "hangs"])
def test_a_worker_that_stalls_is_waited_for_no_longer_than_asked(monkeypatch, act):
    assert_ends(made(act, monkeypatch, patience=2.0), "no data-loading process has answered for 2 s.*--worker_timeout")


def test_two_deaths_at_once_lose_no_exit_code(monkeypatch):
    """The second one is told while the first one's exit code, given once, is on its way."""
    loader = made(lambda: None, monkeypatch)
    batches, ask = iter(loader), os.waitpid
    next(batches)

    def told_of_another(pid, flags):
        answer = ask(pid, flags)
        if answer[0]:
            signal.raise_signal(signal.SIGCHLD)
        return answer

    monkeypatch.setattr(os, "waitpid", told_of_another)
    for process in loader._processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in loader._processes:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(InputError, match="was killed"):
        list(batches)
    assert not new_children()


def test_a_death_that_is_told_while_another_exit_code_is_asked_for_is_seen_soon(monkeypatch):
    """Nothing else would end a wait for the rest of the dead one's message."""
    loader = made(lambda: None, monkeypatch, patience=0.0)
    batches, ask, killed = iter(loader), os.waitpid, []
    next(batches)
    first, second = loader._processes

    def told_of_the_other(pid, flags):
        if not killed:
            killed.append(second)
            os.kill(second.pid, signal.SIGKILL)
            os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)
        return ask(pid, flags)

    def wait_on():
        monkeypatch.setattr(os, "waitpid", told_of_the_other)
        assert first.exitcode is None and killed
        time.sleep(20)

    with pytest.raises(ChildProcessError):
        loader._answer(wait_on)
    loader.close()
    assert not new_children()


def test_a_death_that_is_told_while_the_handler_is_taken_away_is_no_second_error(monkeypatch):
    """Left in its place, it would raise in the middle of whatever the process does when its next child ends."""
    loader = made(lambda: None, monkeypatch)
    batches, set_handler, told = iter(loader), signal.signal, []
    next(batches)

    def tell(name):
        told.append(name)
        signal.raise_signal(signal.SIGCHLD)

    class Told(type(loader)):
        """Told wherever an attribute is stored, which torch's loaders do in a method."""

        def __setattr__(self, name, value):
            if not value:
                tell(name)
            super().__setattr__(name, value)

    def told_before(number, handler):
        if handler == signal.SIG_DFL:
            tell("signal")
        return set_handler(number, handler)

    for process in loader._processes:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    loader.__class__ = Told
    monkeypatch.setattr(signal, "signal", told_before)
    with pytest.raises(InputError, match="was killed"):
        list(batches)
    assert {"_waiting_since", "signal"} <= set(told) and signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_a_death_before_the_first_batch_is_asked_for_is_named(monkeypatch):
    """torch hands the first batches out before it says which processes it has started."""
    start = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._reset

    def slowly(iterator, *arguments, **keywords):
        start(iterator, *arguments, **keywords)
        for process in iterator._workers:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_reset", slowly)
    assert_ends(made(lambda: kill_self(signal.SIGKILL), monkeypatch, at=slice(0, 12)), "was killed")


def test_another_loader_of_the_process_leaves_no_handler():
    """torch sets its own with the first loader of a process."""
    program = (
        "import signal, modules.data.loaders\nfrom torch.utils.data import DataLoader\n"
        "print(len(list(DataLoader(range(4), num_workers=1))), signal.getsignal(signal.SIGCHLD).name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "4 SIG_DFL\n", done.stderr


def test_a_worker_that_stalls_while_a_batch_is_fetched_from_it_is_not_waited_for(monkeypatch):
    """What it has read is announced already, and the tensors are still to be asked for."""
    loader = made(lambda: None, monkeypatch)
    batches = iter(loader)
    next(batches)
    loader.patience = 1.0
    time.sleep(0.5)
    for process in loader._processes:
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match="no data-loading process has answered for 1 s"):
        list(batches)
    assert not new_children()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was killed"), (signal.SIGSTOP, "no data-loading process has answered for 2 s")],
)
def test_a_worker_that_fails_between_two_epochs_is_named_and_replaced(monkeypatch, number, reason):
    """They are kept from one epoch to the next, and asked anew before the first batch."""
    loader = made(lambda: None, monkeypatch)
    assert len(list(loader)) == 6
    loader.patience = 2.0
    for process in loader._processes:
        os.kill(process.pid, number)
    with pytest.raises(InputError, match=reason):
        list(loader)
    assert not new_children()
    loader.patience = 30.0
    assert len(list(loader)) == 6
    loader.close()


def test_workers_that_end_with_their_epoch_are_no_failure(monkeypatch):
    loader = made(lambda: None, monkeypatch, persistent_workers=False)
    assert [len(list(loader)) for _ in range(2)] == [6, 6]


def test_a_slow_worker_is_waited_for(monkeypatch):
    loader = made(lambda: time.sleep(2.5), monkeypatch)
    assert [int(number) for batch in loader for number in batch] == list(range(12))
    loader.close()


def test_a_loader_works_again_after_a_failure(monkeypatch, tmp_path):
    def die_once():
        if not (tmp_path / "dead").exists():
            (tmp_path / "dead").touch()
            kill_self(signal.SIGKILL)

    loader = made(die_once, monkeypatch)
    assert_ends(loader, "was killed")
    assert len([number for batch in loader for number in batch]) == 12
    loader.close()


def test_an_error_of_the_code_keeps_its_traceback(monkeypatch):
    def wrong():
        raise RuntimeError("a bug")

    loader = made(wrong, monkeypatch)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*a bug"):
        list(loader)


def test_no_death_breaks_into_a_step(monkeypatch):
    """torch's own handler would raise wherever the main process happens to be."""
    loader = made(lambda: None, monkeypatch)
    batches = iter(loader)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    loader._processes[0].kill()
    loader._processes[0].join()
    time.sleep(0.1)
    with pytest.raises(InputError, match="was killed"):
        list(batches)
