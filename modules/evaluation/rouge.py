"""ROUGE-L (Lin, 2004) of single reports, as pycocoevalcap computes it."""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.rouge.rouge import Rouge


def per_report(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 1) ROUGE-L in [0, 1] of each report."""
    truth, result = dict(enumerate(references)), {i: [text] for i, text in enumerate(hypotheses)}
    return Rouge().compute_score(truth, result)[1][:, None]
