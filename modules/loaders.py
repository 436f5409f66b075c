"""Which samples come when: an order keyed by seed and epoch, shared out over processes, resumable at any batch."""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from modules import distributed
from modules.batches import collate
from modules.errors import InputError

REPLACED_LIMIT = 0.01
SECONDS_BETWEEN_LOOKS = 5  # at whether the processes that read are still alive, while none of them answers
# Batches that are sorted by length together: enough to make their lengths alike, few enough to be others next epoch.
BATCHES_PER_BUCKETING = 50
LANES = 8  # shards that are read by turns: that many are held at a time
# What a key is for, so that order, crops and neighbours are drawn independently of one another.
ORDER, AUGMENT_POSITIVE, AUGMENT_NEGATIVE, NEIGHBOUR, REPLACEMENT = range(5)


def keyed_generator(*key: int) -> torch.Generator:
    """A generator that depends on ``key`` alone, not on what was drawn before or in which process."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class EpochBatchSampler(Sampler):
    """Batches of (epoch, index): the index reaches the workers together with the epoch that keys its augmentation.

    In training every process gets the same number of batches of the same sizes, its slices of the batches that one
    process with ``world_size * batch_size`` would see; where the last one cannot be shared out evenly, up to
    ``world_size`` - 1 samples are left out of that epoch. In evaluation (``shuffle`` off) every sample comes exactly
    once, on one process: the batches are those of one process, shared out in turn, because a report must not depend
    on which others it was generated with, and the last digits of a matrix product do.

    With ``lengths``, one number per sample, a training batch holds samples of like length. An epoch has the same
    samples in as many batches of the same sizes as without, and so have the processes.

    With ``shards``, the samples of each file that images stand in, an epoch reads every file once, in a changing
    order: consecutive batches (of one process) come from LANES files by turns, wherever an epoch begins, and with
    processes that divide LANES each reads its own files. In evaluation it reads one file after another.
    """

    def __init__(self, num_samples: int, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0,
                 world_size: int = 1, drop_last: bool = False, lengths: Sequence[int] | None = None,
                 shards: Sequence[Sequence[int]] | None = None):  # fmt: skip
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.shards = None if shards is None else [torch.as_tensor(shard) for shard in shards]
        self.epoch = self.seen = 0

    def set_epoch(self, epoch: int, seen: int = 0) -> None:
        """Epoch of the next iteration; in training it begins behind the first ``seen`` samples, those of all processes.

        So it goes on where another number of processes or another batch size left off.
        """
        self.epoch, self.seen = epoch, seen

    def __len__(self) -> int:
        """Batches of a whole epoch on this process, wherever it starts."""
        if not self.shuffle:
            batches = -(-self.num_samples // self.batch_size)
            return len(range(self.rank, batches, self.world_size))
        whole, rest = divmod(self.num_samples, self.batch_size * self.world_size)
        return whole + (rest >= self.world_size and not self.drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, size, together = self.epoch, self.batch_size, self.batch_size * self.world_size
        if not self.shuffle:
            order = range(self.num_samples) if self.shards is None else torch.cat(self.shards).tolist()
            for first in range(self.rank * size, self.num_samples, together):
                yield [(epoch, index) for index in order[first : first + size]]
            return
        generator = keyed_generator(self.seed, epoch, ORDER)
        if self.shards is None:
            order = torch.randperm(self.num_samples, generator=generator)
        else:
            order = self._by_shard(generator)
        if self.lengths is not None:
            order = self._bucketed(order, generator)
        order = order.tolist()
        for first in range(self.seen, self.num_samples, together):
            share = len(order[first : first + together]) // self.world_size
            if share == 0 or (self.drop_last and share < size):
                return
            yield [(epoch, index) for index in order[first + self.rank * share :][:share]]

    def _by_shard(self, generator: torch.Generator) -> Tensor:
        """Order (num_samples,) in which batch b of one process comes from lane b modulo LANES.

        Files and the samples in each are shuffled, laid end to end and cut into LANES equal lanes of whole batches;
        what is left over of all lanes comes last.
        """
        order = [self.shards[i] for i in torch.randperm(len(self.shards), generator=generator).tolist()]
        order = torch.cat([shard[torch.randperm(len(shard), generator=generator)] for shard in order])
        rows, size = self.num_samples // LANES // self.batch_size, self.batch_size
        lanes = order[: LANES * (self.num_samples // LANES)].view(LANES, -1)
        whole = lanes[:, : rows * size].reshape(LANES, rows, size).transpose(0, 1)
        return torch.cat([whole.flatten(), lanes[:, rows * size :].flatten(), order[lanes.numel() :]])

    def _bucketed(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """``order`` (num_samples,) with its whole batches (of all processes) made up anew by length.

        Samples that fill no whole batch stay last, so that chance and not length leaves them out where some are.
        """
        together = self.batch_size * self.world_size
        whole, rest = order.split([len(order) // together * together, len(order) % together])
        sort = [part[self.lengths[part].argsort(stable=True)] for part in whole.split(BATCHES_PER_BUCKETING * together)]
        batches = torch.cat(sort).view(len(whole) // together, together)
        return torch.cat([batches[torch.randperm(len(batches), generator=generator)].flatten(), rest])


class EpochLoader(DataLoader):
    """A DataLoader with ``set_epoch`` that ends within a minute, with one line, when a process that reads fails.

    A worker's InputError is raised in its own words. InputError too for a worker that was killed, for none that
    answers within ``patience`` seconds (0: wait for ever), and where the samples of the epoch that stand in for
    unreadable ones (``replaced``) are more than REPLACED_LIMIT, in one process or, at the end, in all together.
    """

    replaced = 0
    patience = 0.0
    _processes: Sequence[BaseProcess] = ()

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
            logging.getLogger("ithn").warning("%d of %d samples stood in for some with unreadable images",
                                              self.replaced, self.batch_sampler.num_samples)

    def _check_replaced(self) -> None:
        total = self.batch_sampler.num_samples
        if self.replaced > REPLACED_LIMIT * total:
            raise InputError(
                f"--on_bad_image skip: {self.replaced} of {total} samples of this epoch could not be read, "
                f"more than {REPLACED_LIMIT:.0%}; check --image_dir and the files"
            )

    def close(self) -> None:
        """End the processes that read, whatever state they are in; the next iteration starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = ()
        self._iterator = None  # torch keeps persistent workers by it

    def _batches(self) -> Iterator[Any]:
        iterator = self._started()
        waiting_since = time.monotonic()
        while True:
            try:
                batch = self._next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                self._explain(error)
                if self.patience and time.monotonic() - waiting_since > self.patience:
                    self.close()
                    raise InputError(
                        f"no data-loading process has answered for {self.patience:g} s: one hangs, or the storage of "
                        "--image_dir does; give more time with --worker_timeout, or read in this process with "
                        "--num_workers 0") from None
                continue
            yield batch
            waiting_since = time.monotonic()

    def _next(self, iterator: Iterator[Any]) -> Any:
        """``next(iterator)``, broken off where a worker dies: half a message of it would be waited for without end."""
        if not self._processes or threading.current_thread() is not threading.main_thread():
            return next(iterator)
        before = signal.signal(signal.SIGCHLD, self._look_for_dead)
        try:
            self._look_for_dead()
            return next(iterator)
        finally:
            signal.signal(signal.SIGCHLD, before)

    def _look_for_dead(self, *_) -> None:
        if any(process.exitcode for process in self._processes):
            raise ChildProcessError("a data-loading process has died")

    def _started(self) -> Iterator[Any]:
        """The iterator of torch, without the handler by which it would raise in the middle of a step."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD)
        iterator = super().__iter__()
        if main and self.num_workers:
            signal.signal(signal.SIGCHLD, before)
        self._processes = getattr(iterator, "_workers", ())
        return iterator

    def _explain(self, error: Exception) -> None:
        """InputError for a dead worker, ``error`` itself unless it only says that none has answered so far."""
        if isinstance(error, (ConnectionError, EOFError)):
            for process in self._processes:  # its socket is gone a moment before it is
                process.join(0.2)
        dead = next((process for process in self._processes if process.exitcode), None)
        if dead is not None:
            pid, code = dead.pid, dead.exitcode
            self.close()
            raise InputError(f"data-loading process {pid} {_end(code)}; --num_workers {self.num_workers}") from None
        if "DataLoader timed out" not in str(error):
            self.close()
            raise error


def _end(code: int) -> str:
    """How a process with this exit code came to its end, and what may help."""
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out: lower --num_workers or --batch_size"
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
        timeout=SECONDS_BETWEEN_LOOKS if num_workers else 0,
    )
    loader.patience = patience
    return loader
