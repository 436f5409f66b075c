"""Processes that read data and fail: one line, soon, and none of them is left."""

import multiprocessing
import os
import queue
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

from modules.data import loaders
from modules.data.loaders import GuardedLoader, LimitedLoader, build_loader
from modules.runtime.errors import InputError
from modules.runtime.stopping import get_awake

OTHERS = set()  # processes that other tests keep


@pytest.fixture(autouse=True)
def others():
    OTHERS.clear()
    OTHERS.update(multiprocessing.active_children())


def new_children():
    return set(multiprocessing.active_children()) - OTHERS


def end_soon():
    """Whether the new children end within seconds: torch does not wait for one that it had to terminate."""
    deadline = time.monotonic() + 10
    while new_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not new_children()


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


def made(act, monkeypatch, *, at=5, timeout=30.0, **changes):
    monkeypatch.setattr(loaders, "_collate_or_report", Numbered)
    return build_loader(Numbers(at, act), 2, shuffle=False, num_workers=2, timeout=timeout, **changes)


def kill_self(number):
    os.kill(os.getpid(), number)


def kill_and_wait(processes, number=signal.SIGKILL):
    for process in processes:
        os.kill(process.pid, number)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


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


def test_workers_that_die_at_once_are_named(monkeypatch):
    """Before torch hands out the first batch, and so before it is known who started."""
    assert_ends(made(lambda: kill_self(signal.SIGKILL), monkeypatch, at=slice(0, 12)), "was killed")


@pytest.mark.parametrize("act", [lambda: kill_self(signal.SIGSTOP), lambda: time.sleep(600)], ids=["stopped", "hangs"])
def test_a_worker_that_stalls_is_waited_for_no_longer_than_asked(monkeypatch, act):
    assert_ends(made(act, monkeypatch, timeout=2.0), "no data-loading process has answered for 2 s.*--worker_timeout")


class Jumping:
    """A clock that goes ahead by an hour at its third look, as where a whole job was stopped."""

    def __init__(self):
        self.looks = 0

    def monotonic(self):
        self.looks += 1
        return time.monotonic() + (3600 if self.looks > 2 else 0)


def test_a_job_that_was_stopped_as_a_whole_goes_on(monkeypatch):
    clock = Jumping()
    monkeypatch.setattr(loaders, "time", clock)
    loader = made(lambda: time.sleep(1.0), monkeypatch, timeout=20.0)
    loader.set_epoch(1)
    assert sum(len(batch) for batch in loader) == 12 and clock.looks > 3
    answers, clock.looks = queue.SimpleQueue(), 0
    monkeypatch.setattr("modules.runtime.stopping.time", clock)
    threading.Timer(1.0, answers.put, ("answer",)).start()
    assert get_awake(answers, 20.0) == "answer" and clock.looks > 3
    with pytest.raises(queue.Empty):
        get_awake(answers, 0.3)


class Long(Dataset):
    """Items that are longer than what a pipe takes in at once."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return bytes(2**20)


def test_a_worker_that_dies_in_the_middle_of_a_message_is_named():
    """The rest of it never comes, and this process keeps the pipe open: reading it ends neither in time nor ever."""
    loader = GuardedLoader(Long(), num_workers=1, batch_size=None, prefetch_factor=4)
    batches = iter(loader)
    assert len(next(batches)) == 2**20
    time.sleep(1.0)  # the next message fills the pipe, and waits for a reader
    kill_and_wait(loader.workers)
    with pytest.raises(InputError, match="was killed"):
        list(batches)
    assert not new_children()


def test_a_worker_that_stalls_while_a_batch_is_fetched_from_it_is_not_waited_for(monkeypatch):
    """What it has read is announced already, and the tensors are still to be asked for."""
    loader = made(lambda: None, monkeypatch)
    batches = iter(loader)
    next(batches)
    loader.timeout = 1.0
    time.sleep(0.5)
    for process in loader.workers:
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match="no data-loading process has answered for 1 s"):
        list(batches)
    assert not new_children()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was killed"), (signal.SIGSTOP, "no data-loading process has answered for 2 s")],
)
def test_a_worker_that_fails_between_two_epochs_is_named_and_replaced(monkeypatch, number, reason):
    """They are kept from one epoch to the next, and asked again before the first batch."""
    loader = made(lambda: None, monkeypatch)
    assert len(list(loader)) == 6
    before = new_children()
    loader.timeout = 2.0
    for process in loader.workers:
        os.kill(process.pid, number)
    with pytest.raises(InputError, match=reason):
        list(loader)
    assert not new_children()
    loader.timeout = 30.0
    assert len(list(loader)) == 6 and len(new_children() - before) == 2
    loader.close()


def test_workers_are_kept_between_epochs_or_end_with_theirs(monkeypatch):
    for persistent in (True, False):
        loader = made(lambda: None, monkeypatch, persistent_workers=persistent)
        assert len(list(loader)) == 6
        kept = new_children()
        assert len(kept) == (2 if persistent else 0)
        assert len(list(loader)) == 6 and new_children() == kept
        loader.close()


@pytest.mark.parametrize("persistent", [True, False])
def test_an_epoch_may_be_left_early(monkeypatch, persistent):
    loader = made(lambda: None, monkeypatch, persistent_workers=persistent)
    for _ in range(2):
        assert [int(number) for batch in LimitedLoader(loader, 2) for number in batch] == [0, 1, 2, 3]
        assert len(new_children()) == 2 if persistent else end_soon()
    assert len(list(loader)) == 6
    loader.close()
    assert end_soon()


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
    assert not new_children()


def test_no_death_breaks_into_a_step(monkeypatch):
    """torch sets a handler that would raise wherever the main thread is, if that thread asks for batches."""
    loader = made(lambda: None, monkeypatch)
    batches = iter(loader)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    kill_and_wait(loader.workers)
    time.sleep(0.1)
    with pytest.raises(InputError, match="was killed"):
        list(batches)
