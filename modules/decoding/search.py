"""Search for reports, token by token: beam search, greedy choice and sampling.

Shapes: B studies, K hypotheses (beams or samples) per study, L = max_seq_length, V words (ids 1..V); id 0 is
begin, end and padding at once.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.runtime.transfers import upload

FINISHED_PENALTY = 1000.0  # what a beam that has ended loses, so that live beams replace it
TRIGRAM_PENALTY = 2 * 0.693  # what a word loses for every time that it already ended this trigram


@dataclass
class Decoded:
    """The ``sample_n`` best hypotheses of each study, best first."""

    tokens: Tensor  # (B, n, L) int64, 0 after the end
    log_probs: Tensor  # (B, n, L) of each chosen token, the final 0 included; 0 after the end
    scores: Tensor  # (B, n) sum of log-probabilities, without length normalisation


class DecodingSession(Protocol):
    """What a backbone offers to a search: a step for the newest tokens; the state of the past is its own."""

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


def decode(
    session: DecodingSession,
    batch_size: int,
    device: torch.device,
    options: DecodingOptions,
    beam_search: "type[Search] | None" = None,
) -> Decoded:
    """Run the search that ``options`` name for ``batch_size`` studies; ``beam_search`` replaces the R2Gen family's."""
    search = (beam_search or BeamSearch) if options.sample_method == "beam_search" else Sampling
    return search(batch_size, device, options).run(session)


class Search:
    """The loop that all searches share; finished studies are removed from the batch."""

    state_names: tuple[str, ...]  # the attributes with a row for every study that is still in the batch

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        self.options = options
        self.device = device
        num_hypotheses, length = options.num_hypotheses, options.max_seq_length
        # State of the rows still in the batch: (B, K, ...), and the study of each row.
        self.studies = torch.arange(batch_size, device=device)
        self.scores = torch.zeros(batch_size, num_hypotheses, device=device)
        self.tokens = torch.zeros(batch_size, num_hypotheses, length, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(batch_size, num_hypotheses, length, device=device)
        self.result = Decoded(
            self.tokens.new_zeros(batch_size, options.sample_n, length),
            self.log_probs.new_zeros(batch_size, options.sample_n, length),
            self.scores.new_zeros(batch_size, options.sample_n),
        )

    def run(self, session: DecodingSession) -> Decoded:
        """Decode until every study is done."""
        # Reading whether studies are done makes a GPU wait, so it is read less often there.
        interval = 8 if self.device.type == "cuda" else 1
        tokens, parents = self.tokens.new_zeros(len(self.studies), 1), None
        for step in range(self.options.max_seq_length):
            tokens, parents = self.advance(session.step(tokens, parents), step)
            if step % interval < interval - 1:
                continue
            done = self.done().cpu()
            num_done = int(done.sum())
            if num_done == len(done):
                break
            if 4 * num_done >= len(done):  # not for fewer: removing rows copies the caches of the others
                self.store(upload(done.nonzero().squeeze(1), self.device))
                stay = upload((~done).nonzero().squeeze(1), self.device)
                self.keep(stay)
                session.keep(stay)
                tokens, parents = tokens[stay], None if parents is None else parents[stay]
        self.store(torch.arange(len(self.studies), device=self.device))
        return self.result

    def advance(self, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Choose the newest tokens and the hypotheses that they continue, each (B, K), from (B, 1 or K, V+1)."""
        raise NotImplementedError

    def done(self) -> Tensor:
        """(B,) bool: nothing that a study's live hypotheses could still become would change its answer."""
        raise NotImplementedError

    def store(self, rows: Tensor) -> None:
        """Write the answers of ``rows``, (b,) int64 indices into the batch, into the result."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Keep only ``rows``, (b,) int64 indices, of every state tensor."""
        for name in self.state_names:
            setattr(self, name, getattr(self, name)[rows])

    def write(self, rows: Tensor, index: Tensor, scores: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        """Put hypotheses ``index`` (b, n) of ``rows`` (b,) into the result.

        ``scores`` (b, >= n) are in that order; ``tokens`` and ``log_probs`` (B, K, L) are those of all rows.
        """
        studies = self.studies[rows]
        over_tokens = index.unsqueeze(-1).expand(-1, -1, tokens.size(-1))
        self.result.tokens[studies] = tokens[rows].gather(1, over_tokens)
        self.result.log_probs[studies] = log_probs[rows].gather(1, over_tokens)
        self.result.scores[studies] = scores[:, : index.size(1)]


class BeamSearch(Search):
    """Beam search as in the R2Gen family, stopped as soon as the answer can no longer change.

    A beam that ends is noted with its score, then loses FINISHED_PENALTY instead of being removed; all beams are
    noted at the last step. Scores only fall, so a study is done once no live beam reaches its noted ones.
    With groups (Vijayakumar et al., 2016), a group's beams lose ``diversity_lambda`` for each time that an earlier
    group chose the same word at the same step; answers then alternate between the groups.
    """

    state_names = ("studies", "scores", "tokens", "log_probs", "ended_scores", "ended_tokens", "ended_log_probs")

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        super().__init__(batch_size, device, options)
        self.groups = options.group_size
        self.width = options.beam_size // options.group_size  # beams of a group
        self.ended_scores = torch.full_like(self.scores, -torch.inf)  # (B, groups * width), each group best first
        self.ended_tokens = torch.zeros_like(self.tokens)
        self.ended_log_probs = torch.zeros_like(self.log_probs)

    def advance(self, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Choose the newest tokens and the beams that they continue, each (B, K), from (B, 1 or K, V+1)."""
        if self.options.temperature != 1:
            log_probs = F.log_softmax(log_probs / self.options.temperature, dim=-1)
        scores, index = self.choose(log_probs, step)
        parents, tokens = index // log_probs.size(-1), index % log_probs.size(-1)
        past = parents.unsqueeze(-1).expand_as(self.tokens)
        self.tokens = self.tokens.gather(1, past)
        self.log_probs = self.log_probs.gather(1, past)
        self.tokens[:, :, step] = tokens
        self.log_probs[:, :, step] = log_probs.flatten(1).gather(1, index)
        ends = tokens == 0
        last = step == self.options.max_seq_length - 1
        self.note(scores if last else scores.masked_fill(~ends, -torch.inf))
        self.scores = scores - FINISHED_PENALTY * ends
        return tokens, parents

    def choose(self, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Scores and flat indices (beam * (V+1) + token) of the best continuations, (B, K) each."""
        num_ids = log_probs.size(-1)
        totals = log_probs + self.scores.unsqueeze(-1) if step else log_probs
        if self.groups == 1:
            return totals.flatten(1).topk(self.width)
        scores, indices = [], []
        used = torch.zeros_like(log_probs[:, 0])  # (B, V+1) how often earlier groups chose a word
        for group in range(self.groups):
            start = group * self.width if step else 0
            own = totals[:, start : start + (self.width if step else 1)]
            own = own - self.options.diversity_lambda * used.unsqueeze(1)
            best, index = own.flatten(1).topk(self.width)
            live = best > -FINISHED_PENALTY / 2  # ended beams choose no word
            used.scatter_add_(1, index % num_ids, live.to(best.dtype))
            scores.append(best)
            indices.append(index + start * num_ids)
        return torch.cat(scores, dim=1), torch.cat(indices, dim=1)

    def note(self, new_scores: Tensor) -> None:
        """Merge the beams that ended, scored ``new_scores`` (B, K) or -inf, into each group's best."""
        grouped = (len(new_scores), self.groups, -1)
        together = torch.cat([self.ended_scores.view(grouped), new_scores.view(grouped)], dim=2)
        ranked, order = together.sort(dim=2, descending=True, stable=True)  # stable: the earlier of equals
        self.ended_scores = ranked[..., : self.width].flatten(1)
        order = order[..., : self.width]
        for name, new in (("ended_tokens", self.tokens), ("ended_log_probs", self.log_probs)):
            rows = torch.cat([getattr(self, name).unflatten(1, grouped[1:]), new.unflatten(1, grouped[1:])], dim=2)
            kept = rows.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, rows.size(-1)))
            setattr(self, name, kept.flatten(1, 2))

    def done(self) -> Tensor:
        """(B,) bool: as many beams of each group as are wanted score no less than any live one."""
        grouped = (len(self.scores), self.groups, self.width)
        wanted = -(-self.options.sample_n // self.groups)
        reached = self.ended_scores.view(grouped)[..., wanted - 1] >= self.scores.view(grouped).amax(dim=2)
        return reached.all(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the answers of ``rows`` (b,): the groups' best, then their second best, and so on."""
        by_rank = self.ended_scores[rows].view(len(rows), self.groups, self.width).transpose(1, 2)
        scores, group = by_rank.sort(dim=2, descending=True, stable=True)  # (b, width, groups)
        rank = torch.arange(self.width, device=rows.device).unsqueeze(1)
        index = (group * self.width + rank).flatten(1)[:, : self.options.sample_n]
        self.write(rows, index, scores.flatten(1), self.ended_tokens, self.ended_log_probs)


class StandardBeamSearch(Search):
    """Beam search of captioning codes: a finished beam keeps its place among the K best, with its score unchanged.

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
        """Write the best beams of ``rows`` (b,), which topk has sorted."""
        index = torch.arange(self.options.sample_n, device=rows.device).expand(len(rows), -1)
        self.write(rows, index, self.scores[rows], self.tokens, self.log_probs)


class Sampling(Search):
    """Greedy choice, or multinomial sampling with a temperature, with repeated trigrams penalised."""

    state_names = ("studies", "scores", "tokens", "log_probs", "live")

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        super().__init__(batch_size, device, options)
        self.live = torch.ones_like(self.scores, dtype=torch.bool)

    def advance(self, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Choose the newest tokens (B, K) from (B, 1 or K, V+1); every hypothesis continues itself."""
        parents = torch.zeros_like(self.live, dtype=torch.int64) if step == 0 else None
        log_probs = log_probs.expand(-1, self.live.size(1), -1)
        if self.options.block_trigrams and step >= 3:
            log_probs = penalise_trigrams(log_probs, self.tokens[:, :, :step])
        if self.options.sample_method == "greedy":
            tokens = log_probs.argmax(dim=-1)
        else:
            probs = (log_probs / self.options.temperature).softmax(dim=-1)
            tokens = probs.flatten(0, 1).multinomial(1).view_as(self.live)
        chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * self.live
        tokens = tokens * self.live
        self.tokens[:, :, step] = tokens
        self.log_probs[:, :, step] = chosen
        self.scores = self.scores + chosen
        self.live = self.live & (tokens != 0)
        return tokens, parents

    def done(self) -> Tensor:
        """(B,) bool: all hypotheses have ended."""
        return ~self.live.any(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the hypotheses of ``rows`` (b,), the likeliest first."""
        scores, index = self.scores[rows].sort(dim=1, descending=True, stable=True)
        self.write(rows, index, scores, self.tokens, self.log_probs)


def penalise_trigrams(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Lower the log-probability of each word once for every time that it already followed the last two tokens.

    log_probs (B, K, V+1), tokens (B, K, t) with t >= 3; nothing is normalised again.
    """
    last_two = tokens[:, :, -2:]
    repeated = (tokens[:, :, :-2] == last_two[:, :, :1]) & (tokens[:, :, 1:-1] == last_two[:, :, 1:])
    return log_probs.scatter_add(-1, tokens[:, :, 2:], -TRIGRAM_PENALTY * repeated.to(log_probs.dtype))
