"""Which samples come when: an order keyed by seed and epoch, shared out over processes, resumable at any batch."""

import logging
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from modules.batches import collate
from modules.errors import InputError

REPLACED_LIMIT = 0.01
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
    once, on one process.
    """

    def __init__(self, num_samples: int, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0,
                 world_size: int = 1, drop_last: bool = False):  # fmt: skip
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Epoch of the next iteration, which begins at ``start_batch`` (as after a resume) instead of 0."""
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch on this process, wherever it starts."""
        if not self.shuffle:
            share = len(range(self.rank, self.num_samples, self.world_size))
            return -(-share // self.batch_size)
        whole, rest = divmod(self.num_samples, self.batch_size * self.world_size)
        return whole + (rest >= self.world_size and not self.drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, size = self.epoch, self.batch_size
        if self.shuffle:
            generator = keyed_generator(self.seed, epoch, ORDER)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        else:
            order = range(self.rank, self.num_samples, self.world_size)
        for batch in range(self.start_batch, len(self)):
            if self.shuffle:
                together = order[batch * size * self.world_size : (batch + 1) * size * self.world_size]
                share = len(together) // self.world_size
                rows = together[self.rank * share : (self.rank + 1) * share]
            else:
                rows = order[batch * size : (batch + 1) * size]
            yield [(epoch, index) for index in rows]


class EpochLoader(DataLoader):
    """A DataLoader with ``set_epoch`` that raises a worker's InputError in its own words.

    It counts the samples of the epoch that stand in for unreadable ones (``replaced``), and raises InputError when
    they are more than REPLACED_LIMIT.
    """

    replaced = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """See EpochBatchSampler.set_epoch."""
        self.batch_sampler.set_epoch(epoch, start_batch)

    def __iter__(self):
        self.replaced = 0
        share = self.batch_sampler.num_samples / self.batch_sampler.world_size
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                # A new one: raising what a local variable holds ties it to this frame, and the workers with it,
                # until the garbage collector comes by.
                raise InputError(str(batch))
            self.replaced += batch.replaced
            if self.replaced > REPLACED_LIMIT * share:
                raise InputError(
                    f"--on_bad_image skip: {self.replaced} of {share:.0f} samples of this epoch could not be read, "
                    f"more than {REPLACED_LIMIT:.0%}; check --image_dir and the files"
                )
            yield batch
        if self.replaced:
            logging.getLogger("ithn").warning("%d of %.0f samples stood in for some with unreadable images",
                                              self.replaced, share)


def _collate_or_report(samples):
    """Errors travel as values: raised in a worker they would come out wrapped in its traceback."""
    return samples[0] if isinstance(samples[0], InputError) else collate(samples)


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides what becomes of the workers.
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
) -> EpochLoader:
    """Loader of Batches in an order keyed by (``seed``, epoch); ``prefetch_factor`` counts batches per worker."""
    sampler = EpochBatchSampler(len(dataset), batch_size, shuffle, seed, rank, world_size, drop_last)
    return EpochLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate_or_report,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        worker_init_fn=_ignore_interrupt,
        # Its own generator: starting an epoch would otherwise draw from the global one and change what follows.
        generator=torch.Generator(),
    )
