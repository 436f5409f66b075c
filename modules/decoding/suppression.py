"""Decoding that never chooses a given token, such as <unk>."""

import torch
from torch import Tensor

from modules.decoding.search import DecodingSession


class WithoutToken:
    """A DecodingSession in which ``token`` has probability 0; the others keep theirs."""

    def __init__(self, session: DecodingSession, token: int):
        self.session, self.token = session, token

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K)."""
        log_probs = self.session.step(tokens, parents)
        index = torch.tensor([self.token], device=log_probs.device)
        return log_probs.index_fill(-1, index, -torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.session.keep(rows)
