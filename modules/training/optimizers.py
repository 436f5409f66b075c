"""Optimisers with two learning rates, and the schedules that are stepped once per epoch."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modules.evaluation.metric_table import tagged
from modules.runtime.distributed import is_shared
from modules.training.settings import OptimSettings

PLATEAU_METRICS = ("BLEU_3", "BLEU_4")  # the paper, Sec. 4.2


def build_optimizer(objective: nn.Module, settings: OptimSettings, processes: int = 1) -> torch.optim.Optimizer:
    """Optimiser with a learning rate for the visual extractor (lr_ve) and one for the rest (lr_ed), as in R2GenCMN.

    ``processes`` is the number by which scale_lr scales both. Frozen parameters are left out. The fused kernels are
    used: one kernel per step instead of several per parameter, and a step that the gradient scaler skips costs no wait
    for the device. RAdam has none.
    """
    factor = learning_rate_factor(settings.scale_lr, processes)
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    visual = [parameter for name, parameter in named if ".visual_extractor." in f".{name}"]
    rest = [parameter for name, parameter in named if ".visual_extractor." not in f".{name}"]
    groups: list[dict[str, Any]] = [{"params": visual, "lr": settings.lr_ve * factor}] if visual else []
    groups.append({"params": rest, "lr": settings.lr_ed * factor})
    if settings.optim == "SGD":
        fused = not is_shared(rest[0])  # torch has no such kernel for what is shared out
        sgd = torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.weight_decay, fused=fused)
        for parameter in (*visual, *rest):
            # Where the first step is skipped, torch would use this memory uninitialised.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    shared: dict[str, Any] = {
        "betas": settings.adam_betas,
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optim == "RAdam":
        return torch.optim.RAdam(groups, **shared)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[settings.optim]
    return kind(groups, **shared, amsgrad=settings.amsgrad, fused=True)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current rates of ``build_optimizer`` by name; without lr_ve where no part of the extractor is trained."""
    *visual, rest = (group["lr"] for group in optimizer.param_groups)
    return {**({"lr_ve": visual[0]} if visual else {}), "lr_ed": rest}


def learning_rate_factor(rule: str, processes: int) -> float:
    """What the learning rates of one process are multiplied by for ``processes``: 1, their number or its square root.

    ``rule`` is none, linear (Goyal et al., arXiv 1706.02677) or sqrt.
    """
    return {"none": 1.0, "linear": float(processes), "sqrt": math.sqrt(processes)}[rule]


def scale_learning_rates(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply the learning rates by ``factor``, and what the schedule remembers of them."""
    for group in optimizer.param_groups:
        group.update({name: group[name] * factor for name in ("lr", "initial_lr") if name in group})
    if isinstance(scheduler, EpochSchedule):
        scheduler.scheduler.base_lrs = [rate * factor for rate in scheduler.scheduler.base_lrs]


class PlateauOnAny:
    """Multiply the learning rates by ``factor`` when none of ``metrics`` improves for more than ``patience`` epochs.

    The rule of the ITHN paper (Sec. 4.2) with BLEU_3 and BLEU_4; torch's ReduceLROnPlateau watches one value only.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        factor: float,
        patience: int,
        metrics: tuple[str, ...] = PLATEAU_METRICS,
    ):
        self.optimizer, self.factor, self.patience, self.metrics = optimizer, factor, patience, metrics
        self.best: dict[str, float] = {}
        self.bad_epochs = 0

    def step(self, scores: Mapping[str, float | None] | None) -> None:
        """Take one epoch's validation scores, None where there was no validation.

        An epoch without any of the metrics does not count, as one that was validated by its likelihood alone; a metric
        that is None has not improved.
        """
        if scores is None or not any(name in scores for name in self.metrics):
            return
        improved = False
        for name in self.metrics:
            value = scores.get(name)
            if value is not None and value > self.best.get(name, float("-inf")):
                self.best[name] = value
                improved = True
        self.bad_epochs = 0 if improved else self.bad_epochs + 1
        if self.bad_epochs > self.patience:
            self.bad_epochs = 0
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor

    def state_dict(self) -> dict:
        """What a checkpoint stores of the schedule."""
        return {"best": dict(self.best), "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from a stored state."""
        self.best = {name: float(value) for name, value in state["best"].items()}
        self.bad_epochs = int(state["bad_epochs"])


class EpochSchedule:
    """A schedule of torch.optim.lr_scheduler behind the same ``step(scores)`` as PlateauOnAny."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler):
        self.scheduler = scheduler

    def step(self, scores: Mapping[str, float | None] | None) -> None:
        """Advance by one epoch; the scores have no influence."""
        with warnings.catch_warnings():
            # torch misses an optimiser step where a run was resumed after an epoch's last one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def state_dict(self) -> dict:
        """What a checkpoint stores of the schedule: plain numbers and lists."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from a stored state."""
        self.scheduler.load_state_dict(dict(state))


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: OptimSettings, score_tag: str = ""
) -> EpochSchedule | PlateauOnAny:
    """The schedule that lr_scheduler names; its ``step(scores)`` is called once after each epoch.

    ``score_tag`` is at the end of the names of validation scores.
    """
    kinds = torch.optim.lr_scheduler
    if settings.lr_scheduler == "ReduceLROnPlateau":
        metrics = tuple(tagged(name, score_tag) for name in PLATEAU_METRICS)
        return PlateauOnAny(optimizer, factor=settings.gamma, patience=settings.plateau_patience, metrics=metrics)
    if settings.lr_scheduler == "CosineAnnealingLR":
        return EpochSchedule(kinds.CosineAnnealingLR(optimizer, T_max=settings.epochs))
    if settings.lr_scheduler == "StepLR":
        return EpochSchedule(kinds.StepLR(optimizer, step_size=settings.step_size, gamma=settings.gamma))
    return EpochSchedule(kinds.LambdaLR(optimizer, lambda epoch: 1.0))
