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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modules.evaluation.metric_table import SELECTION, tagged
from modules.runtime import distributed
from modules.runtime.distributed import restore_rng_state, rng_state, seed_by
from modules.runtime.environment import autocast
from modules.runtime.errors import InputError
from modules.runtime.run_log import Bar, in_lines
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.average_meter import AverageMeter
from modules.training.lean_pass import LeanPass
from modules.training.non_finite_guard import NonFiniteGuard, are_finite, nan_unless_finite
from modules.training.optimizers import build_optimizer, build_scheduler, learning_rates
from modules.training.settings import LoopSettings, OptimSettings
from modules.training.step_graphs import StepGraphs

if TYPE_CHECKING:  # imported where several processes share parameters
    from modules.runtime.sharding import Shards

logger = logging.getLogger("ithn")


@dataclasses.dataclass
class Best:
    """What model selection and early stopping remember."""

    score: float | None = None
    epoch: int = 0
    epochs_without: int = 0

    def update(self, score: float | None, epoch: int, smaller_is_better: bool) -> bool:
        """Whether ``score`` is the best so far; an equal score counts as better, as in the R2Gen family."""
        sign = -1 if smaller_is_better else 1
        if score is not None and math.isfinite(score) and (self.score is None or sign * score >= sign * self.score):
            self.score, self.epoch, self.epochs_without = score, epoch, 0
            return True
        self.epochs_without += 1
        return False


@dataclasses.dataclass
class Position:
    """How far training has come, between two optimiser steps."""

    epoch: int = 1
    batches: int = 0  # of this epoch that are done, in each process
    samples: int = 0  # in them, in all processes
    steps: int = 0  # of this epoch
    total_steps: int = 0  # of all epochs
    trained: bool = False  # no batch of this epoch is left: its validation comes next
    seconds: float = 0.0  # that this epoch has taken


class Trainer:
    """Trains ``objective`` and leaves the best epoch's weights to ``save``.

    ``objective(batch, epoch, token_count=, share=)`` returns a dictionary with "loss" and the terms to log, scalars;
    ``validate(epoch)`` returns metrics of the validation split, whose names end in ``score_tag``, and
    ``likelihood(epoch)`` the cheap one of them, ``nll``, for the epochs in between;
    ``save(trainer, improved)`` writes a checkpoint, which needs ``state_dict()``; ``on_epoch(history)`` draws curves.
    Epochs count from 1. When ``shutdown`` raises Stopped, the state is saved and the exception propagates. Each of
    several processes draws its random numbers by ``seed``, step and rank, so that a checkpoint needs no generator's
    state of any. ``cuda_graph`` replays whole steps on a GPU. With ``shards`` of the objective every process saves, and
    only the main one has something to write.
    """

    def __init__(
        self,
        objective: nn.Module,
        optim: OptimSettings,
        loop: LoopSettings,
        *,
        loader: Any,
        validate: Callable[[int], Mapping[str, float | None]],
        likelihood: Callable[[int], Mapping[str, float | None]],
        save: Callable[["Trainer", bool], None],
        on_epoch: Callable[[list[dict]], None],
        shutdown: GracefulShutdown,
        device: torch.device,
        precision: str,
        seed: int = 0,
        score_tag: str = "",
        cuda_graph: bool = False,
        shards: "Shards | None" = None,
    ):
        self.objective: Any = objective
        self.optim, self.loop, self.loader = optim, loop, loader
        self.validate, self.likelihood = validate, likelihood
        self.save, self.on_epoch, self.shutdown = save, on_epoch, shutdown
        self.device, self.precision, self.seed = device, precision, seed
        self.monitored = tagged(loop.monitor_metric, score_tag)
        self.shards = shards
        lean = device.type == "cuda" or precision != "float32"  # else there is nothing to gain
        self.parallel: Any = shards or distributed.data_parallel(LeanPass(objective, precision) if lean else objective)
        self.optimizer = build_optimizer(objective, optim, distributed.world_size())
        self.scheduler = build_scheduler(self.optimizer, optim, score_tag)
        # Without float16 the scaler multiplies by 1: it then only keeps non-finite gradients out of the weights,
        # on the device, with no synchronisation.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if precision == "float16" else 1.0)
        self.guard = NonFiniteGuard(objective, device, scaled=precision == "float16")
        self.graphs = self._step_graphs() if cuda_graph else None
        self.best, self.position, self.means = Best(), Position(), AverageMeter()
        self.history: list[dict[str, Any]] = []
        self._rng_before_validation: dict[str, Any] | None = None
        self._saved: Position | None = None
        if shards is not None:
            shutdown.follow()

    def _step_graphs(self) -> StepGraphs | None:
        """What replays steps; None, and a line in the log, where that cannot be."""
        reason = "with several processes" if distributed.is_distributed() else ""
        reason = reason or ("without a GPU" if self.device.type != "cuda" else "")
        if reason:
            logger.info("--cuda_graph: steps are computed without a graph %s", reason)
            return None
        lengthen = getattr(self.objective, "takes_longer_reports", False)
        return StepGraphs(self._compute, self.optimizer, self._forget_recording, device=self.device, lengthen=lengthen)

    # ---- Epochs

    def train(self) -> None:
        """Train up to the last epoch, or until validation has not improved for more than early_stop epochs."""
        try:
            while not self._finished():
                self._epoch()
        except Stopped as stopped:
            self.shutdown.accept()
            self._save_if_unsaved()
            logger.info(
                "%s: stopped in epoch %d after step %d of it; everything up to there is saved",
                stopped.name,
                self.position.epoch,
                self.position.steps,
            )
            raise

    @property
    def has_ended(self) -> bool:
        """Whether no epoch is left, or training was stopped early."""
        return self._is_exhausted or self.position.epoch > self.optim.epochs

    @property
    def _is_exhausted(self) -> bool:
        return self.best.epochs_without > self.loop.early_stop

    def _finished(self) -> bool:
        if self._is_exhausted:
            logger.info(
                "val_%s has not improved for %d epochs: training stops", self.monitored, self.best.epochs_without
            )
        return self.has_ended

    def _epoch(self) -> None:
        started, before = time.monotonic(), self.position.seconds
        if not self.position.trained:
            self._train_epoch(lambda: before + time.monotonic() - started)
        scores = None
        if (epoch := self.position.epoch) >= self._first_validated:
            # Sampling draws random numbers: a checkpoint made during validation must resume before them.
            self._rng_before_validation = rng_state()
            with self.whole():
                scores = self.validate(epoch) if self._is_validated(epoch) else self.likelihood(epoch)
        with self.shutdown.deferred():
            self._rng_before_validation = None
            self._end_epoch(scores, before + time.monotonic() - started)
        self.on_epoch(self.history)
        self._stop_together()

    @property
    def _first_validated(self) -> int:
        return max(self.loop.start_eval_epoch, 1)

    def _is_validated(self, epoch: int) -> bool:
        """Whether reports are generated after it."""
        due = (epoch - self._first_validated) % self.loop.eval_every == 0 or epoch == self.optim.epochs
        return epoch >= self._first_validated and due

    def _train_epoch(self, seconds: Callable[[], float]) -> None:
        position, every = self.position, self.loop.checkpoint_steps
        self.objective.train()
        self.loader.set_epoch(position.epoch, position.samples)
        bar = Bar(self.loader, f"epoch {position.epoch}/{self.optim.epochs}", position.batches)
        for batches in self._batches_of_steps(bar):
            with self.shutdown.deferred():
                self._step(batches)
                self._advance(batches, seconds())
                if every and position.total_steps % every == 0:
                    distributed.average_running_statistics(self.objective)
                    self._save(improved=False)
                self._log_step(bar)
            self._stop_together()
        with self.shutdown.deferred():
            self.guard.read()
            distributed.average_running_statistics(self.objective)
            position.trained, position.seconds = True, seconds()
            # Whatever happens in the validation, the epoch is safe. Without one, the end of the epoch saves it at once.
            if self._checkpoint_is_due() and self._is_validated(position.epoch):
                self._save(improved=False)

    def _batches_of_steps(self, batches: Iterable) -> Iterator[list]:
        """The batches of each optimiser step; where reading one fails, what was reached is saved first."""
        iterator = iter(batches)
        try:
            while group := list(itertools.islice(iterator, self.optim.grad_accumulation)):
                yield group
        except InputError:
            if self.shards is None:  # the other processes would have to take part
                self._save_if_unsaved()
            raise

    def _stop_together(self) -> None:
        """Where parameters are shared out, end in every process after the same step when any has had a signal."""
        if self.shards is not None and (number := distributed.largest(self.shutdown.number or 0)):
            raise Stopped(number)

    # ---- One optimiser step

    def _step(self, batches: Sequence[Any]) -> None:
        """One optimiser step over ``batches``; it is undone and counted if a loss or gradient is not finite."""
        if distributed.is_distributed():
            seed_by(self.seed, self.position.epoch, self.position.steps, distributed.rank())
        self.guard.before_step()
        # The cross entropy is normalised by the tokens of the whole step. They are counted on the CPU, where the masks
        # still are: the processes meet without waiting for a device.
        token_count = distributed.all_reduce_sum(sum(batch.positive.token_mask[:, 1:].sum() for batch in batches))
        compute = self.graphs.step if self.graphs is not None else self._compute
        terms, skipped = compute(batches, self.position.epoch, token_count)
        finite_loss = self.means.add(terms)
        rows = [batch.sample_index for batch in batches]
        self.guard.after_step(skipped, finite_loss, rows, self.position.epoch, self.position.steps + 1)

    def _compute(
        self, batches: Sequence[Any], epoch: int | Tensor, token_count: Tensor
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Forward, backward and update: the terms of every batch, and whether the weights were left alone."""
        terms = []
        for number, batch in enumerate(batches, start=1):
            # Only the last backward pass of a step adds up the processes' gradients.
            last = number == len(batches)
            add_up = last or self.shards is not None  # whole gradients would not fit
            with contextlib.nullcontext() if add_up else distributed.no_gradient_sync(self.parallel):
                terms.append(self._forward_backward(batch, epoch, token_count, share=1.0 / len(batches)))
        return terms, self._update()

    def _forget_recording(self) -> None:
        """Gradients and the scaler as before a step that could not be recorded."""
        self.optimizer.zero_grad(set_to_none=True)
        state, self.scaler = self.scaler.state_dict(), torch.amp.GradScaler(self.device.type)
        self.scaler.load_state_dict(state)

    def _forward_backward(
        self, batch: Any, epoch: int | Tensor, token_count: Tensor, share: float
    ) -> dict[str, Tensor]:
        """Add the gradients of ``batch``; returns its loss and terms, detached scalars."""
        with autocast(self.device, self.precision):
            terms = self.parallel(batch.to(self.device), epoch, token_count=token_count, share=share)
        self.scaler.scale(nan_unless_finite(terms["loss"])).backward()
        return {name: value.detach() for name, value in terms.items()}

    def _update(self) -> Tensor:
        """Change the weights, unless a gradient is not finite; returns whether they were left alone, a bool scalar."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler.unscale_(self.optimizer)
        skipped = ~are_finite([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.optim.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm)
        if self.optim.clip_value:
            nn.utils.clip_grad_value_(parameters, self.optim.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.precision == "float16" else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step()
        return skipped

    def _advance(self, batches: Sequence[Any], seconds: float) -> None:
        position = self.position
        position.batches, position.steps = position.batches + len(batches), position.steps + 1
        position.samples += sum(len(batch.sample_index) for batch in batches) * distributed.world_size()
        position.total_steps, position.seconds = position.total_steps + 1, seconds

    def _log_step(self, bar: Any) -> None:
        """Reading a value waits for the device: only when the bar is due, or once in log_period steps."""
        position, due = self.position, self.position.steps % self.loop.log_period == 0
        if due or bar.due():
            means = self.means.read()
            bar.show(means)
            if due:
                for line in _shown(f"epoch {position.epoch} step {position.steps}:  ", means):
                    logger.info("%s", line)

    # ---- The end of an epoch

    def _end_epoch(self, scores: Mapping[str, float | None] | None, seconds: float) -> None:
        """Judge the epoch, enter it into the history, and advance to the next."""
        position = self.position
        row: dict[str, Any] = {"epoch": position.epoch, **learning_rates(self.optimizer)}
        row |= {f"train_{name}": value for name, value in self.means.read().items()}
        row |= {"train_steps": position.steps, "train_skipped_steps": self.guard.skipped}
        row |= {f"val_{name}": value for name, value in (scores or {}).items()}
        if scores is not None and self.monitored not in scores:
            scores = None  # nothing to judge this epoch by
        improved = scores is not None and self.best.update(
            scores.get(SELECTION, scores.get(self.monitored)), position.epoch, self.loop.monitors_minimum
        )
        self.scheduler.step(scores)
        self.history.append(row | {"seconds": seconds})
        self._log_epoch(self.history[-1], improved)
        # Where validation found nothing better, the checkpoint from before it has the same weights: a run that is
        # killed before the next one validates again, to the same end.
        due = self._checkpoint_is_due() and self._saved != position
        self.position = Position(epoch=position.epoch + 1, total_steps=position.total_steps)
        self.means = AverageMeter()
        self.guard.start_epoch()
        if improved or due or self.has_ended:
            self._save(improved)

    def _log_epoch(self, row: Mapping[str, Any], improved: bool) -> None:
        for line in epoch_table(row):
            logger.info("%s", line)
        if left := self.optim.epochs - row["epoch"]:
            seconds = left * sum(past["seconds"] for past in self.history) / len(self.history)
            logger.info("  %d of %d epochs left, at this pace %s", left, self.optim.epochs, _duration(seconds))
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
            logger.info("best epoch so far by validation %s = %.4f", self.monitored, self.best.score)

    # ---- Checkpoints

    def whole(self) -> contextlib.AbstractContextManager:
        """A block in which every process has all weights; what is written to shared ones is lost at its end."""
        return contextlib.nullcontext() if self.shards is None else self.shards.whole()

    def weights(self) -> dict[str, Tensor]:
        """The objective's state dict of tensors of any shape; where they are shared, in the main process alone."""
        return self.objective.state_dict() if self.shards is None else self.shards.state_dict()

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load ``weights``, of any shape; RuntimeError where they do not fit."""
        (self.objective if self.shards is None else self.shards).load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that an exact resume needs; of shared ones, whole in the main process alone."""
        self.guard.read()
        shards, optimizer = self.shards, self.optimizer
        return {
            "optimizer": optimizer.state_dict() if shards is None else shards.optimizer_state(optimizer),
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
        """Continue from a stored ``state_dict``."""
        if self.shards is None:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.shards.load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # A run that went on in another precision finds its own loss scale; in all but float16 it is 1.
        if (self.precision == "float16") == (state["scaler"].get("scale", 1.0) != 1.0):
            self.scaler.load_state_dict(state["scaler"])
        self.history, self.best = list(state["history"]), Best(**state["best"])
        self.position = Position(**state["position"])
        self.means.load_state_dict(state["means"], self.device)
        self.guard.load_state_dict(state["guard"])
        restore_rng_state(state["rng"])
        self._saved = dataclasses.replace(self.position)

    def _checkpoint_is_due(self) -> bool:
        return self.position.epoch % self.loop.save_period == 0 or self.position.epoch == self.optim.epochs

    def _save(self, improved: bool) -> None:
        self.save(self, improved)
        self._saved = dataclasses.replace(self.position)

    def _save_if_unsaved(self) -> None:
        with self.shutdown.deferred():
            if self._saved != self.position:
                self._save(improved=False)


def epoch_table(row: Mapping[str, Any]) -> list[str]:
    """An epoch's row of the history as lines for the log: steps, time and rates; losses; validation scores."""
    rates = f"learning rate {row['lr_ed']:.3g} (visual extractor not trained)"
    if "lr_ve" in row:
        rates = f"learning rates {row['lr_ve']:.3g} (visual extractor) and {row['lr_ed']:.3g}"
    lines = [f"epoch {row['epoch']}: {row['train_steps']} steps in {_duration(row['seconds'])}, {rates}"]
    counts = ("train_steps", "train_skipped_steps")
    for name, prefix in (("training", "train_"), ("validation", "val_")):
        values = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix) and key not in counts}
        lines += _shown(f"  {name:<12}", values) if values else []
    return lines


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"


def _shown(heading: str, values: Mapping[str, float | None]) -> list[str]:
    """Values behind their ``heading``, in lines; what is missing is a dash."""
    return in_lines(
        heading, (f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in values.items())
    )
