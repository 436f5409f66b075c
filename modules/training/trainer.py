"""The training loop: epochs, validation, learning-rate schedule, best model, early stop.

It knows an objective that maps a batch to a dictionary of losses, and nothing about backbones or ITHN. Several
processes take every step together, each with its share of the batch, and come to the same weights and decisions.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modules.evaluation.score_names import SELECTION
from modules.evaluation.tester import autocast
from modules.runtime import distributed
from modules.runtime.distributed import restore_rng_state, rng_state, seed_by
from modules.runtime.errors import InputError
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.running_means import RunningMeans
from modules.training.step_guard import StepGuard
from modules.training.training_state import Best, Position

logger = logging.getLogger("ithn")


class Trainer:
    """Trains ``objective`` and leaves the best epoch's weights to ``save``.

    ``objective(batch, epoch, token_count=, share=)`` returns a dictionary with "loss" and the terms to log;
    ``validate(epoch)`` returns metrics of the validation split; ``save(trainer, improved)`` writes a checkpoint, which
    needs ``state_dict()``; ``on_epoch(history)`` draws curves. ``epoch`` counts from 1. ``checkpoint_steps`` is the
    number of optimiser steps between checkpoints within an epoch, 0 for none. When ``shutdown`` raises Stopped, the
    state is saved and the exception propagates. Of several processes each draws its random numbers by ``seed``, step
    and rank, so that a checkpoint needs no generator's state of any.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        loader: Any,
        validate: Callable[[int], Mapping[str, float | None]],
        save: Callable[["Trainer", bool], None],
        on_epoch: Callable[[list[dict]], None],
        progress: Callable[..., Any],
        shutdown: GracefulShutdown,
        device: torch.device,
        precision: str,
        epochs: int,
        early_stop: int,
        monitor_metric: str,
        monitor_mode: str,
        save_period: int,
        checkpoint_steps: int,
        log_period: int,
        start_eval_epoch: int,
        grad_accumulation: int,
        clip_norm: float,
        clip_value: float,
        seed: int = 0,
    ):
        self.objective, self.optimizer, self.scheduler, self.loader = objective, optimizer, scheduler, loader
        self.validate, self.save, self.on_epoch, self.progress = validate, save, on_epoch, progress
        self.shutdown, self.device, self.precision = shutdown, device, precision
        self.epochs, self.early_stop, self.save_period, self.log_period = epochs, early_stop, save_period, log_period
        self.monitor_metric, self.monitor_mode, self.start_eval_epoch = monitor_metric, monitor_mode, start_eval_epoch
        self.checkpoint_steps, self.grad_accumulation = checkpoint_steps, grad_accumulation
        self.clip_norm, self.clip_value, self.seed = clip_norm, clip_value, seed
        self.parallel = distributed.data_parallel(objective)
        # Without float16 the scaler multiplies by 1: it then only keeps non-finite gradients out of the weights,
        # on the device, with no synchronisation.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if precision == "float16" else 1.0)
        self.guard = StepGuard(objective, device, scales=precision == "float16")
        self.best, self.history, self.position, self.means = Best(), [], Position(), RunningMeans()
        self._rng_before_validation: dict[str, Any] | None = None
        self._saved: Position | None = None

    def train(self) -> None:
        """Run what remains; stop when validation has not improved for more than ``early_stop`` epochs."""
        try:
            while not self._finished():
                self._epoch()
        except Stopped as stopped:
            self.shutdown.accept()
            self._save_unsaved()
            logger.info(
                "%s: stopped in epoch %d after step %d of it; everything up to there is saved",
                stopped.name,
                self.position.epoch,
                self.position.steps,
            )
            raise

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that training goes on from, bit by bit."""
        self.guard.read()
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self._rng_before_validation or rng_state(),
            "history": self.history,
            "best": dataclasses.asdict(self.best),
            "position": dataclasses.asdict(self.position),
            "means": self.means.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a kept ``state_dict``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.best = list(state["history"]), Best(**state["best"])
        self.position = Position(**state["position"])
        self.means.load_state_dict(state["means"], self.device)
        self.guard.load_state_dict(state["guard"])
        restore_rng_state(state["rng"])
        self._saved = dataclasses.replace(self.position)

    def _finished(self) -> bool:
        if self.best.epochs_without > self.early_stop:
            logger.info(
                "val_%s has not improved for %d epochs: training stops", self.monitor_metric, self.best.epochs_without
            )
            return True
        return self.position.epoch > self.epochs

    def _epoch(self) -> None:
        started, before = time.monotonic(), self.position.seconds
        if not self.position.trained:
            self._train_epoch(lambda: before + time.monotonic() - started)
        scores = None
        if self.position.epoch >= self.start_eval_epoch:
            # Sampling draws: a checkpoint made while validation runs must begin it anew.
            self._rng_before_validation = rng_state()
            scores = self.validate(self.position.epoch)
        with self.shutdown.deferred():
            self._rng_before_validation = None
            self._end_epoch(scores, before + time.monotonic() - started)
        self.on_epoch(self.history)

    def _train_epoch(self, seconds: Callable[[], float]) -> None:
        position = self.position
        self.objective.train()
        self.loader.set_epoch(position.epoch, position.samples)
        bar = self.progress(self.loader, f"epoch {position.epoch}/{self.epochs}", position.batches)
        for group in self._groups(bar):
            with self.shutdown.deferred():
                self._step(group)
                position.batches, position.steps = position.batches + len(group), position.steps + 1
                position.samples += sum(len(batch.sample_index) for batch in group) * distributed.world_size()
                position.total_steps, position.seconds = position.total_steps + 1, seconds()
                if self.checkpoint_steps and position.total_steps % self.checkpoint_steps == 0:
                    distributed.average_running_statistics(self.objective)
                    self._save(improved=False)
                self._log_step(bar)
        with self.shutdown.deferred():
            self.guard.read()
            distributed.average_running_statistics(self.objective)
            position.trained, position.seconds = True, seconds()
            # Whatever becomes of the validation, the epoch is safe.
            if self._due():
                self._save(improved=False)

    def _groups(self, batches: Iterable) -> Iterator[list]:
        """The batches of each optimiser step; what was reached is saved where no more can be read."""
        iterator = iter(batches)
        try:
            while group := list(itertools.islice(iterator, self.grad_accumulation)):
                yield group
        except InputError:
            self._save_unsaved()
            raise

    def _log_step(self, bar: Any) -> None:
        """Reading a value waits for the device: only when the bar is due, or once in log_period steps."""
        position, due = self.position, self.position.steps % self.log_period == 0
        if due or bar.due():
            means = self.means.read()
            bar.show(means)
            if due:
                logger.info("epoch %d step %d: %s", position.epoch, position.steps, _shown(means))

    def _step(self, group: list) -> None:
        """One optimiser step over the batches of ``group``, counted and kept out of the model if it is not finite."""
        if distributed.is_distributed():
            seed_by(self.seed, self.position.epoch, self.position.steps, distributed.rank())
        self.guard.begin()
        terms = list(self._accumulate(group))
        finite_loss = torch.stack([term["loss"] for term in terms]).isfinite().all()
        skipped = self._update()
        finite_loss = self.means.add(terms, finite_loss)
        self.guard.settle(
            skipped, finite_loss, [batch.sample_index for batch in group], self.position.epoch, self.position.steps + 1
        )

    def _accumulate(self, group: list) -> Iterator[dict[str, Tensor]]:
        """Gradients of one optimiser step; the cross entropy is normalised by the tokens of the whole step."""
        # On the CPU, where the masks are still: the processes meet without waiting for a device.
        token_count = distributed.all_reduce_sum(sum(batch.positive.token_mask[:, 1:].sum() for batch in group))
        for number, batch in enumerate(group, start=1):
            # Only the last backward pass of a step brings the processes' gradients together.
            with contextlib.nullcontext() if number == len(group) else distributed.no_gradient_sync(self.parallel):
                with autocast(self.device, self.precision):
                    terms = self.parallel(
                        batch.to(self.device), self.position.epoch, token_count=token_count, share=1.0 / len(group)
                    )
                # A loss that is not finite can have finite gradients: it makes all of them NaN, and the scaler sees it.
                sound = torch.where(terms["loss"].detach().isfinite(), 1.0, math.nan)
                self.scaler.scale(terms["loss"] * sound).backward()
            yield {name: value.detach() for name, value in terms.items()}

    def _update(self) -> Tensor:
        """Change the weights, unless a gradient is not finite; returns whether they were left alone (bool scalar)."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler.unscale_(self.optimizer)
        found = sum(self.scaler._found_inf_per_device(self.optimizer).values())
        if self.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if self.clip_value:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.precision == "float16" else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step()
        return found.squeeze() > 0

    def _end_epoch(self, scores: Mapping[str, float | None] | None, seconds: float) -> None:
        """Judge the epoch, enter it into the history, and go on to the next."""
        position, groups = self.position, self.optimizer.param_groups
        row = {"epoch": position.epoch, "lr_ve": groups[0]["lr"], "lr_ed": groups[-1]["lr"]}
        row |= {f"train_{name}": value for name, value in self.means.read().items()}
        row |= {"train_steps": position.steps, "train_skipped_steps": self.guard.skipped}
        row |= {f"val_{name}": value for name, value in (scores or {}).items()}
        improved = scores is not None and self.best.judge(
            scores.get(SELECTION, scores.get(self.monitor_metric)), position.epoch, self.monitor_mode
        )
        self.scheduler.step(scores)
        self.history.append(row | {"seconds": seconds})
        self._log_epoch(self.history[-1], improved)
        due = self._due()
        self.position = Position(epoch=position.epoch + 1, total_steps=position.total_steps)
        self.means = RunningMeans()
        self.guard.start_epoch()
        if improved or due:
            self._save(improved)

    def _due(self) -> bool:
        return self.position.epoch % self.save_period == 0 or self.position.epoch == self.epochs

    def _save(self, improved: bool) -> None:
        self.save(self, improved)
        self._saved = dataclasses.replace(self.position)

    def _save_unsaved(self) -> None:
        with self.shutdown.deferred():
            if self._saved != self.position:
                self._save(improved=False)

    def _log_epoch(self, row: Mapping[str, Any], improved: bool) -> None:
        for line in epoch_table(row):
            logger.info("%s", line)
        if self.guard.skipped:
            scale = f"; the loss scale is {self.scaler.get_scale():g}" if self.precision == "float16" else ""
            logger.warning(
                "epoch %d: %d of %d steps were skipped because their loss or gradient was not finite%s",
                row["epoch"],
                self.guard.skipped,
                row["train_steps"],
                scale,
            )
        if improved:
            logger.info("best epoch so far by validation %s = %.4f", self.monitor_metric, self.best.score)


def epoch_table(row: Mapping[str, Any]) -> list[str]:
    """An epoch's row of the history as lines for the log: steps, time and rates; losses; validation scores."""
    minutes, seconds = divmod(round(row["seconds"]), 60)
    rates = f"learning rates {row['lr_ve']:.3g} (visual extractor) and {row['lr_ed']:.3g}"
    lines = [f"epoch {row['epoch']}: {row['train_steps']} steps in {minutes} min {seconds:02d} s, {rates}"]
    counts = ("train_steps", "train_skipped_steps")
    for name, prefix in (("training", "train_"), ("validation", "val_")):
        values = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix) and key not in counts}
        lines += [f"  {name:<12}{_shown(values)}"] if values else []
    return lines


def _shown(values: Mapping[str, float | None]) -> str:
    """Values in columns; what is missing is a dash."""
    return "  ".join(f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in values.items())
