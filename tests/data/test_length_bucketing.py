"""Batches by length: the same samples in batches of the same sizes, alike in length, by seed and epoch."""

import pytest
import torch

from modules.data.datasets import build_loader

torch.set_num_threads(1)


def lengths_of(count):
    return torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def batches(count, *, epoch=1, seen=0, bucketed=True, **options):
    options = {"batch_size": 4, "seed": 3} | options
    loader = build_loader(range(count), shuffle=True, lengths=lengths_of(count) if bucketed else None, **options)
    loader.set_epoch(epoch, seen)
    return [[index for _, index in batch] for batch in loader.batch_sampler]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 11, 24, 450])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_the_same_samples_in_batches_of_the_same_sizes(count, world_size, drop_last):
    share = [
        [
            batches(count, rank=rank, world_size=world_size, drop_last=drop_last, bucketed=bucketed)
            for rank in range(world_size)
        ]
        for bucketed in (True, False)
    ]
    sizes, samples = (
        [[len(batch) for rank in shares for batch in rank] for shares in share],
        [sorted(index for rank in shares for batch in rank for index in batch) for shares in share],
    )
    assert sizes[0] == sizes[1] and samples[0] == samples[1]


def test_batches_are_alike_in_length_and_come_in_no_order_of_it():
    lengths = lengths_of(400)

    def padding(found):
        return sum(max(lengths[i] for i in batch) - lengths[j] for batch in found for j in batch)

    bucketed = batches(400)
    assert padding(bucketed) < 0.2 * padding(batches(400, bucketed=False))
    longest = [max(lengths[i] for i in batch) for batch in bucketed]
    assert longest != sorted(longest)


def test_seed_and_epoch_decide_and_a_resumed_epoch_goes_on_at_its_batch():
    complete = batches(450, epoch=2)
    assert complete == batches(450, epoch=2) != batches(450, epoch=3)
    assert complete != batches(450, epoch=2, seed=4)
    assert batches(450, epoch=2, seen=28) == complete[7:]
    # Which samples share a batch changes too, not only the order of the batches.
    assert {tuple(sorted(batch)) for batch in complete} != {tuple(sorted(batch)) for batch in batches(450, epoch=3)}


def test_processes_share_the_joint_batches():
    joint = batches(450, batch_size=8)
    shares = [batches(450, rank=rank, world_size=2) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*shares, strict=True)):
        assert first + second == joint[step][: len(first + second)]


def test_the_flag_reaches_the_training_loader_alone(train, monkeypatch):
    from modules.run import data as compose_data

    seen = []
    original = compose_data.build_loader
    monkeypatch.setattr(
        compose_data,
        "build_loader",
        lambda *arguments, **options: (
            seen.append(options["lengths"] and sorted(set(options["lengths"]))),
            original(*arguments, **options),
        )[1],
    )
    train("--length_bucketing", "true", "--max_seq_length", 20, "--clinical", "false", "--floors", "false")
    assert len(seen) >= 3 and seen[0] and max(seen[0]) <= 20 and min(seen[0]) > 2
    assert not any(seen[1:])
