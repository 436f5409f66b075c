"""Means of an epoch's losses, kept on the device: adding to them waits for nothing, reading them does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Sums of loss terms over the steps of an epoch whose loss was finite; a checkpoint keeps them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.totals: Tensor | None = None  # (terms + 2,) float64: their sums, then steps and batches

    def add(self, batches: Sequence[Mapping[str, Tensor]], finite: Tensor) -> None:
        """Add one step's ``batches``, a dictionary of scalars each; nothing where ``finite`` (bool scalar) is false."""
        self.names = list(batches[0])
        values = torch.stack([torch.stack([batch[name].float() for name in self.names]) for batch in batches])
        counts = values.new_tensor([1, len(batches)], dtype=torch.float64)
        step = torch.where(finite, torch.cat([values.double().sum(0), counts]), 0.0)
        self.totals = step if self.totals is None else self.totals + step

    def read(self) -> dict[str, float]:
        """Mean loss of a step, whose accumulated batches add up to it, and mean of every other term of a batch."""
        if self.totals is None:
            return {}
        *sums, steps, batches = self.totals.tolist()
        nan = float("nan")
        return {name: value / (steps if name == "loss" else batches) if steps else nan
                for name, value in zip(self.names, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"names": self.names, "totals": self.totals}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take up a kept state."""
        self.names = list(state["names"])
        self.totals = None if state["totals"] is None else state["totals"].to(device)
