"""The loop that all searches share: a step of the backbone, the rules, a choice, until every study is done.

Shapes: B studies, K hypotheses (beams or samples) per study, L = max_seq_length, V words (ids 1..V); id 0 is
begin, end and padding at once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.decoding.rules import Rules
from modules.decoding.session import DecodingSession
from modules.runtime.transfers import upload


@dataclass
class Decoded:
    """The ``sample_n`` best hypotheses of each study, best first."""

    tokens: Tensor  # (B, n, L) int64, 0 after the end
    log_probs: Tensor  # (B, n, L) of each chosen token, the final 0 included; 0 after the end
    scores: Tensor  # (B, n) sum of log-probabilities, divided by length ** length_penalty


class Search:
    """The state of a search and its loop; finished studies are removed from the batch."""

    state_names: tuple[str, ...]  # the attributes with a row for every study that is still in the batch

    def __init__(self, batch_size: int, device: torch.device, options: DecodingOptions):
        self.options, self.device = options, device
        self.rules = Rules(options)
        num_hypotheses, length = options.num_hypotheses, options.max_seq_length
        # State of the rows still in the batch: (B, K, ...), and the study of each row.
        self.studies = torch.arange(batch_size, device=device)
        self.scores = torch.zeros(batch_size, num_hypotheses, device=device)  # sums of log-probabilities
        self.tokens = torch.zeros(batch_size, num_hypotheses, length, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(batch_size, num_hypotheses, length, device=device)
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.newest, self.parents = self.tokens.new_zeros(batch_size, 1), None
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # number of the token that is chosen next
        self.lengths = torch.arange(1, length + 1, device=device, dtype=torch.float64) ** options.length_penalty
        self.result = Decoded(
            self.tokens.new_zeros(batch_size, options.sample_n, length),
            self.log_probs.new_zeros(batch_size, options.sample_n, length),
            self.scores.new_zeros(batch_size, options.sample_n),
        )

    def run(self, session: DecodingSession) -> Decoded:
        """Decode until every study is done."""
        # Reading whether studies are done makes a GPU wait, so it is read less often there.
        interval = 8 if self.device.type == "cuda" else 1
        for step in range(self.options.max_seq_length):
            self.take(session, columns=step)
            if step % interval < interval - 1:
                continue
            finished = self.finished.cpu()
            num_finished = int(finished.sum())
            if num_finished == len(finished):
                break
            if 4 * num_finished >= len(finished):  # not for fewer: removing rows copies the caches of the others
                self.store(upload(finished.nonzero().squeeze(1), self.device))
                stay = upload((~finished).nonzero().squeeze(1), self.device)
                self.keep(stay)
                session.keep(stay)
        self.store(torch.arange(len(self.studies), device=self.device))
        return self.result

    def take(self, session: DecodingSession, columns: int) -> None:
        """One step; the histories have words in their first ``columns`` at most."""
        log_probs = session.step(self.newest, self.parents)
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

    def keep(self, rows: Tensor) -> None:
        """Keep only ``rows``, (b,) int64 indices, of every state tensor."""
        for name in ("studies", "scores", "tokens", "log_probs", "finished", "newest", "parents", *self.state_names):
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
