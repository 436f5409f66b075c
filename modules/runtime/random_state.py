"""The state of torch's random generators, as a checkpoint keeps it; with several processes, by key instead."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """State of torch's generators on every device; augmentation and order are keyed by epoch and need none."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Set torch's generators to a kept state; GPU states are skipped where the number of GPUs has changed."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_by(*key: int) -> None:
    """Seed torch's generators on every device by ``key`` alone."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
