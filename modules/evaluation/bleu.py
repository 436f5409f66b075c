"""BLEU-1..4 (Papineni et al., 2002) with pycocoevalcap's counts, closest reference length and guards against 0 / 0."""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer


def per_report(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 10) int32: matched n-grams and all n-grams (n = 1..4), length, and length of the closest reference."""
    scorer = BleuScorer(n=4)
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        scorer += (hypothesis, texts)
    rows = []
    for part in scorer.ctest:
        length = part["testlen"]
        closest = min(part["reflen"], key=lambda reference: (abs(reference - length), reference))
        rows.append([*part["correct"], *part["guess"], length, closest])
    return np.array(rows, dtype=np.int32)


def from_sums(sums: np.ndarray, count: int) -> np.ndarray:
    """(R, 4) BLEU-1..4 of the sums (R, 10)."""
    correct, guessed, length, reference_length = sums[:, 0:4], sums[:, 4:8], sums[:, 8], sums[:, 9]
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=1)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return precision ** (1 / np.arange(1, 5)) * brevity[:, None]
