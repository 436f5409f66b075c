"""Beam search, with the three ways in which published codes treat a beam that ends.

Shapes: B studies, K beams per study, in groups where the search is diverse, L = max_seq_length, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.loop import Search, lengths_of
from modules.decoding.options import DecodingOptions

FINISHED_PENALTY = 1000.0  # what a lowered beam loses, so that live beams replace it
ENDED = ("lowered", "removed", "kept")


class BeamSearch(Search):
    """Beam search that stops as soon as a study's answer can no longer change. ``ended`` beams are

    - lowered, as in the R2Gen family: noted with their score, they lose FINISHED_PENALTY, and live beams replace them;
    - removed, as in transformers' ``generate``: of the 2 K best continuations, those among the first K that end are
      noted, and the first K of the others live on;
    - kept, as in captioning codes: they stay among the K best, with their score unchanged.

    At the last step all live beams are noted. Beams compete by their sums of log-probabilities; answers are ranked by
    these divided by length ** length_penalty. With groups (Vijayakumar et al., 2016; lowered only) a group's beams lose
    ``diversity_lambda`` for each time that an earlier group chose the same word at the same step; answers then
    alternate between the groups.
    """

    state_names = ("noted_scores", "noted_tokens", "noted_log_probs", "over")

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions, ended: str = "lowered"):
        super().__init__(batch_size, device, options)
        assert ended in ENDED and (ended == "lowered" or options.group_size == 1)
        self.ended, self.groups = ended, options.group_size
        self.width = options.beam_size // options.group_size  # beams of a group
        self.noted_scores = torch.full_like(self.scores, -torch.inf)  # (B, groups * width), each group best first
        self.noted_tokens = torch.zeros_like(self.tokens)
        self.noted_log_probs = torch.zeros_like(self.log_probs)
        self.over = torch.zeros_like(self.scores, dtype=torch.bool)  # beams that have ended and are still here

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the newest tokens and the beams that they continue, each (B, K), from (B, 1 or K, V+1)."""
        log_probs = self.tempered(log_probs)
        width = log_probs.size(1)  # 1 at the first step
        if self.ended == "kept":  # the one continuation of an ended beam: token 0, at no cost
            over = self.over[:, :width]
            log_probs = log_probs.masked_fill(over.unsqueeze(-1), -torch.inf)
            log_probs = log_probs.select_scatter(log_probs[:, :, 0].masked_fill(over, 0.0), -1, 0)
        totals = log_probs + self.scores[:, :width].unsqueeze(-1)
        scores, index = self.choose(totals)
        parents, tokens = index // log_probs.size(-1), index % log_probs.size(-1)
        reports, words = self.appended(parents, tokens, log_probs.flatten(1).gather(1, index))
        ends = tokens == 0
        if self.ended == "removed":
            return self.without_ended(scores, parents, tokens, reports, words)
        self.tokens, self.log_probs = reports, words
        if self.ended == "kept":
            self.scores, self.over = scores, ends
            return tokens, parents
        ending = ends | self.is_last()
        if self.options.length_penalty:  # divided by a length, FINISHED_PENALTY would no longer keep them away
            before = self.over.gather(1, parents)
            ending, self.over = ending & ~before, before | ends
        self.note(scores.masked_fill(~ending, -torch.inf), reports, words)
        self.scores = scores - FINISHED_PENALTY * ends
        return tokens, parents

    def is_last(self) -> Tensor:
        """(1,) bool: no token follows."""
        return self.step == self.options.max_seq_length - 1

    def choose(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and flat indices (beam * (V+1) + token) of the best continuations, (B, K or 2 K) each.

        ``totals`` (B, 1 or K, V+1) are the scores of all.
        """
        if self.groups == 1:
            return best(totals.flatten(1), 2 * self.width if self.ended == "removed" else self.width)
        num_ids, first = totals.size(-1), totals.size(1) == 1
        scores, indices = [], []
        used = torch.zeros_like(totals[:, 0])  # (B, V+1) how often earlier groups chose a word
        for group in range(self.groups):
            start = 0 if first else group * self.width
            own = totals[:, start : start + (1 if first else self.width)]
            own = own - self.options.diversity_lambda * used.unsqueeze(1)
            found, index = best(own.flatten(1), self.width)
            live = found > -FINISHED_PENALTY / 2  # ended beams choose no word
            used.scatter_add_(1, index % num_ids, live.to(found.dtype))
            scores.append(found)
            indices.append(index + start * num_ids)
        return torch.cat(scores, dim=1), torch.cat(indices, dim=1)

    def without_ended(
        self, scores: Tensor, parents: Tensor, tokens: Tensor, reports: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Note those of the 2 K continuations that end among the first K, and live on with K that do not.

        All are (B, 2 K, ...). A study that is finished notes no more.
        """
        ends = tokens == 0
        among_first = torch.arange(tokens.size(1), device=tokens.device) < self.width
        enters = (ends | self.is_last()) & among_first & ~self.finished.unsqueeze(1)
        self.note(scores.masked_fill(~enters, -torch.inf), reports, words)
        live = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.width]
        # Too few words for K live beams: the rest cannot win.
        self.scores = scores.masked_fill(ends, -torch.inf).gather(1, live)
        over_tokens = live.unsqueeze(-1).expand(-1, -1, reports.size(-1))
        self.tokens, self.log_probs = reports.gather(1, over_tokens), words.gather(1, over_tokens)
        return tokens.gather(1, live), parents.gather(1, live)

    def note(self, scores: Tensor, reports: Tensor, words: Tensor) -> None:
        """Merge reports (B, n, L), of sums ``scores`` (B, n) or -inf, into each group's best."""
        grouped = (len(scores), self.groups, -1)
        new_scores = self.by_length(scores, self.step + 1)
        together = torch.cat([self.noted_scores.view(grouped), new_scores.view(grouped)], dim=2)
        ranked, order = together.sort(dim=2, descending=True, stable=True)  # stable: the earlier of equals
        self.noted_scores = ranked[..., : self.width].flatten(1)
        order = order[..., : self.width]
        for name, new in (("noted_tokens", reports), ("noted_log_probs", words)):
            rows = torch.cat([getattr(self, name).unflatten(1, grouped[1:]), new.unflatten(1, grouped[1:])], dim=2)
            kept = rows.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, rows.size(-1)))
            setattr(self, name, kept.flatten(1, 2))

    def done(self) -> Tensor:
        """(B,) bool: no live beam can still replace one of the wanted reports.

        Sums only fall, but divided by a length they can rise: then the best that a live beam could become counts. Only
        where ended beams are removed it is, as in ``generate``, compared as if it ended now.
        """
        if self.ended == "kept":
            return (self.over if self.options.length_penalty else self.over[:, : self.options.sample_n]).all(dim=1)
        grouped = (len(self.scores), self.groups, self.width)
        wanted = self.width if self.ended == "removed" else -(-self.options.sample_n // self.groups)
        live = self.scores.masked_fill(self.over, -torch.inf)
        longest = self.options.length_penalty > 0 and self.ended == "lowered"
        live = self.by_length(live, self.step * 0 + self.options.max_seq_length if longest else self.step + 1)
        reached = self.noted_scores.view(grouped)[..., wanted - 1] >= live.view(grouped).amax(dim=2)
        return reached.all(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the answers of ``rows`` (b,): the groups' best, then their second best, and so on."""
        if self.ended == "kept":
            scores = self.by_length(self.scores[rows], lengths_of(self.tokens[rows]))
            scores, index = scores.sort(dim=1, descending=True, stable=True)
            self.write(rows, index[:, : self.options.sample_n], scores, self.tokens, self.log_probs)
            return
        by_rank = self.noted_scores[rows].view(len(rows), self.groups, self.width).transpose(1, 2)
        scores, group = by_rank.sort(dim=2, descending=True, stable=True)  # (b, width, groups)
        rank = torch.arange(self.width, device=rows.device).unsqueeze(1)
        index = (group * self.width + rank).flatten(1)[:, : self.options.sample_n]
        self.write(rows, index, scores.flatten(1), self.noted_tokens, self.noted_log_probs)


def best(totals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of ``totals`` (B, n) and their indices, filled up with -inf where there are fewer."""
    scores, index = totals.topk(min(count, totals.size(1)))
    missing = count - scores.size(1)
    return (F.pad(scores, (0, missing), value=-torch.inf), F.pad(index, (0, missing))) if missing else (scores, index)
