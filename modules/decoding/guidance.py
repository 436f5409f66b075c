"""Guidance: decoding away from what the decoder would write about the mean image.

Likely words are mostly those of any report; guidance ranks words by what the image changes about them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.rules import UNRANKED_PENALTY
from modules.decoding.search import DecodingSession

PLAUSIBLE = 0.1  # share of the likeliest word's probability that a word needs to be ranked by guidance
LEAST_LOG_PROB = -100.0  # floor for words that the mean image rules out: a difference to -inf would be NaN


class Guided:
    """A DecodingSession that ranks words w by log p(w | image) + g (log p(w | image) - log p(w | mean image)).

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598; for words Sanchez et al., arXiv 2306.17806) with the
    mean image of the training split in place of no condition, and without a training of its own. Only words with at
    least PLAUSIBLE times the likeliest one's p(w | image) are ranked so, as in contrastive decoding (Li et al., arXiv
    2210.15097, Eq. 2); others rank below, by p(w | image), where a rule leaves none of these. ``own`` and ``mean`` are
    sessions of the same studies; g is ``guidance``, above 0.
    """

    def __init__(self, own: DecodingSession, mean: DecodingSession, guidance: float):
        self.own, self.mean, self.guidance = own, mean, guidance

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K)."""
        seen, unseen = self.own.step(tokens, parents), self.mean.step(tokens, parents).clamp(min=LEAST_LOG_PROB)
        plausible = seen >= seen.amax(dim=-1, keepdim=True) + math.log(PLAUSIBLE)
        ranked = torch.where(plausible, seen + self.guidance * (seen - unseen), seen - UNRANKED_PENALTY)
        return F.log_softmax(ranked, dim=-1)

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.own.keep(rows)
        self.mean.keep(rows)

    def fix(self) -> bool:
        """As in DecodingSession."""
        return self.own.fix() and self.mean.fix()
