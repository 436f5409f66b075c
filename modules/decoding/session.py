"""What a search asks of a backbone, and a session that never offers a certain token.

Shapes: B studies, K hypotheses per study, V words (ids 1..V, and 0 for begin and end).
"""

from typing import Protocol

import torch
from torch import Tensor


class DecodingSession(Protocol):
    """A batch of studies being decoded by a backbone, which remembers the past of every hypothesis."""

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K).

        ``parents`` (B, K) are the last step's hypotheses that they continue, None = each its own; the first step
        has one token, begin, per study.
        """

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""


class WithoutToken:
    """A DecodingSession in which ``token`` has probability 0; the others keep theirs."""

    def __init__(self, session: DecodingSession, token: int):
        self.session, self.token = session, token

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K)."""
        log_probs = self.session.step(tokens, parents)
        index = torch.full((1,), self.token, device=log_probs.device)
        return log_probs.index_fill(-1, index, -torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.session.keep(rows)
