"""What a training remembers between two optimiser steps: where it stands, and its best epoch so far."""

import math
from dataclasses import dataclass


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


@dataclass
class Position:
    """Where training stands, between two optimiser steps."""

    epoch: int = 1
    batches: int = 0  # of this epoch that lie behind, in each process
    samples: int = 0  # in them, in all processes
    steps: int = 0  # of this epoch
    total_steps: int = 0  # of all epochs
    trained: bool = False  # no batch of this epoch is left: its validation comes next
    seconds: float = 0.0  # that this epoch has taken
