"""The order of samples: keyed by seed and epoch, divided among processes, resumable at any batch."""

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

# Batches that are sorted by length together: enough for similar lengths, few enough to differ from epoch to epoch.
BATCHES_PER_BUCKETING = 50
LANES = 8  # shards that are read at a time, round-robin
# Purposes of a key, so that order, crops and neighbours are drawn independently of one another.
ORDER, AUGMENT_POSITIVE, AUGMENT_NEGATIVE, NEIGHBOUR, REPLACEMENT = range(5)


def keyed_generator(*key: int) -> torch.Generator:
    """A generator that depends on ``key`` alone, not on what was drawn before or in which process."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class EpochBatchSampler(Sampler):
    """Batches of (epoch, index): workers need the epoch to key the augmentation of a sample.

    In training every process gets the same number of batches of the same sizes, its slices of the batches that one
    process with ``world_size * batch_size`` would see; where the last one cannot be divided evenly, up to
    ``world_size`` - 1 samples are left out of that epoch. In evaluation (``shuffle`` off) every sample comes exactly
    once, on one process: the batches are those of one process, dealt out in turn, because a report must not depend
    on the others of its batch, and the last digits of a matrix product do.

    With ``lengths``, one number per sample, a training batch holds samples of similar length. An epoch has the same
    samples, in as many batches of the same sizes, as without; so has each process.

    With ``shards``, the samples of each shard, an epoch reads every shard once, in a changing order: consecutive
    batches (of one process) are taken round-robin over LANES shards, wherever an epoch begins, and with a number of
    processes that divides LANES each reads its own shards. In evaluation shards are read one after the other.
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
        """Epoch of the next iteration; in training it begins after the first ``seen`` samples, of all processes.

        So it continues where another number of processes or another batch size stopped.
        """
        self.epoch, self.seen = epoch, seen

    @property
    def shards_sha256(self) -> str | None:
        """Hash of what each of ``shards`` holds, which determines the order with the seed; None without shards."""
        if self.shards is None:
            return None
        return sha256(json.dumps([shard.tolist() for shard in self.shards]).encode()).hexdigest()

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

        Shards and the samples in each are shuffled, laid end to end and cut into LANES equal lanes of whole batches;
        the rest of all lanes comes last.
        """
        order = [self.shards[i] for i in torch.randperm(len(self.shards), generator=generator).tolist()]
        order = torch.cat([shard[torch.randperm(len(shard), generator=generator)] for shard in order])
        rows, size = self.num_samples // LANES // self.batch_size, self.batch_size
        lanes = order[: LANES * (self.num_samples // LANES)].view(LANES, -1)
        whole = lanes[:, : rows * size].reshape(LANES, rows, size).transpose(0, 1)
        return torch.cat([whole.flatten(), lanes[:, rows * size :].flatten(), order[lanes.numel() :]])

    def _bucketed(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """``order`` (num_samples,) with its whole batches (of all processes) regrouped by length.

        Samples that do not fill a batch stay last, so that any that are left out are so by chance and not by length.
        """
        together = self.batch_size * self.world_size
        whole, rest = order.split([len(order) // together * together, len(order) % together])
        sort = [part[self.lengths[part].argsort(stable=True)] for part in whole.split(BATCHES_PER_BUCKETING * together)]
        batches = torch.cat(sort).view(len(whole) // together, together)
        return torch.cat([batches[torch.randperm(len(batches), generator=generator)].flatten(), rest])
