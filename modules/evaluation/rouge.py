"""ROUGE-L (Lin, 2004) of single reports, equal to pycocoevalcap's.

The longest common subsequence is found with one addition of long integers for each word (Hyyrö, 2004) instead of a
table of all pairs of words.
"""

from collections.abc import Sequence

import numpy as np

_BETA = 1.2  # weight of recall


def per_report(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 1) ROUGE-L in [0, 1] of each report: the best precision and the best recall over its references."""
    scores = [_rouge_l(texts, hypothesis) for texts, hypothesis in zip(references, hypotheses, strict=True)]
    return np.array(scores, dtype=np.float64).reshape(-1, 1)


def _rouge_l(references: Sequence[str], hypothesis: str) -> float:
    words = hypothesis.split(" ")
    precision = recall = 0.0
    for reference in references:
        own = reference.split(" ")
        common = common_subsequence(own, words)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(own))
    if not (precision and recall):
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence of two lists of words."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything  # a 0 for each word of ``first`` that ends a longer subsequence
    for word in second:
        if matches := row & places.get(word, 0):
            row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()
