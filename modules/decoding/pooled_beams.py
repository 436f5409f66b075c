"""Beam search as transformers' ``generate`` does it: K beams stay live, and those that end go into a pool.

Shapes: B studies, K beams per study, L = max_seq_length, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.decoding.search import Search


class PooledBeamSearch(Search):
    """Of the 2 K best continuations, those among the first K that end enter the pool of the K best ended reports, and
    the first K of the others live on. Scores are sums of log-probabilities, as with a length penalty of 0.

    As they only fall, a study is done once its pool holds K reports and no live beam scores more than the worst.
    """

    state_names = ("studies", "scores", "tokens", "log_probs", "ended_scores", "ended_tokens", "ended_log_probs")

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        super().__init__(batch_size, device, options)
        self.width = options.beam_size
        self.ended_scores = torch.full_like(self.scores, -torch.inf)
        self.ended_tokens = torch.zeros_like(self.tokens)
        self.ended_log_probs = torch.zeros_like(self.log_probs)

    def advance(self, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Choose the newest tokens and the beams that they continue, each (B, K), from (B, 1 or K, V+1)."""
        if self.options.temperature != 1:
            log_probs = F.log_softmax(log_probs / self.options.temperature, dim=-1)
        totals = log_probs + self.scores.unsqueeze(-1) if step else log_probs
        flat = totals.flatten(1)
        scores, index = flat.topk(min(2 * self.width, flat.size(1)))
        parents, tokens = index // log_probs.size(-1), index % log_probs.size(-1)
        past = parents.unsqueeze(-1).expand(-1, -1, self.tokens.size(-1))
        reports, words = self.tokens.gather(1, past), self.log_probs.gather(1, past)
        reports[:, :, step] = tokens
        words[:, :, step] = log_probs.flatten(1).gather(1, index)
        ends = tokens == 0
        among_first = torch.arange(tokens.size(1), device=tokens.device) < self.width
        last = step == self.options.max_seq_length - 1
        enters = among_first if last else among_first & ends
        self._pool(scores.masked_fill(~enters, -torch.inf), reports, words)
        live = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.width]
        # Too few words for K live beams: the rest cannot win.
        self.scores = scores.masked_fill(ends, -torch.inf).gather(1, live)
        over = live.unsqueeze(-1).expand(-1, -1, reports.size(-1))
        self.tokens, self.log_probs = reports.gather(1, over), words.gather(1, over)
        return tokens.gather(1, live), parents.gather(1, live)

    def _pool(self, scores: Tensor, reports: Tensor, words: Tensor) -> None:
        """Merge reports (B, n, L), scored (B, n) or -inf, into the pool, best first."""
        ranked, order = torch.cat([self.ended_scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
        self.ended_scores, order = ranked[:, : self.width], order[:, : self.width]
        over = order.unsqueeze(-1).expand(-1, -1, reports.size(-1))
        self.ended_tokens = torch.cat([self.ended_tokens, reports], dim=1).gather(1, over)
        self.ended_log_probs = torch.cat([self.ended_log_probs, words], dim=1).gather(1, over)

    def done(self) -> Tensor:
        """(B,) bool: the pool is full, and no live beam scores more than its worst report."""
        return self.ended_scores[:, -1] >= self.scores.amax(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the best reports of ``rows`` (b,)."""
        index = torch.arange(self.options.sample_n, device=rows.device).expand(len(rows), -1)
        self.write(rows, index, self.ended_scores[rows], self.ended_tokens, self.ended_log_probs)
