"""Rules about words already written, the same for every search: shortest report, repeated words and n-grams.

They change log-probabilities and normalise nothing again, as in transformers' generate. Its history includes begin;
here neither begin nor the end, which share id 0, counts as a word.

Shapes: B studies, K hypotheses per study, t columns of their histories, V words.
"""

import torch
from torch import Tensor

from modules.decoding.options import EVERY_SEARCH, DecodingOptions

TRIGRAM_PENALTY = 2 * 0.693  # what a word loses for every time that it already ended this trigram
# What words lose that guidance does not rank (modules.decoding.guidance): they come last, and stay finite.
UNRANKED_PENALTY = 1000.0


class Rules:
    """The rules that ``options`` name."""

    def __init__(self, options: DecodingOptions):
        self.options = options
        beams = options.sample_method == "beam_search"
        self.trigrams = options.block_trigrams == EVERY_SEARCH or (options.block_trigrams and not beams)
        self.ban = bool(options.min_length or options.no_repeat_ngram_size)

    def __call__(self, log_probs: Tensor, tokens: Tensor, step: Tensor) -> Tensor:
        """``log_probs`` (B, K, V+1) of the token number ``step``, from 0, after ``tokens`` (B, K, t).

        ``tokens`` may have more than ``step`` columns. Where every token is ruled out, the report ends.
        """
        options, given = self.options, log_probs
        if tokens.size(-1):
            if self.trigrams and tokens.size(-1) >= 3:
                log_probs = penalise_trigrams(log_probs, tokens, step)
            if options.repetition_penalty != 1:
                log_probs = penalise_repetition(log_probs, tokens, step, options.repetition_penalty)
            if options.no_repeat_ngram_size:
                log_probs = ban_ngrams(log_probs, tokens, step, options.no_repeat_ngram_size)
        if options.min_length:
            end = log_probs[..., 0].masked_fill(step < options.min_length, -torch.inf)
            log_probs = log_probs.select_scatter(end, -1, 0)
        if self.ban:
            nothing_left = log_probs.amax(dim=-1) == -torch.inf
            log_probs = log_probs.select_scatter(torch.where(nothing_left, given[..., 0], log_probs[..., 0]), -1, 0)
            if options.guidance:  # only unranked words are left: compared with other hypotheses, they lose nothing
                unranked = log_probs.amax(dim=-1, keepdim=True) < -UNRANKED_PENALTY / 2
                log_probs = torch.where(unranked, log_probs + UNRANKED_PENALTY, log_probs)
        return log_probs


def penalise_trigrams(log_probs: Tensor, tokens: Tensor, step: Tensor) -> Tensor:
    """Lower each word's log-probability by TRIGRAM_PENALTY for every time that it already followed the last two words.

    ``log_probs`` (B, K, V+1) of token ``step``, ``tokens`` (B, K, t): R2Gen's rule.
    """
    words, repeated = _followers(tokens, step, 3)
    return log_probs.scatter_add(-1, words, -TRIGRAM_PENALTY * repeated.to(log_probs.dtype))


def ban_ngrams(log_probs: Tensor, tokens: Tensor, step: Tensor, size: int) -> Tensor:
    """Rule out each word that would end an n-gram of ``size`` words that the hypothesis already has.

    ``log_probs`` (B, K, V+1) of token ``step``, ``tokens`` (B, K, t).
    """
    if tokens.size(-1) < size:
        return log_probs
    words, repeated = _followers(tokens, step, size)
    banned = torch.where(repeated, -torch.inf, 0.0).to(log_probs.dtype)
    return log_probs.scatter_add(-1, words, banned)


def _followers(tokens: Tensor, step: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The last word of every n-gram in ``tokens`` (B, K, t), and whether its other words are the newest ones.

    Both (B, K, t - size + 1).
    """
    count = tokens.size(-1) - size + 1
    last = torch.arange(size - 1, tokens.size(-1), device=tokens.device)  # where the n-grams end
    repeated = (last < step).expand(*tokens.shape[:2], -1)
    for back in range(1, size):
        newest = tokens.index_select(-1, (step - back).clamp(min=0).view(1))
        start = size - 1 - back
        repeated = repeated & (tokens[:, :, start : start + count] == newest)
    words = tokens[:, :, size - 1 :]
    return words, repeated & (words != 0)


def penalise_repetition(log_probs: Tensor, tokens: Tensor, step: Tensor, penalty: float) -> Tensor:
    """Multiply the log-probabilities of words that the hypothesis has by ``penalty`` (Keskar et al., arXiv 1909.05858).

    ``log_probs`` (B, K, V+1) of token ``step``, ``tokens`` (B, K, t).
    """
    written = (torch.arange(tokens.size(-1), device=tokens.device) < step) & (tokens != 0)
    seen = torch.zeros_like(log_probs).scatter_add(-1, tokens, written.to(log_probs.dtype))
    return torch.where(seen > 0, log_probs * penalty, log_probs)
