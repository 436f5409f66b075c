"""Keeps a step whose loss or gradient is not finite out of the model, and counts such steps.

Only ``read`` waits for the device. Within an epoch, what is known of the steps follows them some steps later.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modules.runtime.distributed import gather, own_part
from modules.runtime.errors import InputError
from modules.runtime.transfers import Download

logger = logging.getLogger("ithn")

MOST_SKIPPED_IN_A_ROW = 25  # one more ends the run
MOST_ROWS_SHOWN = 64


def nan_unless_finite(loss: Tensor) -> Tensor:
    """``loss`` with gradients that are NaN where the scalar itself is not finite.

    A loss that is not finite can have finite gradients, by which the gradient scaler would not see it.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def are_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Whether all values of ``gradients`` (any shapes) are finite, a bool scalar on their device."""
    # The largest absolute value is finite exactly if all are; a sum of squares could overflow.
    parts = [own_part(gradient) for gradient in gradients]
    largest = nn.utils.get_total_norm([part for part in parts if part.numel()], norm_type=math.inf)
    shared = any(part is not gradient for part, gradient in zip(parts, gradients, strict=True))
    return gather(largest.view(1)).isfinite().all() if shared else largest.isfinite()


class NonFiniteGuard:
    """Restores the running statistics that a skipped step has changed in ``objective``, and counts skipped steps.

    Leaving the weights alone is the gradient scaler's part. ``scaled`` says that a gradient may overflow without any
    fault (float16): then only a loss that is not finite is worth a line in the log.
    """

    def __init__(self, objective: nn.Module, device: torch.device, *, scaled: bool):
        self._statistics = [
            buffer for name, buffer in objective.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        self._scaled = scaled
        self._before: Tensor | None = None
        self._flags: list[Tensor] = []
        self._steps: list[tuple[int, int, Sequence[Tensor]]] = []
        self._sent: tuple[Download, list[tuple[int, int, Sequence[Tensor]]]] | None = None
        self._read_every = 1 if device.type == "cpu" else MOST_SKIPPED_IN_A_ROW
        self.in_a_row = self.skipped = 0

    def before_step(self) -> None:
        """To be called before the first forward pass of a step."""
        if self._statistics:
            self._before = torch.cat(self._statistics)

    def after_step(self, skipped: Tensor, finite_loss: Tensor, rows: Sequence[Tensor], epoch: int, step: int) -> None:
        """To be called after a step; ``skipped`` and ``finite_loss`` are bool scalars on the device.

        ``rows`` are the sample indices (B,) of its batches, on the CPU. InputError where too many steps in a row have
        been skipped.
        """
        if self._before is not None:
            kept = torch.where(skipped, self._before, torch.cat(self._statistics))
            torch._foreach_copy_(self._statistics, kept.split([len(buffer) for buffer in self._statistics]))
        self._flags.append(torch.stack([skipped, finite_loss]))
        self._steps.append((epoch, step, rows))
        if len(self._steps) >= self._read_every:
            self._judge_sent()  # sent so many steps ago that it has arrived
            self._send()
            if self._read_every == 1:
                self._judge_sent()

    def read(self) -> None:
        """Look at the steps since the last call; InputError where too many in a row have been skipped."""
        self._judge_sent()
        if self._steps:
            self._send()
            self._judge_sent()

    def _send(self) -> None:
        self._sent = Download(torch.stack(self._flags)), self._steps
        self._flags, self._steps = [], []

    def _judge_sent(self) -> None:
        if self._sent is None:
            return
        (sent, steps), self._sent = self._sent, None
        flags = sent.value().tolist()
        for (skipped, finite_loss), (epoch, step, rows) in zip(flags, steps, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            self.skipped += skipped
            if skipped and not (self._scaled and finite_loss):
                logger.warning(
                    "epoch %d step %d: the %s is not finite and no weight was changed; samples of the "
                    "training split: %s",
                    epoch,
                    step,
                    "gradient" if finite_loss else "loss",
                    _shown(rows),
                )
            if self.in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise InputError(
                    f"loss or gradient not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row, up to epoch {epoch} step "
                    f"{step}; no weight was changed by them. Lower --lr_ve and --lr_ed, or use --precision float32 or "
                    "--clip_norm 1"
                )

    def start_epoch(self) -> None:
        """Count the skipped steps of an epoch from 0."""
        self.skipped = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint stores; ``read`` comes first."""
        assert not self._steps and self._sent is None
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a stored state."""
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]


def _shown(rows: Sequence[Tensor]) -> str:
    numbers = torch.cat(list(rows)).tolist()
    more = f" and {len(numbers) - MOST_ROWS_SHOWN} more" if len(numbers) > MOST_ROWS_SHOWN else ""
    return " ".join(map(str, numbers[:MOST_ROWS_SHOWN])) + more
