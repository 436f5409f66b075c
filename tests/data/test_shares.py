"""Which samples each of several processes gets, in training, in evaluation, and after a resume."""

import pytest

from modules.data.datasets import build_loader


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 11, 12, 24, 25])
def test_training_shares_are_slices_of_the_joint_batches(num_samples, world_size):
    def batches(**options):
        loader = build_loader(range(num_samples), shuffle=True, seed=3, **options)
        found = list(loader.batch_sampler)
        assert len(found) == len(loader)
        return found

    joint = batches(batch_size=4 * world_size)
    shares = [batches(batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(len(shares[0])):
        together = [key for share in shares for key in share[step]]
        assert together == joint[step][: len(together)] and len({len(share[step]) for share in shares}) == 1
    assert sum(len(batch) for share in shares for batch in share) == num_samples - num_samples % world_size


def test_other_processes_go_on_where_those_before_left_off():
    def rest(seen, size, world_size):
        loaders = [
            build_loader(range(40), size, shuffle=True, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        for loader in loaders:
            loader.set_epoch(7, seen)
        batches = [list(loader.batch_sampler) for loader in loaders]
        return [index for step in zip(*batches, strict=True) for batch in step for _, index in batch]

    whole = rest(0, 40, 1)
    for seen in (0, 6, 24, 39):
        assert rest(seen, 3, 1) == whole[seen:]
        count = (40 - seen) // 3 * 3  # what three processes cannot share evenly is left out
        assert rest(seen, 5, 3) == whole[seen:][:count]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shares_out_the_batches_of_one_process(world_size):
    turns = {}
    for rank in range(world_size):
        loader = build_loader(range(11), 4, shuffle=False, rank=rank, world_size=world_size)
        batches = list(loader.batch_sampler)
        assert len(batches) == len(loader)
        turns |= {rank + turn * world_size: [index for _, index in batch] for turn, batch in enumerate(batches)}
    assert turns == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10]}
