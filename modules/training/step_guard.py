"""Keeps a step whose loss or gradient is not finite out of the model, and counts such steps.

Nothing here waits for the device but ``read``.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modules.runtime.errors import InputError

logger = logging.getLogger("ithn")

# So many skipped steps in a row end the run.
MOST_SKIPPED_IN_A_ROW = 25
MOST_ROWS_SHOWN = 64


class StepGuard:
    """Restores the running statistics that a skipped step has changed in ``objective``, and counts skipped steps.

    The optimiser's own part, leaving the weights alone, is the gradient scaler's. ``scales`` says that a gradient
    may overflow without any fault (float16): only a loss that is not finite is then worth a line with its samples.
    """

    def __init__(self, objective: nn.Module, device: torch.device, *, scales: bool):
        self._statistics = [
            buffer
            for module in objective.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
        ]
        self._scales = scales
        self._before: Tensor | None = None
        self._flags: list[Tensor] = []
        self._steps: list[tuple[int, int, Sequence[Tensor]]] = []
        self._read_every = 1 if device.type == "cpu" else MOST_SKIPPED_IN_A_ROW
        self.in_a_row = self.skipped = 0

    def begin(self) -> None:
        """To be called before the first forward pass of a step."""
        if self._statistics:
            self._before = _flat(self._statistics)

    def settle(self, skipped: Tensor, finite_loss: Tensor, rows: Sequence[Tensor], epoch: int, step: int) -> None:
        """To be called after a step: ``skipped`` and ``finite_loss`` are bool scalars on the device.

        ``rows`` are the sample indices of its batches, on the CPU.
        """
        if self._before is not None:
            kept = torch.where(skipped, self._before, _flat(self._statistics))
            sizes = [len(buffer) for buffer in self._statistics]
            torch._foreach_copy_(self._statistics, list(kept.split(sizes)))
        self._flags.append(torch.stack([skipped, finite_loss]))
        self._steps.append((epoch, step, rows))
        if len(self._steps) >= self._read_every:
            self.read()

    def read(self) -> None:
        """Look at the steps since the last call; InputError where too many in a row have been skipped."""
        flags = torch.stack(self._flags).tolist() if self._flags else []
        steps, self._flags, self._steps = self._steps, [], []
        for (skipped, finite_loss), (epoch, step, rows) in zip(flags, steps, strict=True):
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            self.skipped += skipped
            if skipped and not (self._scales and finite_loss):
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
        """What a checkpoint keeps, once everything was read."""
        assert not self._steps
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up a kept state."""
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])


def _shown(rows: Sequence[Tensor]) -> str:
    numbers = torch.cat(list(rows)).tolist()
    more = f" and {len(numbers) - MOST_ROWS_SHOWN} more" if len(numbers) > MOST_ROWS_SHOWN else ""
    return " ".join(map(str, numbers[:MOST_ROWS_SHOWN])) + more
