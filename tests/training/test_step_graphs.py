"""--cuda_graph: replayed steps train as computed ones, whatever changes from step to step. No GPU: what a graph would
record is computed again at every replay, of the same memory."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.host_cases import StepCase, make_trainer
from benchmarks.host_path import STRATEGIES
from modules.data.batches import Batch, Pair
from modules.training.step_graphs import StepGraphs
from tests.training.test_gradients import ROWS, WORDS, extractor, objective

CPU = torch.device("cpu")


class Rerun:
    """Stands for a recorded graph: it computes on the same inputs, which others fill."""

    made = 0

    def __init__(self, compute, pool):
        self.replay, self.graph = compute, SimpleNamespace(pool=lambda: None)
        Rerun.made += 1


def refuse(compute, pool):
    raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def batch(length, seed, all_views=True):
    draw = torch.Generator().manual_seed(seed)

    def pair(length):
        tokens = torch.randint(1, WORDS, (ROWS, length), generator=draw)
        tokens[:, 0] = tokens[:, -1] = 0
        views = torch.ones(ROWS, 2, dtype=torch.bool)
        views[0, 1] = all_views
        images = torch.randn(ROWS, 2, 3, 32, 32, generator=draw)
        return Pair(images, views, tokens, torch.ones(ROWS, length, dtype=torch.bool), torch.eye(14)[:ROWS])

    rows = torch.arange(ROWS)
    return Batch(pair(length), pair(length + 1), rows > 0, rows, rows, [""] * ROWS, [""] * ROWS)


def trained(record, batches, **strategy):
    """Objective and graphs after a step for each of ``batches``, an epoch each, at a rate that falls."""
    torch.manual_seed(0)
    own = objective("r2gencmn", {**STRATEGIES["ithn"], **strategy}, extractor(False)).eval()  # dropout would differ
    # Adam would divide the keys' biases, which have no influence, by their gradients' rounding errors.
    trainer = make_trainer(own, StepCase("r2gencmn", optim={"optim": "SGD", "lr_ed": 0.01}), CPU)
    if record is not None:
        trainer.graphs = StepGraphs(
            trainer._compute,
            trainer.optimizer,
            trainer._forget_recording,
            device=CPU,
            lengthen=own.takes_longer_reports,
            record=record,
        )
    for epoch, given in enumerate(batches, start=1):
        trainer.position.epoch = epoch
        trainer._step([copy.deepcopy(given)])
        for group in trainer.optimizer.param_groups:
            group["lr"] *= 0.9
    return own, trainer


def test_replayed_steps_train_as_computed_ones():
    given = [batch(length, seed) for seed, length in enumerate((4, 6, 5, 10, 7, 12, 3, 9))]
    plain, _ = trained(None, given)
    Rerun.made = 0
    own, trainer = trained(Rerun, given, alpha=0.3)
    assert not torch.equal(own.text_projection.linear1.weight, plain.text_projection.linear1.weight)
    own, trainer = trained(Rerun, given)
    assert sorted(held[0].positive.tokens.shape[1] for _, held in trainer.graphs.graphs.values()) == [8, 16]
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    assert all(isinstance(group["lr"], float) for group in trainer.optimizer.param_groups)


def test_a_batch_with_a_missing_view_is_computed(caplog):
    given = [batch(5, seed, all_views=seed % 2 == 0) for seed in range(6)]
    with caplog.at_level(logging.INFO, "ithn"):
        own, trainer = trained(Rerun, given)
    plain, _ = trained(None, given)
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    said = [line for line in caplog.messages if "cuda_graph" in line]
    assert said == ["--cuda_graph: steps are computed without a graph where a view is missing"]
    assert len(trainer.graphs.graphs) == 1


def test_what_cannot_be_recorded_is_computed_with_one_line(caplog):
    given = [batch(5, seed) for seed in range(4)]
    with caplog.at_level(logging.INFO, "ithn"):
        own, _ = trained(refuse, given)
    plain, _ = trained(None, given)
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    (said,) = [line for line in caplog.messages if "cuda_graph" in line]
    assert "not permitted" in said and "more lines" not in said


def test_the_released_variant_gets_reports_as_they_are():
    """Its mean over all positions would change with the padding."""
    given = [batch(length, seed) for seed, length in enumerate((5, 5, 5, 6))]
    own, trainer = trained(Rerun, given, ithn_variant="released")
    ((_, held),) = trainer.graphs.graphs.values()
    assert held[0].positive.tokens.shape[1] == 5
    plain, _ = trained(None, given, ithn_variant="released")
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("multiple", [1, 8])
def test_lengthened_batches(multiple):
    given = batch(9, 0)
    longer = given.lengthened(multiple)
    sides = (longer.positive, longer.negative)
    assert [side.tokens.shape[1] for side in sides] == ([9, 10] if multiple == 1 else [16, 16])
    for own, side in ((given.positive, longer.positive), (given.negative, longer.negative)):
        missing = side.tokens.shape[1] - own.tokens.shape[1]
        assert torch.equal(side.tokens, F.pad(own.tokens, (0, missing))) and side.images is own.images
        assert torch.equal(side.token_mask, F.pad(own.token_mask, (0, missing)))
