"""The queue of MoCHi as published: what is kept, who is a negative of whom, and what the mixtures are made of."""

import pytest
import torch

from modules.ithn.losses import normalise
from modules.ithn.negative_queue import NegativeQueue


def unit(*shape, seed):
    return normalise(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def queue():
    made = NegativeQueue(size=6, hardest=4, dim=3)
    for step in range(2):
        made.keep(unit(2, 3, seed=step), unit(2, 3, seed=10 + step), torch.tensor([2 * step, 2 * step + 1]))
    return made


def test_the_latest_samples_come_first_and_the_oldest_leave(queue):
    assert queue.keys.tolist()[:4] == [2, 3, 0, 1] and queue.known.tolist() == [True] * 4 + [False] * 2
    assert torch.equal(queue.images[:2], unit(2, 3, seed=1)) and torch.equal(queue.reports[2:4], unit(2, 3, seed=10))
    for step in range(2, 5):
        queue.keep(unit(2, 3, seed=step), unit(2, 3, seed=10 + step), torch.tensor([2 * step, 2 * step + 1]))
    assert queue.keys.tolist() == [8, 9, 6, 7, 4, 5] and queue.known.all()
    queue.keep(unit(9, 3, seed=9), unit(9, 3, seed=9), torch.arange(9))
    assert queue.keys.tolist() == [0, 1, 2, 3, 4, 5]


def test_negatives_are_the_queue_and_mixtures_of_the_hardest_by_hand(queue):
    image, report, keys = unit(2, 3, seed=20), unit(2, 3, seed=21), torch.tensor([2, 7])
    found = queue.further(image, report, keys, torch.tensor(5.0))
    assert found.of_images.shape == found.of_reports.shape == (2, 6 + 4 + 1) == found.count.shape
    # Sample 2 is no negative of itself; places 4 and 5 are empty.
    assert found.count[:, :6].tolist() == [[False, True, True, True, False, False], [True] * 4 + [False] * 2]
    first, second, share = queue._draw(2, 4)
    other, _, own_share = queue._draw(2, 1, first=3)
    for anchors, others, scores in ((image, queue.reports, found.of_images), (report, queue.images, found.of_reports)):
        for row, anchor in enumerate(anchors):
            known = [place for place in range(4) if queue.keys[place] != keys[row]]
            ranked = sorted(known, key=lambda place: -float(anchor @ others[place]))
            torch.testing.assert_close(scores[row, :4], 5 * (others[:4] @ anchor))
            for column in range(4):
                i, j, a = int(first[row, column]), int(second[row, column]), share[row, column]
                counts = i < len(ranked) and j < len(ranked)
                assert bool(found.count[row, 6 + column]) == counts
                if counts:
                    mixed = a * others[ranked[i]] + (1 - a) * others[ranked[j]]
                    torch.testing.assert_close(scores[row, 6 + column], 5 * (mixed / mixed.norm()) @ anchor)
            i, a = int(other[row, 0]), own_share[row, 0] / 2
            assert bool(found.count[row, 10]) == (i < len(ranked)) and 0 <= a < 0.5
            if i < len(ranked):
                mixed = a * anchor + (1 - a) * others[ranked[i]]
                torch.testing.assert_close(scores[row, 10], 5 * (mixed / mixed.norm()) @ anchor)


def test_draws_differ_from_step_to_step_cover_all_ranks_and_continue_after_a_copy(queue):
    draws = []
    for _ in range(8):
        draws.append(torch.stack([part.double() for part in queue._draw(3, 8)]))
        queue.keep(unit(1, 3, seed=1), unit(1, 3, seed=2), torch.tensor([1]))
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 8
    shares = torch.stack(draws)[:, 2]
    assert set(torch.stack(draws)[:, 0].flatten().tolist()) == {0, 1, 2, 3}
    assert shares.min() >= 0 and shares.max() < 1 and abs(float(shares.mean()) - 0.5) < 0.05
    copy = NegativeQueue(size=6, hardest=4, dim=3)
    copy.load_state_dict(queue.state_dict())
    assert all(torch.equal(*pair) for pair in zip(copy._draw(3, 8), queue._draw(3, 8), strict=True))


def test_the_backward_pass_may_follow_a_change_of_the_queue(queue):
    image, report = (unit(2, 3, seed=seed).requires_grad_() for seed in (20, 21))
    found = queue.further(image, report, torch.tensor([8, 9]), torch.tensor(5.0))
    queue.keep(image, report, torch.tensor([8, 9]))
    (found.of_images.sum() + found.of_reports.sum()).backward()
    assert image.grad.abs().sum() > 0 and report.grad.isfinite().all()


def test_an_empty_queue_has_no_negatives():
    empty = NegativeQueue(size=4, hardest=8, dim=3)
    found = empty.further(unit(2, 3, seed=1), unit(2, 3, seed=2), torch.tensor([0, 1]), torch.tensor(1.0))
    assert not found.count.any() and found.of_images.isfinite().all()
