"""BLEU-1..4, METEOR, ROUGE-L and CIDEr of generated reports, computed with pycocoevalcap as the R2Gen family does.

Texts are split on white space only: captions come here tokenised already, by modules.evaluation.ptb.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer, precook
from pycocoevalcap.rouge.rouge import Rouge
from tqdm import tqdm

from modules.evaluation.meteor import Meteor, MeteorError
from modules.evaluation.report_statistics import bleu_table, meteor_table
from modules.evaluation.score_names import FULL
from modules.runtime.errors import InputError

METRIC_NAMES = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")

# References of a hypothesis: one text, or several.
References = Sequence[str] | Sequence[Sequence[str]]
# Scores by name, and the tables that they can be computed from.
_Part = tuple[dict[str, float | None], dict[str, np.ndarray]]
# A Java that fails this often in a row is not asked again: each attempt may take the whole timeout.
_MAX_METEOR_FAILURES = 3


class Metrics:
    """Scorer that a run opens once: METEOR's Java process starts with the first use and ends with the context.

    ``meteor_error`` is None, or the reason for which METEOR is None in the latest result. With ``train_reports``,
    CIDEr is given a second time as ``CIDEr_train_idf``, with document frequencies from that corpus (XProNet).
    ``java`` and ``timeout`` (seconds) are those of modules.evaluation.meteor.Meteor.
    """

    def __init__(
        self, *, java: str | None = None, timeout: float = 50.0, train_reports: References | None = None
    ) -> None:
        self.meteor = Meteor(java=java, timeout=timeout)
        self.meteor_error: str | None = None
        self._meteor_failures = 0
        self._train_reports = train_reports
        self._train_frequencies: Counter | None = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End METEOR's process."""
        self.meteor.close()

    def compute(
        self, references: References, hypotheses: Sequence[str], *, with_meteor: bool = True
    ) -> dict[str, float | None]:
        """Score N hypotheses against their references: a text for each, or a list of texts (COCO's five captions).

        Returns BLEU_1..BLEU_4, METEOR, ROUGE_L in [0, 1] and CIDEr in [0, 10]. An empty hypothesis counts and scores
        0. METEOR is None where it cannot run (``meteor_error`` says why) or ``with_meteor`` is false.
        """
        return self.measure(references, hypotheses, with_meteor=with_meteor)[0]

    def measure(
        self, references: References, hypotheses: Sequence[str], *, with_meteor: bool = True
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """As ``compute``, and what each report adds to the scores: tables of modules.evaluation.report_statistics."""
        assert len(references) == len(hypotheses), (len(references), len(hypotheses))
        if not references:
            raise InputError("no reports to score: the split is empty")
        # ROUGE-L splits on single spaces: a double one would count as a word.
        references = _listed(references)
        hypotheses = [" ".join(text.split()) for text in hypotheses]
        parts = [self._bleu, self._rouge, self._cider]
        if with_meteor:
            parts.append(self._meteor)
        scores: dict[str, float | None] = dict.fromkeys(METRIC_NAMES)
        tables: dict[str, np.ndarray] = {}
        for part in tqdm(parts, desc="scoring", leave=False, disable=None):
            found, table = part(references, hypotheses)
            scores.update(found)
            tables.update(table)
        return scores, tables

    def _bleu(self, references: list[list[str]], hypotheses: list[str]) -> _Part:
        scorer = BleuScorer(n=4)
        for texts, hypothesis in zip(references, hypotheses, strict=True):
            scorer += (hypothesis, texts)
        bleu, _ = scorer.compute_score(option="closest")
        return {f"BLEU_{n}": float(value) for n, value in enumerate(bleu, start=1)}, {"BLEU": bleu_table(scorer.ctest)}

    def _rouge(self, references: list[list[str]], hypotheses: list[str]) -> _Part:
        truth = dict(enumerate(references))
        result = {i: [text] for i, text in enumerate(hypotheses)}
        rouge, each = Rouge().compute_score(truth, result)
        return {"ROUGE_L": float(rouge)}, {"ROUGE_L": each[:, None]}

    def _cider(self, references: list[list[str]], hypotheses: list[str]) -> _Part:
        each = {"CIDEr": cider_scores(references, hypotheses, document_frequencies(references), len(references))}
        if self._train_reports is not None:
            if self._train_frequencies is None:
                self._train_frequencies = document_frequencies(_listed(self._train_reports))
            size = len(self._train_reports)
            each["CIDEr_train_idf"] = cider_scores(references, hypotheses, self._train_frequencies, size)
        return (
            {name: float(values.mean()) for name, values in each.items()},
            {name: values[:, None] for name, values in each.items()},
        )

    def _meteor(self, references: list[list[str]], hypotheses: list[str]) -> _Part:
        if self._meteor_failures >= _MAX_METEOR_FAILURES:
            return {"METEOR": None}, {}
        try:
            score = self.meteor.score(references, hypotheses)
            table = meteor_table(self.meteor.report_statistics(references, hypotheses))
        except (MeteorError, ValueError) as error:
            self.meteor.close()
            self._meteor_failures += 1
            self.meteor_error = str(error)
            return {"METEOR": None}, {}
        self._meteor_failures, self.meteor_error = 0, None
        return {"METEOR": score}, {"METEOR": table}


def measure(
    metrics: Metrics,
    truncated_references: References,
    full_references: References | None,
    hypotheses: Sequence[str],
    *,
    with_meteor: bool = True,
) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
    """Score against both forms of the references, each under its own name; return scores and tables.

    ``BLEU_4`` and so on: references as the R2Gen family has them (cleaned, rare words as ``<unk>``, cut to
    max_seq_length), which published numbers are comparable with. ``BLEU_4_full`` and so on: the whole cleaned report.
    Captions have one form only, and ``full_references`` is None.
    """
    scores, tables = metrics.measure(truncated_references, hypotheses, with_meteor=with_meteor)
    if full_references is None:
        return scores, tables
    # After a failure a second attempt would only double the wait.
    full = metrics.measure(full_references, hypotheses, with_meteor=scores["METEOR"] is not None)
    for cut, whole in zip((scores, tables), full, strict=True):
        cut.update({f"{name}{FULL}": value for name, value in whole.items()})
    return scores, tables


def _listed(references: References) -> list[list[str]]:
    """The references as lists of texts with single spaces."""
    return [[" ".join(text.split()) for text in ([texts] if isinstance(texts, str) else texts)] for texts in references]


def document_frequencies(references: list[list[str]]) -> Counter:
    """In how many images' references each n-gram occurs."""
    frequencies: Counter = Counter()
    for texts in references:
        frequencies.update({ngram for text in texts for ngram in precook(text)})
    return frequencies


class _CorpusCider(CiderScorer):
    """CIDEr-D (Vedantam et al., 2015) with the document frequencies of a given corpus."""

    # The base class sets this to the log of the number of references; the size of the corpus is meant.
    ref_len = property(lambda self: self._log_size, lambda self, value: None)

    def __init__(self, frequencies: Counter, corpus_size: int) -> None:
        self._log_size = math.log(corpus_size)
        super().__init__()
        self.document_frequency = frequencies


def cider_scores(
    references: list[list[str]], hypotheses: list[str], frequencies: Counter, corpus_size: int
) -> np.ndarray:
    """CIDEr-D (N,) of each hypothesis, with n-grams weighed by how many of ``corpus_size`` images have them."""
    scorer = _CorpusCider(frequencies, corpus_size)
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        scorer += (hypothesis, texts)
    return np.array(scorer.compute_cider())
