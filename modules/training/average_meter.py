"""Means of an epoch's losses over all processes, on the device: adding does not wait for the device, reading does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.runtime import distributed


class AverageMeter:
    """Sums of loss terms over the steps of an epoch whose loss was finite; checkpoints contain them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.totals: Tensor | None = None  # (terms + 2,) float64: their sums, then the numbers of steps and batches

    def add(self, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Add one step's ``batches``, a dictionary of scalars each with "loss", as the mean of all processes'.

        Nothing is added where a loss is not finite in one of them; returns whether all are finite, a bool scalar.
        """
        self.names = list(batches[0])
        values = torch.stack([torch.stack([batch[name].float() for name in self.names]) for batch in batches])
        finite = torch.stack([batch["loss"] for batch in batches]).isfinite().all()
        one = values.new_ones(1, dtype=torch.float64)
        own = torch.where(finite, torch.cat([values.double().sum(0), one, one * len(batches), one]), 0.0)
        *step, agreed = distributed.all_reduce_sum(own).split([len(own) - 1, 1])
        finite = agreed.squeeze() == distributed.world_size()
        added = torch.where(finite, step[0] / distributed.world_size(), 0.0)
        self.totals = added if self.totals is None else self.totals + added
        return finite

    def read(self) -> dict[str, float]:
        """Mean loss of a step, to which its accumulated batches add up, and mean of every other term of a batch."""
        if self.totals is None:
            return {}
        *sums, steps, batches = self.totals.tolist()
        nan = float("nan")
        return {
            name: value / (steps if name == "loss" else batches) if steps else nan
            for name, value in zip(self.names, sums, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"names": self.names, "totals": self.totals}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from a stored state; ValueError where its shapes do not fit."""
        names, totals = list(state["names"]), state["totals"]
        if totals is not None and (totals.shape != (len(names) + 2,) or totals.dtype != torch.float64):
            raise ValueError(f"the sums of its losses have shape {tuple(totals.shape)}, expected {len(names) + 2}")
        self.names, self.totals = names, None if totals is None else totals.to(device)
