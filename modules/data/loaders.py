"""Batches read by other processes, which may be killed or hang without taking the run with them."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from modules.data.batches import collate
from modules.data.sample_order import EpochBatchSampler
from modules.runtime import distributed
from modules.runtime.errors import InputError

REPLACED_LIMIT = 0.01
SECONDS_BETWEEN_LOOKS = 1.0  # at how long none of the processes that read has answered
SECONDS_UNTIL_REAPED = 0.1
# torch's first loader would set a handler for good that raises wherever the main process is when a worker dies, be it
# in the middle of a step. torch has no switch for it; without the handler it looks every five seconds while it waits.
signal_handling._SIGCHLD_handler_set = True


class EpochLoader(DataLoader):
    """A DataLoader with ``set_epoch`` that ends within a minute, with one line, when a process that reads fails.

    A worker's InputError is raised in its own words. InputError too for a worker that was killed, for none that
    answers within ``patience`` seconds (0: wait for ever), and where the samples of the epoch that stand in for
    unreadable ones (``replaced``) are more than ``replaced_limit``, in one process or, at the end, in all together.
    """

    replaced = 0
    replaced_limit = REPLACED_LIMIT
    patience = 0.0
    _processes: Sequence[BaseProcess] = ()
    _waiting_since: float | None = None
    _hung = False

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """See EpochBatchSampler.set_epoch."""
        self.batch_sampler.set_epoch(epoch, seen)

    def __iter__(self):
        self.replaced = 0
        for batch in self._batches():
            if isinstance(batch, InputError):
                # A new one: raising what a local variable holds ties it to this frame, and the workers with it,
                # until the garbage collector comes by.
                raise InputError(str(batch))
            self.replaced += batch.replaced
            self._check_replaced()
            yield batch
        if self.batch_sampler.world_size > 1:
            self.replaced = int(distributed.all_reduce_sum(torch.tensor(self.replaced)))
            self._check_replaced()
        if self.replaced:
            logging.getLogger("ithn").warning(
                "%d of %d samples stood in for some with unreadable images",
                self.replaced,
                self.batch_sampler.num_samples,
            )

    def _check_replaced(self) -> None:
        total = self.batch_sampler.num_samples
        if self.replaced > self.replaced_limit * total:
            raise InputError(
                f"--on_bad_image skip: {self.replaced} of {total} samples of this epoch could not be read, "
                f"more than {self.replaced_limit:.0%}; check --image_dir and the files"
            )

    def close(self) -> None:
        """End the processes that read, whatever state they are in; the next iteration starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._hung = (), False
        self._iterator = None  # torch keeps persistent workers by it

    def _batches(self) -> Iterator[Any]:
        over = threading.Event()
        if self._iterator is None:  # only persistent workers outlive an epoch
            self._processes = ()
        kept = bool(self._processes)
        try:
            if kept:
                self._start_watch(over)
            iterator = self._guarded(self._started)  # a kept worker may have died since the epoch before
            if not kept:
                self._start_watch(over)
            while True:
                try:
                    batch = self._guarded(lambda: next(iterator))
                except StopIteration:
                    return
                yield batch
        finally:
            over.set()

    def _guarded(self, ask: Callable[[], Any]) -> Any:
        """``ask()``, with the failure of a worker explained."""
        try:
            return self._answer(ask)
        except (RuntimeError, OSError, EOFError) as error:
            raise self._explained(error) from None

    def _start_watch(self, over: threading.Event) -> None:
        if self._processes and self.patience:
            threading.Thread(target=self._watch, args=(over,), daemon=True).start()

    def _watch(self, over: threading.Event) -> None:
        """Kill the workers where none has answered for too long: a batch is not only awaited, but fetched from one of
        them, and no other end of that can be set.
        """
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self.patience:
                self._hung = True
                for process in self._processes:
                    process.kill()
                return

    def _answer(self, ask: Callable[[], Any]) -> Any:
        """``ask()``, broken off where a worker dies: half a message of it would be waited for without end."""
        if not self._processes or threading.current_thread() is not threading.main_thread():
            return ask()
        deaths = _Deaths(self._processes)
        before = signal.signal(signal.SIGCHLD, deaths.told)
        try:
            deaths.heard = True
            self._waiting_since = time.monotonic()
            deaths.told()
            return ask()
        finally:
            # First of all, and no call that a signal could break into: told of a second death, the handler would raise
            # here, and never be taken away.
            deaths.heard = False
            self._waiting_since = None
            signal.signal(signal.SIGCHLD, before)

    def _started(self) -> Iterator[Any]:
        iterator = super().__iter__()
        self._processes = getattr(iterator, "_workers", ())
        return iterator

    def _explained(self, error: Exception) -> Exception:
        """An InputError for a worker that is dead or hangs, else ``error`` itself; no worker is left."""
        if isinstance(error, (ConnectionError, EOFError)):
            for process in self._processes:  # its socket is gone a moment before it is
                process.join(0.2)
        dead, hung = next((process for process in self._processes if process.exitcode), None), self._hung
        self.close()
        if hung:
            return InputError(
                f"no data-loading process has answered for {self.patience:g} s: one hangs, or the storage of "
                "--image_dir does; give more time with --worker_timeout, or read in this process with --num_workers 0"
            )
        if dead is not None:
            return InputError(f"data-loading process {dead.pid} {_end(dead.exitcode)} (now {self.num_workers})")
        return error


class _Deaths:
    """A handler of SIGCHLD that raises ChildProcessError, while it is ``heard``, where one of ``processes`` failed."""

    __slots__ = ("heard", "_processes")  # a plain store, where DataLoader's own attributes go through a method

    def __init__(self, processes: Sequence[BaseProcess]) -> None:
        self.heard, self._processes = False, processes

    def told(self, _signal: int | None = None, interrupted: FrameType | None = None) -> None:
        if not self.heard:
            return
        if _reaps(interrupted):
            # Raised here, the exit code that the system has just given away, once, would be lost.
            again = threading.Timer(SECONDS_UNTIL_REAPED, signal.pthread_kill, (threading.get_ident(), signal.SIGCHLD))
            again.daemon = True
            again.start()
        elif any(process.exitcode for process in self._processes):
            raise ChildProcessError("a data-loading process has died")


def _reaps(frame: FrameType | None) -> bool:
    """Whether ``frame`` lies in multiprocessing's ``poll``, between asking for an exit code and keeping it."""
    while frame is not None:
        if frame.f_code.co_name == "poll" and frame.f_globals.get("__name__", "").startswith("multiprocessing.popen"):
            return True
        frame = frame.f_back
    return False


def _end(code: int) -> str:
    """How a process with this exit code came to its end, and what may help."""
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out: lower --batch_size or --num_workers"
    if code == -signal.SIGBUS:
        return "found no room in shared memory (/dev/shm): enlarge it (docker run --shm-size), or lower --num_workers"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _collate_or_report(samples):
    """Errors travel as values: raised in a worker they would come out wrapped in its traceback."""
    return samples[0] if isinstance(samples[0], InputError) else collate(samples)


def ignore_interrupt(_worker: int) -> None:
    """For worker processes: Ctrl-C reaches the whole group, and the main process decides what becomes of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool,
    num_workers: int = 0,
    seed: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    persistent_workers: bool = True,
    patience: float = 0.0,
    lengths: Sequence[int] | None = None,
    shards: Sequence[Sequence[int]] | None = None,
) -> EpochLoader:
    """Loader of Batches in an order keyed by (``seed``, epoch); ``prefetch_factor`` counts batches per worker.

    ``lengths`` (one per sample) has samples of like length batched together, ``shards`` (the samples of each file)
    those that lie together read together; see EpochBatchSampler.
    """
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, rank, world_size, drop_last, lengths, shards)
    loader = EpochLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate_or_report,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        worker_init_fn=ignore_interrupt,
        # Its own generator: starting an epoch would otherwise draw from the global one and change what follows.
        generator=torch.Generator(),
    )
    loader.patience = patience
    return loader
