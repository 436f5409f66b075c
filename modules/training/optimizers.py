"""Optimisers with two learning rates, and the schedules that are stepped once per epoch."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def build_optimizer(
    objective: nn.Module,
    *,
    optim: str,
    lr_ve: float,
    lr_ed: float,
    weight_decay: float,
    adam_betas: tuple[float, float],
    adam_eps: float,
    amsgrad: bool,
) -> torch.optim.Optimizer:
    """Optimiser of two groups, the visual extractor (``lr_ve``) and everything else (``lr_ed``), as R2GenCMN has it.

    Frozen parameters are left out. The fused kernels are used: one kernel per step instead of several per parameter,
    and a step that the gradient scaler skips costs no wait for the device. RAdam has none.
    """
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    visual = [parameter for name, parameter in named if ".visual_extractor." in f".{name}"]
    rest = [parameter for name, parameter in named if ".visual_extractor." not in f".{name}"]
    groups = [{"params": visual, "lr": lr_ve}] if visual else []
    groups.append({"params": rest, "lr": lr_ed})
    if optim == "SGD":
        made = torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay, fused=True)
        for parameter in (*visual, *rest):
            # Where the first step is skipped, torch would leave this memory as it found it, and go on with that.
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return made
    shared = {"betas": adam_betas, "eps": adam_eps, "weight_decay": weight_decay}
    if optim == "RAdam":
        return torch.optim.RAdam(groups, **shared)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[optim]
    return kind(groups, **shared, amsgrad=amsgrad, fused=True)


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
    """Multiply the learning rates by ``factor`` when no one of ``metrics`` improves for more than ``patience`` epochs.

    The rule of the ITHN paper (Sec. 4.2) with BLEU_3 and BLEU_4; torch's ReduceLROnPlateau watches one value only.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        factor: float,
        patience: int,
        metrics: tuple[str, ...] = ("BLEU_3", "BLEU_4"),
    ):
        self.optimizer, self.factor, self.patience, self.metrics = optimizer, factor, patience, metrics
        self.best: dict[str, float] = {}
        self.bad_epochs = 0

    def step(self, scores: Mapping[str, float | None] | None) -> None:
        """Take one epoch's validation scores, None where there was no validation.

        Scores that are missing or None do not count as better.
        """
        if scores is None:
            return
        better = False
        for name in self.metrics:
            value = scores.get(name)
            if value is not None and value > self.best.get(name, float("-inf")):
                self.best[name] = value
                better = True
        self.bad_epochs = 0 if better else self.bad_epochs + 1
        if self.bad_epochs > self.patience:
            self.bad_epochs = 0
            for group in self.optimizer.param_groups:
                group["lr"] *= self.factor

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the schedule."""
        return {"best": dict(self.best), "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: Mapping) -> None:
        """Take up a kept state."""
        self.best = {name: float(value) for name, value in state["best"].items()}
        self.bad_epochs = int(state["bad_epochs"])


class EpochSchedule:
    """A schedule of torch.optim.lr_scheduler behind the same ``step(scores)`` as PlateauOnAny."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler):
        self.scheduler = scheduler

    def step(self, scores: Mapping[str, float | None] | None) -> None:
        """Advance by one epoch; the scores have no influence."""
        with warnings.catch_warnings():
            # torch misses an optimiser step where a run goes on after an epoch's last one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the schedule: plain numbers and lists."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping) -> None:
        """Take up a kept state."""
        self.scheduler.load_state_dict(dict(state))


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    lr_scheduler: str,
    step_size: int,
    gamma: float,
    plateau_patience: int,
    epochs: int,
    plateau_metrics: tuple[str, ...] = ("BLEU_3", "BLEU_4"),
) -> EpochSchedule | PlateauOnAny:
    """The schedule named by ``lr_scheduler``; its ``step(scores)`` is called once after each epoch."""
    kinds = torch.optim.lr_scheduler
    if lr_scheduler == "ReduceLROnPlateau":
        return PlateauOnAny(optimizer, factor=gamma, patience=plateau_patience, metrics=plateau_metrics)
    if lr_scheduler == "CosineAnnealingLR":
        return EpochSchedule(kinds.CosineAnnealingLR(optimizer, T_max=epochs))
    if lr_scheduler == "StepLR":
        return EpochSchedule(kinds.StepLR(optimizer, step_size=step_size, gamma=gamma))
    return EpochSchedule(kinds.LambdaLR(optimizer, lambda epoch: 1.0))
