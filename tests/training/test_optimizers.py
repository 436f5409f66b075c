"""Two learning rates, and schedules that do what their names say."""

import pytest
import torch
from torch import nn

from modules.training.optimizers import (
    PlateauOnAny,
    build_optimizer,
    build_scheduler,
    learning_rate_factor,
    learning_rates,
    scale_learning_rates,
)
from modules.training.settings import OptimSettings


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.visual_extractor = nn.Linear(2, 2)
        self.backbone.decoder = nn.Linear(2, 2)
        self.temp_1 = nn.Parameter(torch.ones(()))


def optimizer(objective, optim="Adam", **other):
    return build_optimizer(objective, OptimSettings(optim=optim, **{"lr_ve": 1e-4, "lr_ed": 5e-4} | other))


@pytest.mark.parametrize("optim", ["Adam", "AdamW", "RAdam", "SGD"])
def test_the_visual_extractor_has_its_own_rate(optim):
    visual, rest = optimizer(Tiny(), optim).param_groups
    assert (visual["lr"], len(visual["params"])) == (1e-4, 2)
    assert (rest["lr"], len(rest["params"])) == (5e-4, 3)


def test_a_frozen_extractor_is_left_out():
    objective = Tiny()
    objective.backbone.visual_extractor.requires_grad_(False)
    assert learning_rates(optimizer(objective)) == {"lr_ed": 5e-4}
    assert learning_rates(optimizer(Tiny())) == {"lr_ve": 1e-4, "lr_ed": 5e-4}


def test_fused_steps_equal_the_plain_ones():
    torch.manual_seed(0)
    ours, plain = Tiny(), Tiny()
    plain.load_state_dict(ours.state_dict())
    reference = torch.optim.Adam(
        plain.parameters(),
        lr=1e-3,
        betas=(0.9, 0.98),
        eps=1e-9,
        weight_decay=5e-5,
        amsgrad=True,
        foreach=False,
        fused=False,
    )
    stepped = optimizer(ours, lr_ve=1e-3, lr_ed=1e-3)
    for _ in range(5):
        x = torch.randn(4, 2)
        for model, optim in ((ours, stepped), (plain, reference)):
            optim.zero_grad()
            (model.backbone.decoder(model.backbone.visual_extractor(x)).square().sum() * model.temp_1).backward()
            optim.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_plateau_waits_for_either_metric():
    optim = optimizer(Tiny())
    plateau = PlateauOnAny(optim, factor=0.1, patience=1)
    plateau.step({"BLEU_3": 0.2, "BLEU_4": 0.1})
    plateau.step({"BLEU_3": 0.1, "BLEU_4": 0.2})  # BLEU_4 is better
    plateau.step({"BLEU_3": 0.2, "BLEU_4": None})  # first epoch without
    assert optim.param_groups[1]["lr"] == 5e-4
    plateau.step({"BLEU_3": 0.1, "BLEU_4": 0.2})  # second: more than the patience of 1
    assert optim.param_groups[1]["lr"] == pytest.approx(5e-5)
    assert optim.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_an_epoch_without_validation_is_not_one_without_progress():
    optim = optimizer(Tiny())
    plateau = PlateauOnAny(optim, factor=0.1, patience=0)
    plateau.step(None)
    plateau.step({"nll": 2.0})  # of an epoch that is validated by its likelihood alone
    assert optim.param_groups[1]["lr"] == 5e-4


KINDS = ["StepLR", "ReduceLROnPlateau", "CosineAnnealingLR", "constant"]


def made(kind, processes=1):
    settings = OptimSettings(
        lr_ve=1e-4, lr_ed=5e-4, scale_lr="sqrt", lr_scheduler=kind, step_size=2, gamma=0.5, plateau_patience=0, epochs=8
    )
    optim = build_optimizer(Tiny(), settings, processes)
    return optim, build_scheduler(optim, settings)


def rates(optim, schedule, steps):
    found = []
    for step in range(*steps):
        optim.step()
        schedule.step({"BLEU_3": 0.1, "BLEU_4": 0.1 * (step < 2)})
        found.append(optim.param_groups[1]["lr"])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_schedule_goes_on_alike(kind):
    whole = rates(*made(kind), (0, 6))
    first, schedule = made(kind)
    begin = rates(first, schedule, (0, 3))
    second, restored = made(kind)
    second.load_state_dict(first.state_dict())
    restored.load_state_dict(schedule.state_dict())
    assert begin + rates(second, restored, (3, 6)) == whole
    assert (len(set(whole)) > 1) == (kind != "constant")


@pytest.mark.parametrize("kind", KINDS)
def test_other_processes_go_on_with_the_rates_of_their_number(kind):
    """Of two processes made eight, under --scale_lr sqrt."""
    factors = [learning_rate_factor("sqrt", processes) for processes in (2, 8)]
    assert factors == pytest.approx([2**0.5, 8**0.5])
    optim, schedule = made(kind, processes=2)
    rates(optim, schedule, (0, 3))
    scale_learning_rates(optim, schedule, factors[1] / factors[0])
    assert rates(optim, schedule, (3, 6)) == pytest.approx(rates(*made(kind, processes=8), (0, 6))[3:])
