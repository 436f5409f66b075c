"""The training loop: epochs, validation, learning-rate schedule, best model, early stop.

It knows an objective that maps a batch to a dictionary of losses, and nothing about backbones or ITHN.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.errors import InputError
from modules.tester import autocast

logger = logging.getLogger("ithn")

# A step whose loss or gradient is not finite changes no weight; so many in a row end the run.
MOST_SKIPPED_IN_A_ROW = 25


@dataclass
class Best:
    """What model selection and early stopping remember."""

    score: float | None = None
    epoch: int = 0
    epochs_without: int = 0

    def judge(self, score: float | None, epoch: int, mode: str) -> bool:
        """Whether ``score`` is the best so far; an equal score counts as better, as in the R2Gen family."""
        usable = score is not None and math.isfinite(score)
        sign = 1 if mode == "max" else -1
        if usable and (self.score is None or sign * score >= sign * self.score):
            self.score, self.epoch, self.epochs_without = score, epoch, 0
            return True
        self.epochs_without += 1
        return False


class Trainer:
    """Trains ``objective`` and leaves the best epoch's weights to ``save``.

    ``objective(batch, epoch, token_count=, share=)`` returns a dictionary with "loss" and the terms to log;
    ``validate(epoch)`` returns metrics of the validation split; ``save(trainer, epoch, improved)`` writes a checkpoint;
    ``on_epoch(history)`` draws curves. ``epoch`` counts from 1.
    """

    def __init__(self, objective: nn.Module, *, optimizer: torch.optim.Optimizer, scheduler: Any, loader: Any,
                 validate: Callable[[int], Mapping[str, float | None]], save: Callable[["Trainer", int, bool], None],
                 on_epoch: Callable[[list[dict]], None], progress: Callable[..., Any], device: torch.device,
                 precision: str, epochs: int, early_stop: int, monitor_metric: str, monitor_mode: str,
                 save_period: int, log_period: int, start_eval_epoch: int, grad_accumulation: int, clip_norm: float,
                 clip_value: float):
        self.objective, self.optimizer, self.scheduler, self.loader = objective, optimizer, scheduler, loader
        self.validate, self.save, self.on_epoch, self.progress = validate, save, on_epoch, progress
        self.device, self.precision = device, precision
        self.epochs, self.early_stop, self.save_period, self.log_period = epochs, early_stop, save_period, log_period
        self.monitor_metric, self.monitor_mode, self.start_eval_epoch = monitor_metric, monitor_mode, start_eval_epoch
        self.grad_accumulation, self.clip_norm, self.clip_value = grad_accumulation, clip_norm, clip_value
        # Without float16 the scaler multiplies by 1: it then only keeps non-finite gradients out of the weights,
        # on the device, with no synchronisation.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if precision == "float16" else 1.0)
        self.best, self.history, self.first_epoch = Best(), [], 1
        self.steps, self.taken = 0, 0  # steps of all epochs, and at the last check those that reached the weights

    def train(self) -> None:
        """Run the remaining epochs; stop when validation has not improved for more than ``early_stop`` epochs."""
        self.taken = self._steps_taken()
        for epoch in range(self.first_epoch, self.epochs + 1):
            started = time.monotonic()
            row = {"epoch": epoch, "lr_ve": self.optimizer.param_groups[0]["lr"],
                   "lr_ed": self.optimizer.param_groups[-1]["lr"]}
            row |= {f"train_{name}": value for name, value in self._train_epoch(epoch).items()}
            improved, scores = False, None
            if epoch >= self.start_eval_epoch:
                scores = self.validate(epoch)
                row |= {f"val_{name}": value for name, value in scores.items()}
                improved = self.best.judge(scores.get(self.monitor_metric), epoch, self.monitor_mode)
            self.scheduler.step(scores)
            self.history.append(row | {"seconds": time.monotonic() - started})
            self._log_epoch(self.history[-1], improved)
            if improved or epoch % self.save_period == 0 or epoch == self.epochs:
                self.save(self, epoch, improved)
            self.on_epoch(self.history)
            if self.best.epochs_without > self.early_stop:
                logger.info("val_%s has not improved for %d epochs: training stops", self.monitor_metric,
                            self.best.epochs_without)
                break

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.objective.train()
        self.loader.set_epoch(epoch)
        sums: dict[str, Tensor] = {}
        steps, batches = 0, 0
        bar = self.progress(self.loader, f"epoch {epoch}/{self.epochs}")
        for group in _groups(bar, self.grad_accumulation):
            for terms in self._accumulate(group, epoch):
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value
            self._update()
            steps, batches, self.steps = steps + 1, batches + len(group), self.steps + 1
            # Reading a value waits for the device: only when the bar is due, or once in log_period steps.
            if steps % self.log_period == 0 or bar.due():
                means = _means(sums, steps, batches)
                bar.show(means)
                if steps % self.log_period == 0:
                    logger.info("epoch %d step %d %s", epoch, steps, _shown(means))
            if self.steps % MOST_SKIPPED_IN_A_ROW == 0:
                self.taken = self._require_progress(self.taken)
        return _means(sums, steps, batches) | {"steps": steps}

    def _accumulate(self, group: list, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Gradients of one optimiser step; the cross entropy is normalised by the tokens of the whole group."""
        group = [batch.to(self.device) for batch in group]
        token_count = sum(batch.positive.token_mask[:, 1:].sum() for batch in group)
        for batch in group:
            with autocast(self.device, self.precision):
                terms = self.objective(batch, epoch, token_count=token_count, share=1.0 / len(group))
            self.scaler.scale(terms["loss"]).backward()
            yield {name: value.detach() for name, value in terms.items()}

    def _update(self) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.clip_norm or self.clip_value:
            self.scaler.unscale_(self.optimizer)
        if self.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if self.clip_value:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.precision == "float16" else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step()

    def _steps_taken(self) -> int:
        """Updates that reached the weights: the optimiser does not count those that were skipped."""
        states = (self.optimizer.state[p] for group in self.optimizer.param_groups for p in group["params"])
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def _require_progress(self, before: int) -> int:
        taken = self._steps_taken()
        if taken == before and any("step" in state for state in self.optimizer.state.values()):
            raise InputError(f"loss or gradient not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row; no weight was "
                             "changed by them. Lower --lr_ve and --lr_ed, or use --precision float32 or --clip_norm 1")
        return taken

    def _log_epoch(self, row: Mapping[str, Any], improved: bool) -> None:
        best = self.best
        logger.info("epoch %d: %s", row["epoch"], _shown({k: v for k, v in row.items() if k != "epoch"}))
        if improved:
            logger.info("best epoch so far by validation %s = %.4f", self.monitor_metric, best.score)


def _groups(batches: Iterable, size: int) -> Iterator[list]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _means(sums: Mapping[str, Tensor], steps: int, batches: int) -> dict[str, float]:
    """Mean loss of a step, whose accumulated batches add up to it, and mean of every other term of a batch."""
    return {name: float(value) / (steps if name == "loss" else batches) for name, value in sums.items()}


def _shown(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in values.items())
