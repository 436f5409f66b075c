"""CIDEr-D (Vedantam et al., 2015) as pycocoevalcap computes it, with document frequencies of any corpus.

Document frequencies of a resample stay those of all references, so that an interval is about the reports.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider.cider_scorer import CiderScorer, precook


def per_report(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 1) CIDEr-D in [0, 10] of each report, with the document frequencies of ``references`` themselves."""
    return cider_scores(references, hypotheses, document_frequencies(references), len(references))[:, None]


def document_frequencies(references: Sequence[Sequence[str]]) -> Counter:
    """In how many images' references each n-gram (n = 1..4) occurs."""
    frequencies: Counter = Counter()
    for texts in references:
        frequencies.update({ngram for text in texts for ngram in precook(text)})
    return frequencies


def cider_scores(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], frequencies: Counter, corpus_size: int
) -> np.ndarray:
    """(N,) CIDEr-D of each hypothesis, with n-grams weighted by how many of ``corpus_size`` images have them."""
    scorer = _CorpusCider(frequencies, corpus_size)
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        scorer += (hypothesis, texts)
    return np.array(scorer.compute_cider())


class _CorpusCider(CiderScorer):
    # The base class sets this to the log of the number of references; the size of the corpus is meant.
    ref_len = property(lambda self: self._log_size, lambda self, value: None)

    def __init__(self, frequencies: Counter, corpus_size: int) -> None:
        self._log_size = math.log(corpus_size)
        super().__init__()
        self.document_frequency = frequencies
