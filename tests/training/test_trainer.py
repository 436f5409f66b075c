"""The loop itself, on an objective of two numbers: accumulation, selection, early stop, numbers that are not finite."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from modules.runtime.errors import InputError
from modules.runtime.stopping import GracefulShutdown
from modules.training.settings import LoopSettings, OptimSettings
from modules.training.trainer import Best, Trainer


@dataclass
class Words:
    token_mask: torch.Tensor


@dataclass
class FakeBatch:
    values: torch.Tensor  # (B, T) one number per token, the last position of token_mask[:, 1:] decides
    positive: Words = field(init=False)
    sample_index: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.sample_index = torch.arange(len(self.values))
        self.positive = Words(torch.cat([torch.ones(len(self.values), 1), (self.values != 0).float()], 1).bool())

    def to(self, device):
        return self


class FakeObjective(nn.Module):
    """Mean over tokens of w * value, so that the gradient of w is the mean value of all tokens of a step."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.steps, self.counts = 0, []

    def forward(self, batch, epoch, *, token_count, share):
        self.counts.append((int(token_count), share))
        loss = (self.w * batch.values).sum() / token_count
        return {"loss": loss, "nll": loss.detach()}

    def after_step(self):
        self.steps += 1


class FakeLoader(list):
    start = 0

    def set_epoch(self, epoch, start_batch=0):
        self.epoch, self.start = epoch, start_batch

    def __iter__(self):
        return iter(self[self.start :])


def trainer(batches, scores=(0.1,), objective=None, device="cpu", precision="float32", **settings):
    """A trainer on made-up batches and validation scores; ``settings`` are those of optimiser and loop."""
    optim = {"lr_ve": 0.1, "lr_ed": 0.1, "weight_decay": 0.0, "lr_scheduler": "constant", "epochs": len(scores)}
    optim |= {name: settings.pop(name) for name in list(settings) if name in OptimSettings.__dataclass_fields__}
    saved = []
    made = Trainer(
        objective or FakeObjective(),
        OptimSettings(**optim),
        LoopSettings(**settings),
        loader=FakeLoader(batches),
        validate=lambda epoch: {"BLEU_4": scores[epoch - 1], "nll": 1 - scores[epoch - 1]},
        likelihood=lambda epoch: {"nll": 1 - scores[epoch - 1]},
        save=lambda trainer, improved: saved.append((len(trainer.history), improved)),
        on_epoch=lambda history: None,
        shutdown=GracefulShutdown(),
        device=torch.device(device),
        precision=precision,
    )
    return made, saved


def batch(*rows):
    return FakeBatch(torch.tensor(rows))


def test_accumulated_batches_weigh_by_their_tokens():
    # Two tokens of value 1 and one of value 4: the step's gradient is (1 + 1 + 4) / 3, not (1 + 4) / 2.
    one, _ = trainer([batch([1.0, 1.0]), batch([4.0, 0.0])], grad_accumulation=2, optim="SGD")
    one.train()
    assert one.objective.counts == [(3, 0.5), (3, 0.5)]
    assert one.objective.w.item() == pytest.approx(-0.1 * 6 / 3)
    assert one.objective.steps == 1 and one.history[0]["train_steps"] == 1


def test_the_logged_loss_is_that_of_a_step():
    one, _ = trainer([batch([1.0, 1.0]), batch([4.0, 0.0])], grad_accumulation=2)
    with torch.no_grad():
        one.objective.w.fill_(1.0)
    one.train()
    assert one.history[0]["train_loss"] == pytest.approx(6 / 3)
    assert one.history[0]["train_nll"] == pytest.approx((2 / 3 + 4 / 3) / 2)


def test_an_incomplete_last_group_is_a_step_of_its_own():
    one, _ = trainer([batch([1.0])] * 3, grad_accumulation=2)
    one.train()
    assert one.objective.counts == [(2, 0.5), (2, 0.5), (1, 1.0)] and one.objective.steps == 2


def test_the_best_epoch_is_saved_whatever_the_period():
    one, saved = trainer([batch([1.0])], scores=[0.1, 0.3, 0.2, 0.3, 0.1], save_period=100)
    one.train()
    # An equal score counts as better; the last epoch is always kept, before it is validated too.
    assert saved == [(1, True), (2, True), (4, True), (4, False), (5, False)]
    assert (one.best.epoch, one.best.score) == (4, 0.3)


def test_a_score_that_was_not_earned_chooses_no_epoch():
    """Where validation gives another value to choose by, the monitored score is logged and not looked at."""
    one, saved = trainer([batch([1.0])], scores=[0.1, 0.9], epochs=2)
    plain = one.validate
    one.validate = lambda epoch: plain(epoch) | ({"selection": 0.05} if epoch == 2 else {})
    one.train()
    assert one.best.epoch == 1 and one.history[1]["val_BLEU_4"] == 0.9


def test_early_stop_waits_for_more_than_its_epochs():
    one, _ = trainer([batch([1.0])], scores=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], early_stop=2)
    one.train()
    assert [row["epoch"] for row in one.history] == [1, 2, 3, 4]


def test_no_validation_before_its_first_epoch():
    one, saved = trainer([batch([1.0])], scores=[0.9, 0.1], start_eval_epoch=2)
    one.train()
    assert "val_BLEU_4" not in one.history[0] and saved == [(1, False), (1, False), (2, True)]


def test_an_epoch_is_written_twice_only_where_validation_chose_it():
    """Before its validation and after it; where nothing was decided, or nothing was better, once."""
    one, saved = trainer([batch([1.0])], scores=[0.1, 0.2, 0.3, 0.2, 0.5], eval_every=2)
    one.train()
    # Rows of the history at each write: epochs 1, 3 and 5 are validated.
    assert saved == [(0, False), (1, True), (2, False), (2, False), (3, True), (4, False), (4, False), (5, True)]
    other, saved = trainer([batch([1.0])], scores=[0.4, 0.1, 0.2, 0.5, 0.3])
    other.train()
    # Epochs 2 and 3 are written before their validation; the last one also when training has ended.
    assert saved == [(0, False), (1, True), (1, False), (2, False), (3, False), (4, True), (4, False), (5, False)]


def test_training_that_ends_early_is_saved_as_ended():
    one, saved = trainer([batch([1.0])], scores=[0.5, 0.1, 0.1, 0.1], early_stop=1, save_period=100)
    one.train()
    assert saved == [(1, True), (3, False)]


def test_validation_every_few_epochs_and_in_the_last():
    one, _ = trainer([batch([1.0])], scores=[0.9, 0.1, 0.2, 0.3, 0.4], start_eval_epoch=2, eval_every=2)
    one.train()
    found = [row["epoch"] for row in one.history if "val_BLEU_4" in row]
    assert found == [2, 4, 5] and len(one.history) == 5 and one.best.epoch == 5
    assert ["val_nll" in row for row in one.history] == [False, True, True, True, True]


def test_likelihood_alone_judges_an_epoch_where_it_is_what_counts():
    settings = {"scores": [0.2, 0.9, 0.3, 0.4], "eval_every": 3, "early_stop": 1}
    one, _ = trainer([batch([1.0])], monitor_metric="nll", monitor_mode="min", **settings)
    one.train()
    assert one.best.epoch == 2 and [row["epoch"] for row in one.history] == [1, 2, 3, 4]
    other, _ = trainer([batch([1.0])], **settings)
    other.train()
    assert other.best.epoch == 4 and other.best.epochs_without == 0  # the second and third say nothing of BLEU-4


def test_the_learning_rate_falls_before_the_first_validation():
    one, _ = trainer(
        [batch([1.0])], scores=[0.9] * 3, start_eval_epoch=3, lr_scheduler="StepLR", step_size=1, gamma=0.5
    )
    one.train()
    assert [row["lr_ed"] for row in one.history] == [0.1, 0.05, 0.025]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_never_reaches_the_weights(bad):
    one, _ = trainer([batch([1.0]), batch([bad]), batch([1.0])])
    good, _ = trainer([batch([1.0]), batch([1.0])])
    one.train()
    good.train()
    assert one.objective.w.item() == good.objective.w.item() != 0.0


def test_a_run_of_bad_gradients_ends_the_run():
    one, _ = trainer([batch([1.0])] + [batch([float("nan")])] * 60)
    with pytest.raises(InputError, match="not finite in 25 steps in a row"):
        one.train()
    assert torch.isfinite(one.objective.w)


def test_a_run_of_bad_gradients_ends_short_epochs_too():
    one, _ = trainer([batch([float("nan")])] * 10, scores=[0.1] * 9)
    with pytest.raises(InputError, match="not finite in 25 steps in a row"):
        one.train()
    assert len(one.history) == 2


@pytest.mark.parametrize(("settings", "expected"), [({"clip_value": 0.1}, -0.01), ({"clip_norm": 0.5}, -0.05)])
def test_clipping(settings, expected):
    one, _ = trainer([batch([3.0])], optim="SGD", **settings)
    one.train()
    assert one.objective.w.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("smaller", "scores", "best"), [(False, [1.0, 2.0, None], 2), (True, [1.0, 2.0, float("nan")], 1)]
)
def test_scores_that_are_missing_are_never_best(smaller, scores, best):
    kept = Best()
    for epoch, score in enumerate(scores, start=1):
        kept.update(score, epoch, smaller)
    assert kept.epoch == best


class WithExtractor(FakeObjective):
    def __init__(self, trainable):
        super().__init__()
        self.visual_extractor = nn.Linear(1, 1).requires_grad_(trainable)

    def forward(self, batch, epoch, **share):
        loss = super().forward(batch, epoch, **share)["loss"] + self.visual_extractor.weight.sum()
        return {"loss": loss}


def test_the_history_shows_no_rate_of_an_extractor_that_is_not_trained():
    trained, _ = trainer([batch([1.0])], objective=WithExtractor(True), lr_ve=0.2)
    frozen, _ = trainer([batch([1.0])], objective=WithExtractor(False), lr_ve=0.2)
    for one in (trained, frozen):
        one.train()
    assert (trained.history[0]["lr_ve"], trained.history[0]["lr_ed"]) == (0.2, 0.1)
    assert "lr_ve" not in frozen.history[0] and frozen.history[0]["lr_ed"] == 0.1


@pytest.mark.parametrize(("then", "now", "scale"), [("float16", "float16", 512.0), ("bfloat16", "float16", 2.0**16)])
def test_another_precision_finds_its_own_loss_scale(then, now, scale):
    before, _ = trainer([batch([1])], precision=then)
    if then == "float16":
        before.scaler.load_state_dict(before.scaler.state_dict() | {"scale": 512.0})
    after, _ = trainer([batch([1])], precision=now)
    after.load_state_dict(before.state_dict())
    assert after.scaler.state_dict()["scale"] == scale
    back, _ = trainer([batch([1])], precision="bfloat16")
    back.load_state_dict(after.state_dict())
    assert back.scaler.state_dict()["scale"] == 1.0
