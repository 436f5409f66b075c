"""Search for reports, token by token: the loop that all searches share, beam search, greedy choice and sampling.

Shapes: B studies, K hypotheses (beams or samples) per study, L = max_seq_length, V words (ids 1..V); id 0 is
begin, end and padding at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.decoding.rules import Rules
from modules.decoding.sampling import draw, uniform_numbers
from modules.runtime.transfers import upload

FINISHED_PENALTY = 1000.0  # what a lowered beam loses, so that live beams replace it
ENDED = ("lowered", "removed", "kept")  # what becomes of beams that end
Capture = Callable[["Search", "DecodingSession"], Callable[[], None] | None]


class DecodingSession(Protocol):
    """A batch of studies being decoded by a backbone, which remembers the past of every hypothesis."""

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K).

        ``parents`` (B, K) are the last step's hypotheses that they continue, None = each its own; the first step
        has one token, begin, per study.
        """

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""

    def fix(self) -> bool:
        """Called after the first step: from now on ``step`` keeps the shapes and places of all tensors, so that it can
        be captured, and ``keep`` is not called. False, and nothing changes, where the session cannot.
        """


class WithoutToken:
    """A DecodingSession in which ``token`` has probability 0; the others keep theirs."""

    def __init__(self, session: DecodingSession, token: int):
        self.session, self.token = session, token
        self.index: Tensor | None = None  # the same on the session's device

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K)."""
        log_probs = self.session.step(tokens, parents)
        if self.index is None:
            self.index = torch.full((1,), self.token, device=log_probs.device)
        return log_probs.index_fill(-1, self.index, -torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.session.keep(rows)

    def fix(self) -> bool:
        """As in DecodingSession."""
        return self.session.fix()


@dataclass
class Decoded:
    """The ``sample_n`` best hypotheses of each study, best first."""

    tokens: Tensor  # (B, n, L) int64, 0 after the end
    log_probs: Tensor  # (B, n, L) of each chosen token, the final 0 included; 0 after the end
    scores: Tensor  # (B, n) sum of log-probabilities, divided by length ** length_penalty


class Search:
    """The state of a search and its loop; finished studies are removed from the batch."""

    state_names: tuple[str, ...]  # a search's own attributes with a row for every study that is still in the batch
    repeatable = True  # whether steps with the same state have the same results

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        self.options, self.device = options, device
        self.rules = Rules(options) if options.has_rules else None
        num_hypotheses, length = options.num_hypotheses, options.max_seq_length
        # State of the rows still in the batch: (B, K, ...), and the study of each row.
        self.studies = torch.arange(batch_size, device=device)
        self.scores = torch.zeros(batch_size, num_hypotheses, device=device)  # sums of log-probabilities
        self.tokens = torch.zeros(batch_size, num_hypotheses, length, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(batch_size, num_hypotheses, length, device=device)
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.newest = self.tokens.new_zeros(batch_size, 1)
        self.parents: Tensor | None = None
        self.fixed = False  # whether a step must keep the shapes of the state
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # number of the token that is chosen next
        self.lengths = torch.arange(1, length + 1, device=device, dtype=torch.float64) ** options.length_penalty
        self.result = Decoded(
            self.tokens.new_zeros(batch_size, options.sample_n, length),
            self.log_probs.new_zeros(batch_size, options.sample_n, length),
            self.scores.new_zeros(batch_size, options.sample_n),
        )

    def run(self, session: DecodingSession, capture: Capture | None = None) -> Decoded:
        """Decode until every study is done.

        ``capture`` offers another way to take a step, from the second one on (modules.decoding.capture), or None. With
        it every study stays in the batch.
        """
        # Reading whether studies are done makes a GPU wait, so it is read less often there.
        interval = 8 if self.device.type == "cuda" else 1
        self.take(session, columns=0)
        fixed = capture(self, session) if capture is not None else None
        for step in range(1, self.options.max_seq_length):
            if step % interval == 0 and self.is_over(session, removes=fixed is None):
                break
            if fixed is None:
                self.take(session, columns=step)
            else:
                fixed()
        self.store(torch.arange(len(self.studies), device=self.device))
        return self.result

    def is_over(self, session: DecodingSession, removes: bool) -> bool:
        """Whether all studies are done; with ``removes``, done ones leave the batch where they are many."""
        finished = self.finished.cpu()
        num_finished = int(finished.sum())
        if num_finished == len(finished):
            return True
        if removes and 4 * num_finished >= len(finished):  # not for fewer: it copies the caches of the others
            self.store(upload(finished.nonzero().squeeze(1), self.device))
            stay = upload((~finished).nonzero().squeeze(1), self.device)
            self.keep(stay)
            session.keep(stay)
        return False

    def take(self, session: DecodingSession, columns: int) -> None:
        """One step; the histories have words in their first ``columns`` at most."""
        log_probs = session.step(self.newest, self.parents)
        if self.rules is not None:
            log_probs = self.rules(log_probs, self.tokens[:, :, :columns], self.step)
        self.newest, self.parents = self.advance(log_probs)
        self.finished = self.finished | self.done()
        self.step = self.step + 1

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose the newest tokens and the hypotheses that they continue, each (B, K), from (B, 1 or K, V+1)."""
        raise NotImplementedError

    def done(self) -> Tensor:
        """(B,) bool: nothing that a study's live hypotheses could still become would change its answer."""
        raise NotImplementedError

    def store(self, rows: Tensor) -> None:
        """Write the answers of ``rows``, (b,) int64 indices into the batch, into the result."""
        raise NotImplementedError

    def tempered(self, log_probs: Tensor) -> Tensor:
        """``log_probs`` (..., V+1) at the temperature."""
        temperature = self.options.temperature
        return log_probs if temperature == 1 else F.log_softmax(log_probs / temperature, dim=-1)

    def by_length(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """``scores`` (B, n) of reports of ``lengths`` tokens (broadcast), ends included, as they are ranked."""
        if not self.options.length_penalty:
            return scores
        index = (lengths - 1).clamp(0, len(self.lengths) - 1)
        return scores / self.lengths[index].to(scores.dtype)

    def appended(self, parents: Tensor, tokens: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The histories (B, n, L) of hypotheses that continue ``parents`` (B, n) by ``tokens`` with ``log_probs``."""
        batch, width, length = self.tokens.shape
        rows = (parents + width * torch.arange(batch, device=self.device).unsqueeze(1)).flatten()
        found = []
        for past, newest in ((self.tokens, tokens), (self.log_probs, log_probs)):
            history = past.view(-1, length).index_select(0, rows).view(batch, -1, length)
            found.append(history.index_copy_(2, self.step, newest.unsqueeze(-1).to(past.dtype)))
        return found[0], found[1]

    @property
    def row_names(self) -> tuple[str, ...]:
        """The attributes that change, with a row for every study that is still in the batch."""
        return ("studies", "scores", "tokens", "log_probs", "finished", "newest", "parents", *self.state_names)

    def keep(self, rows: Tensor) -> None:
        """Keep only ``rows``, (b,) int64 indices, of every state tensor."""
        for name in self.row_names:
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[rows])

    def write(self, rows: Tensor, index: Tensor, scores: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        """Put hypotheses ``index`` (b, n) of ``rows`` (b,) into the result.

        ``scores`` (b, >= n) are in that order; ``tokens`` and ``log_probs`` (B, K, L) are those of all rows.
        """
        studies = self.studies[rows]
        over_tokens = index.unsqueeze(-1).expand(-1, -1, tokens.size(-1))
        self.result.tokens[studies] = tokens[rows].gather(1, over_tokens)
        self.result.log_probs[studies] = log_probs[rows].gather(1, over_tokens)
        self.result.scores[studies] = scores[:, : index.size(1)]


def lengths_of(tokens: Tensor) -> Tensor:
    """How many tokens (..., ) reports ``tokens`` (..., L) have, their end included."""
    return ((tokens != 0).sum(dim=-1) + 1).clamp(max=tokens.size(-1))


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


class Sampling(Search):
    """Greedy choice, or sampling with a temperature among the likeliest words that hold ``top_p`` of the probability.

    ``seeds`` has a number for each study, which alone decides what is drawn for it; None draws from torch's own
    generator.
    """

    state_names = ("live",)

    def __init__(
        self, batch_size: int, device: torch.device, options: DecodingOptions, seeds: Sequence[int] | None = None
    ):
        super().__init__(batch_size, device, options)
        self.live = torch.ones_like(self.scores, dtype=torch.bool)
        self.uniform = None
        if options.sample_method == "sample" and seeds is not None:
            assert len(seeds) == batch_size, (len(seeds), batch_size)
            self.uniform = uniform_numbers(seeds, self.tokens.shape[1:], device)  # (B, K, L)
        self.repeatable = options.sample_method == "greedy" or self.uniform is not None

    def advance(self, log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose the newest tokens (B, K) from (B, 1 or K, V+1); every hypothesis continues itself."""
        width, parents = self.live.size(1), None
        if log_probs.size(1) < width:
            parents = torch.zeros_like(self.live, dtype=torch.int64)
        elif self.fixed:
            parents = torch.arange(width, device=self.device).expand_as(self.live)
        log_probs = log_probs.expand(-1, width, -1)
        if self.options.sample_method == "greedy":
            tokens = log_probs.argmax(dim=-1)
        else:
            uniform = None if self.uniform is None else self.uniform[self.studies].index_select(2, self.step)
            tokens = draw(log_probs, self.options, uniform)
        chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * self.live
        tokens = tokens * self.live
        self.tokens = self.tokens.index_copy(2, self.step, tokens.unsqueeze(-1))
        self.log_probs = self.log_probs.index_copy(2, self.step, chosen.unsqueeze(-1).to(self.log_probs.dtype))
        self.scores = self.scores + chosen
        self.live = self.live & (tokens != 0)
        return tokens, parents

    def done(self) -> Tensor:
        """(B,) bool: all hypotheses have ended."""
        return ~self.live.any(dim=1)

    def store(self, rows: Tensor) -> None:
        """Write the hypotheses of ``rows`` (b,), the likeliest first."""
        scores = self.by_length(self.scores[rows], lengths_of(self.tokens[rows]))
        scores, index = scores.sort(dim=1, descending=True, stable=True)
        self.write(rows, index, scores, self.tokens, self.log_probs)


def decode(
    session: DecodingSession,
    batch_size: int,
    device: torch.device,
    options: DecodingOptions,
    *,
    ended: str = "lowered",
    seeds: Sequence[int] | None = None,
) -> Decoded:
    """Run the search that ``options`` name for ``batch_size`` studies.

    ``ended`` says what becomes of beams that end (BeamSearch); ``seeds`` decide what is drawn for each study, None:
    torch's generator does.
    """
    if options.sample_method == "beam_search":
        search: Search = BeamSearch(batch_size, device, options, ended)
    else:
        search = Sampling(batch_size, device, options, seeds)
    if device.type != "cuda" or not options.decoding_graph:
        return search.run(session)
    from modules.decoding.capture import FixedStep, own_stream

    with own_stream(device):
        return search.run(session, FixedStep.of)
