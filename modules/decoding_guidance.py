"""Guidance: decoding away from what the decoder would write about the mean image.

A likely report is mostly what all reports say. What an image adds is the difference that it makes.
"""

import torch.nn.functional as F
from torch import Tensor

from modules.decoding import DecodingSession


class Guided:
    """A DecodingSession that ranks words w by log p(w | image) + g (log p(w | image) - log p(w | mean image)).

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598; for words Sanchez et al., arXiv 2306.17806) with the
    mean image of the training split in place of no condition, and without a training of its own. ``own`` and ``mean``
    are sessions of the same studies, which decode the same words; g is ``guidance``, and 0 is ``own`` alone.
    """

    def __init__(self, own: DecodingSession, mean: DecodingSession, guidance: float):
        self.own, self.mean, self.guidance = own, mean, guidance

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K)."""
        seen, unseen = self.own.step(tokens, parents), self.mean.step(tokens, parents)
        return F.log_softmax(seen + self.guidance * (seen - unseen), dim=-1)

    def keep(self, rows: Tensor) -> None:
        """Go on with the studies ``rows`` (int64 indices) only."""
        self.own.keep(rows)
        self.mean.keep(rows)
