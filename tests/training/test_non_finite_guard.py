"""Numbers that are not finite: they reach no weight and no running statistic, are counted, and end a hopeless run."""

import logging

import pytest
import torch
from torch import nn

from modules.runtime.errors import InputError
from modules.training.average_meter import AverageMeter
from modules.training.non_finite_guard import are_finite
from tests.training.test_trainer import FakeBatch, FakeLoader, FakeObjective, trainer

NAN = float("nan")


def batch(*values):
    return FakeBatch(torch.tensor(values).unsqueeze(1))


class Normalised(FakeObjective):
    """``values`` pass a batch normalisation; the loss can be spoilt without touching the gradients."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch, epoch, *, token_count, share):
        loss = (self.w * self.norm(batch.values)).square().sum() / token_count + 4 * self.w
        # Where a value is 99 the loss alone is infinite.
        return {"loss": torch.where((batch.values == 99).any(), loss.detach() * 0 + torch.inf, 0) + loss}


def made(batches, optim="Adam", objective=Normalised, **settings):
    return trainer(batches, objective=objective(), optim=optim, weight_decay=0.01, **settings)[0]


GOOD = [batch(1.0, 2.0), batch(-1.0, 0.5), batch(3.0, 4.0)]


@pytest.mark.parametrize("optim", ["Adam", "AdamW", "RAdam", "SGD"])
@pytest.mark.parametrize("bad", [batch(NAN, 1.0), batch(torch.inf, 1.0), batch(99.0, 1.0)], ids=["nan", "inf", "loss"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_bad_step_leaves_the_model_as_if_it_had_not_been(optim, bad, place):
    with_bad, without = made([*GOOD[:place], bad, *GOOD[place:]], optim), made(GOOD, optim)
    for one in (with_bad, without):
        one.train()
    ours, theirs = with_bad.objective.state_dict(), without.objective.state_dict()
    for name in ours:
        if name != "norm.num_batches_tracked":  # of no effect where the momentum is given
            assert torch.equal(ours[name], theirs[name]), name
    assert with_bad.history[0]["train_skipped_steps"] == 1
    # The finite loss of a step whose gradient is not counts; there is none here.
    assert with_bad.history[0]["train_loss"] == without.history[0]["train_loss"]


def test_a_bad_batch_spoils_the_whole_accumulated_step():
    one = made([*GOOD, batch(NAN, 1.0)], grad_accumulation=2)
    other = made(GOOD[:2], grad_accumulation=2)
    one.train(), other.train()
    assert torch.equal(one.objective.norm.running_mean, other.objective.norm.running_mean)
    assert torch.equal(one.objective.w, other.objective.w)


def test_the_rows_of_a_bad_batch_are_logged(caplog):
    bad = batch(NAN, 1.0)
    bad.sample_index = torch.tensor([17, 4])
    with caplog.at_level(logging.WARNING, "ithn"):
        made([GOOD[0], bad, batch(99.0, 1.0)]).train()
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 1 step 2: the loss is not finite and no weight was changed; samples of the training split: 17 4",
        "epoch 1 step 3: the loss is not finite and no weight was changed; samples of the training split: 0 1",
        "epoch 1: 2 of 3 steps were skipped because their loss or gradient was not finite",
    ]


@pytest.mark.parametrize("optim", ["Adam", "SGD"])
@pytest.mark.parametrize("read_every", [1, 25])  # on a CPU, on a GPU
def test_the_run_ends_at_exactly_so_many_in_a_row(optim, read_every):
    bad = [batch(NAN, 1.0)] * 24
    one = made([*bad, GOOD[0], *bad, GOOD[1]], optim)
    one.guard._read_every = read_every
    one.train()
    assert one.history[0]["train_skipped_steps"] == 48
    other = made([GOOD[0], *bad, bad[0], GOOD[1]], optim)
    other.guard._read_every = read_every
    with pytest.raises(InputError, match="not finite in 25 steps in a row, up to epoch 1 step 26"):
        other.train()


def test_the_row_is_counted_across_epochs_and_resumes():
    one = made([batch(NAN, 1.0)] * 10, scores=(0.1, 0.2))
    one.train()
    other = made([batch(NAN, 1.0)] * 10, scores=(0.1,) * 3)
    other.load_state_dict(one.state_dict())
    with pytest.raises(InputError, match="up to epoch 3 step 5"):
        other.train()


def test_float16_overflows_are_counted_with_the_scale(caplog):
    one = made([batch(1.0, 2.0)] * 3, precision="float16")
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with caplog.at_level(logging.WARNING, "ithn"):
        one.train()
    # The gradient is 4: with a scale of 2^127, then of 2^126, it is out of float32's range.
    assert one.history[0]["train_skipped_steps"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"epoch 1: 2 of 3 steps were skipped because their loss or gradient was not finite; the loss scale is "
        f"{2.0**125:g}"
    ]


class Plain(Normalised):
    def forward(self, batch, epoch, *, token_count, share):
        return {"loss": self.w * self.norm(batch.values).sum() / token_count}


def test_a_step_waits_for_no_device(monkeypatch):
    """Reading a tensor's value does: nothing of a step may."""
    one = made(GOOD, objective=Plain)
    one.guard._read_every = 25

    def wait(*_):
        raise AssertionError("a value was read")

    step = one._step

    def watched(group):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
                patch.setattr(torch.Tensor, name, wait)
            step(group)

    one._step = watched
    one.train()
    assert one.history[0]["train_steps"] == 3


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("value", "finite"), [(NAN, False), (torch.inf, False), (-torch.inf, False), (3e38, True)])
def test_gradients_are_finite_where_the_scaler_takes_them_for_it(place, value, finite):
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(5))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3e38)  # their squares are not finite
    parameters[place].grad.flatten()[-1] = value
    assert are_finite([parameter.grad for parameter in parameters]).item() is finite
    optimizer, scaler = torch.optim.SGD(parameters, lr=1e-38), torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all((parameter != 1).any() for parameter in parameters) is finite


def test_means_leave_out_what_is_not_finite():
    means = AverageMeter()
    assert means.read() == {}
    means.add([{"loss": torch.tensor(NAN), "nll": torch.tensor(1.0)}])
    assert all(value != value for value in means.read().values())
    means.add(
        [{"loss": torch.tensor(1.0), "nll": torch.tensor(3.0)}, {"loss": torch.tensor(2.0), "nll": torch.tensor(5.0)}]
    )
    assert means.read() == {"loss": 3.0, "nll": 4.0}
    again = AverageMeter()
    again.load_state_dict(means.state_dict(), torch.device("cpu"))
    assert again.read() == means.read()


def test_an_unreadable_sample_ends_the_run_with_everything_before_it_saved():
    class Breaks(FakeLoader):
        def __iter__(self):
            yield from self[:2]
            raise InputError("split 'train', study 'x': cannot be read")

    one, saved = trainer([])
    one.loader = Breaks([batch(1.0)] * 3)
    one.save = lambda trainer, improved: saved.append(trainer.position.batches)
    with pytest.raises(InputError, match="cannot be read"):
        one.train()
    assert saved == [2]


def test_what_was_sent_is_judged_later_and_nothing_is_lost():
    """As on a GPU, where the flags of 25 steps are on their way during the next 25."""
    one = made([*GOOD, batch(NAN, 1.0)] * 2)
    one.guard._read_every = 3
    one.train()
    assert one.history[0]["train_skipped_steps"] == 2 and one.state_dict()["guard"] == {"in_a_row": 1, "skipped": 0}
