"""Beam search in which a finished hypothesis keeps its place among the beams, as captioning codes have it.

Shapes: B studies, K beams, V words (ids 1..V); id 0 is begin, end and padding at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.decoding.search import Search


class StandardBeamSearch(Search):
    """The K best of all continuations, in which a beam that has ended competes with its score, unchanged.

    Scores are plain sums of log-probabilities, without length normalisation. As they only fall, a study is done once
    its best ``sample_n`` beams have ended.
    """

    state_names = ("studies", "scores", "tokens", "log_probs", "ended")

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        super().__init__(batch_size, device, options)
        self.ended = torch.zeros_like(self.scores, dtype=torch.bool)

    def advance(self, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Choose the newest tokens and the beams that they continue, each (B, K), from (B, 1 or K, V+1)."""
        if self.options.temperature != 1:
            log_probs = F.log_softmax(log_probs / self.options.temperature, dim=-1)
        if step:
            # The one continuation of an ended beam: token 0, at no cost.
            log_probs = log_probs.masked_fill(self.ended.unsqueeze(-1), -torch.inf)
            log_probs[:, :, 0] = log_probs[:, :, 0].masked_fill(self.ended, 0.0)
        totals = log_probs + self.scores.unsqueeze(-1) if step else log_probs
        self.scores, index = totals.flatten(1).topk(self.options.beam_size)
        parents, tokens = index // log_probs.size(-1), index % log_probs.size(-1)
        past = parents.unsqueeze(-1).expand_as(self.tokens)
        self.tokens, self.log_probs = self.tokens.gather(1, past), self.log_probs.gather(1, past)
        self.tokens[:, :, step] = tokens
        self.log_probs[:, :, step] = log_probs.flatten(1).gather(1, index)
        self.ended = tokens == 0
        return tokens, parents

    def done(self) -> Tensor:
        """(B,) bool: the best beams, as many as are wanted, have ended."""
        return self.ended[:, : self.options.sample_n].all(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the best beams of ``rows``; topk has left them in order."""
        index = torch.arange(self.options.sample_n, device=rows.device).expand(len(rows), -1)
        self.write(rows, index, self.scores[rows], self.tokens, self.log_probs)
