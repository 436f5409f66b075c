"""What a decoder's output layer says when the hidden states of a report are moved; words, not a search.

Shapes: N reports, T_i positions of report i, D the decoder's width, V words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.evaluation.clinical_scores import outcomes, scores_of
from modules.labels.labeler import CLASSES, label_reports

AT_A_TIME = 64  # reports: their logits are the largest tensor


@dataclass(frozen=True)
class Reading:
    """The likeliest word of every position."""

    words: list[Tensor]  # N of (T_i,) int64
    probability: float  # mean over all positions of that word's probability


@torch.no_grad()
def read(
    log_probs: Callable[[Tensor], Tensor],
    hidden: Sequence[Tensor],
    shift: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Reading:
    """Words that ``log_probs``, a backbone's output layer, reads from ``hidden``, N of (T_i, D), plus ``shift`` (N, D).

    Each position of report i is moved by row i. The context that made a hidden state stays what it was.
    """
    words, total = [], 0.0
    for start in range(0, len(hidden), AT_A_TIME):
        part = hidden[start : start + AT_A_TIME]
        states = pad_sequence(list(part), batch_first=True)  # (n, T, D)
        if shift is not None:
            states = states + shift[start : start + AT_A_TIME, None].to(states.dtype)
        best, word = log_probs(states.to(device)).max(-1)
        for row, report in enumerate(part):
            words.append(word[row, : len(report)].cpu())
            total += best[row, : len(report)].double().exp().sum().item()
    return Reading(words, total / sum(map(len, words)))


def changed(before: Reading, after: Reading) -> float:
    """Share of all positions whose word differs."""
    return (torch.cat(before.words) != torch.cat(after.words)).double().mean().item()


def agreement(reference: np.ndarray, texts: Sequence[str]) -> tuple[float, float]:
    """Micro F1 of the rule-based labels of ``texts`` against ``reference`` (N, 14), and that without No Finding.

    Positive labels alone count. Words without sense name no finding, and so are No Finding: hence the second.
    """
    found, findings = label_reports(texts), [column for column, name in enumerate(CLASSES) if name != "No Finding"]
    whole, part = (
        scores_of(outcomes(reference[:, columns], found[:, columns], "negative"))["f1_micro"]
        for columns in (slice(None), findings)
    )
    return whole, part
