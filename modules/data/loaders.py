"""DataLoader that turns a dead or hung worker into a one-line error."""

import copy
import itertools
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from modules.data.batches import collate
from modules.data.sample_order import EpochBatchSampler
from modules.runtime import distributed
from modules.runtime.errors import InputError

REPLACED_LIMIT = 0.01
SECONDS_BETWEEN_LOOKS = 0.2  # at the workers, while none of them answers
_END = object()


class GuardedLoader:
    """torch's DataLoader, made of ``dataset`` and its ``options``; a dead or hung worker is an InputError of one line.

    torch is asked for each batch in a thread, and this one waits for the thread. A wait inside torch may never end: for
    the rest of a message whose sender was killed, or for a worker that hangs. A thread can be left waiting. In a thread
    torch also leaves SIGCHLD alone: its handler would raise wherever the main thread is when a worker dies, such as in
    the middle of a step. ``timeout``: seconds without an answer after which the workers count as hung; 0: never.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_workers: int = 0,
        timeout: float = 0.0,
        persistent_workers: bool = False,
        **options: Any,
    ):
        self.dataset, self.num_workers, self.timeout = dataset, num_workers, timeout
        self._persistent = persistent_workers and num_workers > 0
        # A generator of its own: starting an epoch would otherwise draw from the global one and change what follows.
        self._options = {"generator": torch.Generator(), "worker_init_fn": _ignore_interrupt, **options}
        self._loader: DataLoader | None = None
        self._started: list[BaseProcess] = []

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch. InputError for a worker that was killed, and for none that answers in time."""
        if self._loader is None:
            self._loader = DataLoader(
                self.dataset,
                num_workers=self.num_workers,
                persistent_workers=self._persistent,
                multiprocessing_context=_recording_context(self._started) if self.num_workers else None,
                **self._options,
            )
        if not self.num_workers:
            yield from self._loader
            return
        requests, answers = queue.SimpleQueue(), queue.SimpleQueue()
        # torch pins memory by the GPU of the thread that asks for the first batch.
        gpu = torch.cuda.current_device() if self._options.get("pin_memory") and torch.cuda.is_available() else None
        threading.Thread(target=_serve, args=(self._loader, gpu, requests, answers), daemon=True).start()
        keep = False  # the workers, where this generator is left
        try:
            while True:
                requests.put(True)
                batch = self._wait(answers)
                keep = self._persistent
                if batch is _END:
                    return
                yield batch
                keep = False
        finally:
            requests.put(False)
            if not keep:
                self.close()

    def close(self) -> None:
        """End the workers, whatever state they are in; the next iteration starts new ones."""
        for process in self.workers:
            process.kill()
        for process in self.workers:
            process.join()
        self._started.clear()
        self._loader = None  # torch keeps persistent workers by it

    @property
    def workers(self) -> list[BaseProcess]:
        """The processes that read; some may have ended."""
        return [process for process in self._started if process.pid is not None]

    def _wait(self, answers: queue.SimpleQueue) -> Any:
        """The thread's next answer; its error, or what became of the workers, is raised."""
        waited = 0.0
        while True:
            since = time.monotonic()
            try:
                answer = answers.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                self._require_life()
                # A job that is stopped as a whole (SIGSTOP, a suspended machine) does not count as hanging.
                waited += min(time.monotonic() - since, 2 * SECONDS_BETWEEN_LOOKS)
                if self.timeout and waited > self.timeout:
                    raise InputError(
                        f"no data-loading process has answered for {self.timeout:g} s: one hangs, or the storage of "
                        "--image_dir does; give more time with --worker_timeout, or read in this process with "
                        "--num_workers 0"
                    ) from None
                continue
            if not isinstance(answer, Exception):
                return answer
            if isinstance(answer, (OSError, EOFError)):
                for process in self.workers:  # its socket is gone a moment before it is
                    process.join(0.2)
            self._require_life()
            raise answer

    def _require_life(self) -> None:
        """InputError where a worker ended badly."""
        for process in self.workers:
            if process.exitcode:
                reason = _end(process.exitcode)
                raise InputError(f"data-loading process {process.pid} {reason} (now {self.num_workers})") from None


class EpochLoader(GuardedLoader):
    """GuardedLoader of Batches with ``set_epoch``; a worker's InputError is raised in its own words.

    InputError too where more of an epoch's samples than ``replaced_limit`` (a share) replace unreadable ones, in one
    process or, at the end, in all together; ``replaced`` counts them.
    """

    replaced = 0
    replaced_limit = REPLACED_LIMIT

    def __init__(self, dataset: Dataset, batch_sampler: EpochBatchSampler, **options: Any):
        super().__init__(dataset, batch_sampler=batch_sampler, collate_fn=_collate_or_report, **options)
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """See EpochBatchSampler.set_epoch."""
        self.batch_sampler.set_epoch(epoch, seen)

    def __iter__(self) -> Iterator[Any]:
        self.replaced = 0
        for batch in super().__iter__():
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
                "%d of %d samples replaced some with unreadable images", self.replaced, self.batch_sampler.num_samples
            )

    def _check_replaced(self) -> None:
        total = self.batch_sampler.num_samples
        if self.replaced > self.replaced_limit * total:
            raise InputError(
                f"--on_bad_image skip: {self.replaced} of {total} samples of this epoch could not be read, "
                f"more than {self.replaced_limit:.0%}; check --image_dir and the files"
            )


class LimitedLoader:
    """The first ``count`` batches of ``loader`` at each iteration."""

    def __init__(self, loader: EpochLoader, count: int):
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), self.count)


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
    timeout: float = 0.0,
    lengths: Sequence[int] | None = None,
    shards: Sequence[Sequence[int]] | None = None,
) -> EpochLoader:
    """Loader of Batches in an order keyed by (``seed``, epoch); ``prefetch_factor`` counts batches per worker.

    ``lengths`` (one per sample) has samples of similar length batched together, ``shards`` (the samples of each shard)
    samples of one shard read together; see EpochBatchSampler. ``timeout``: see GuardedLoader.
    """
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, rank, world_size, drop_last, lengths, shards)
    return EpochLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        timeout=timeout,
        persistent_workers=persistent_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
    )


def _serve(loader: DataLoader, gpu: int | None, requests: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Answer each request with the next batch of an epoch, with _END behind the last one, or with the error."""
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        batches = iter(loader)
        while requests.get():
            answers.put(next(batches, _END))
    except Exception as error:
        answers.put(error)


def _recording_context(started: list[BaseProcess]) -> BaseContext:
    """The usual way to make processes, adding each to ``started``: DataLoader does not hand out its workers."""
    context = copy.copy(multiprocessing.get_context())
    make = context.Process

    def make_and_record(*arguments: Any, **keywords: Any) -> BaseProcess:
        started.append(make(*arguments, **keywords))
        return started[-1]

    context.Process = make_and_record
    return context


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


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group, and the main process decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
