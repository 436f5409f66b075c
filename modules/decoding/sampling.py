"""Greedy choice, and words drawn at random.

Shapes: B studies, K samples per study, L = max_seq_length, V words.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from modules.decoding.loop import Search, lengths_of
from modules.decoding.options import DecodingOptions


def study_seed(seed: int, study: str) -> int:
    """A seed for what is drawn for the study of this name, whatever else is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {study}".encode()).digest()[:8], "little") >> 1


class Sampling(Search):
    """Greedy choice, or sampling with a temperature among the likeliest words that hold ``top_p`` of the probability.

    ``seeds`` has a number for each study, which alone decides what is drawn for it; None draws from torch's own
    generator.
    """

    state_names = ("live", "uniform")

    def __init__(
        self, batch_size: int, device: torch.device, options: DecodingOptions, seeds: Sequence[int] | None = None
    ):
        super().__init__(batch_size, device, options)
        self.live = torch.ones_like(self.scores, dtype=torch.bool)
        self.uniform = None
        if seeds is not None and options.sample_method == "sample":
            assert len(seeds) == batch_size, (len(seeds), batch_size)
            shape = self.tokens.shape[1:]
            drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.uniform = torch.stack(drawn).to(device)  # (B, K, L)

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose the newest tokens (B, K) from (B, 1 or K, V+1); every hypothesis continues itself."""
        width = self.live.size(1)
        parents = torch.zeros_like(self.live, dtype=torch.int64) if log_probs.size(1) < width else None
        log_probs = log_probs.expand(-1, width, -1)
        tokens = log_probs.argmax(dim=-1) if self.options.sample_method == "greedy" else self.draw(log_probs)
        chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * self.live
        tokens = tokens * self.live
        self.tokens = self.tokens.index_copy(2, self.step, tokens.unsqueeze(-1))
        self.log_probs = self.log_probs.index_copy(2, self.step, chosen.unsqueeze(-1).to(self.log_probs.dtype))
        self.scores = self.scores + chosen
        self.live = self.live & (tokens != 0)
        return tokens, parents

    def draw(self, log_probs: Tensor) -> Tensor:
        """A token (B, K) for each hypothesis from ``log_probs`` (B, K, V+1)."""
        probs = (log_probs / self.options.temperature).softmax(dim=-1)
        if self.options.top_p < 1:
            probs = nucleus(probs, self.options.top_p)
        if self.uniform is None:
            return probs.flatten(0, 1).multinomial(1).view_as(self.live)
        below = probs.double().cumsum(dim=-1)  # (B, K, V+1)
        drawn = self.uniform.index_select(2, self.step) * below[..., -1:]
        return (below <= drawn).sum(dim=-1)

    def done(self) -> Tensor:
        """(B,) bool: all hypotheses have ended."""
        return ~self.live.any(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the hypotheses of ``rows`` (b,), the likeliest first."""
        scores = self.by_length(self.scores[rows], lengths_of(self.tokens[rows]))
        scores, index = scores.sort(dim=1, descending=True, stable=True)
        self.write(rows, index, scores, self.tokens, self.log_probs)


def nucleus(probs: Tensor, share: float) -> Tensor:
    """``probs`` (..., V+1) with 0 outside the fewest likeliest words that together have ``share`` of them.

    Holtzman et al., arXiv 1904.09751; the likeliest word always stays.
    """
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    inside = ranked.double().cumsum(dim=-1) - ranked < share
    inside[..., 0] = True
    return torch.where(torch.zeros_like(inside).scatter(-1, order, inside), probs, 0.0)
