"""The sentence metrics of modules.evaluation.metric_table, computed together: corpus scores, and each report's part.

Texts are split on white space only: captions come here tokenised already (modules.evaluation.meteor.ptb_tokenise).
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from modules.evaluation.meteor import Meteor, MeteorError
from modules.evaluation.metric_table import FULL, METRIC_NAMES, NEED_JAVA, SENTENCE_METRICS, SentenceMetric
from modules.evaluation.report_statistics import scores_of_sums
from modules.runtime.errors import InputError

# References of a hypothesis: one text, or several.
References = Sequence[str] | Sequence[Sequence[str]]
Scores = dict[str, float | None]
Tables = dict[str, np.ndarray]
# A Java that fails this often in a row is not asked again: each attempt may take the whole timeout.
_MAX_JAVA_FAILURES = 3


class Metrics:
    """Scorer that a run opens once: METEOR's Java process starts with the first use and ends with the context.

    ``meteor_error`` is None, or the reason for which METEOR is None in the latest result. ``java`` and ``timeout``
    (seconds) are those of modules.evaluation.meteor.Meteor.
    """

    def __init__(self, *, java: str | None = None, timeout: float = 120.0) -> None:
        self._java, self._timeout = java, timeout
        self._meteor: Meteor | None = None
        self.meteor_error: str | None = None
        self._java_failures = 0

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def meteor(self) -> Meteor:
        """METEOR's scorer, made when it is first asked for."""
        if self._meteor is None:
            self._meteor = Meteor(java=self._java, timeout=self._timeout)
        return self._meteor

    def close(self) -> None:
        """End METEOR's process."""
        if self._meteor is not None:
            self._meteor.close()

    def compute(self, references: References, hypotheses: Sequence[str], *, with_meteor: bool = True) -> Scores:
        """Score N hypotheses against their references: a text for each, or a list of texts (COCO's five captions).

        Returns every score of METRIC_NAMES: BLEU_1..BLEU_4, METEOR, ROUGE_L in [0, 1], CIDEr in [0, 10]. An empty
        hypothesis counts and scores 0. METEOR is None where it cannot run (``meteor_error`` says why) or
        ``with_meteor`` is false. InputError where there is nothing to score.
        """
        return self.measure(references, hypotheses, with_meteor=with_meteor)[0]

    def measure(
        self, references: References, hypotheses: Sequence[str], *, with_meteor: bool = True
    ) -> tuple[Scores, Tables]:
        """As ``compute``, with each report's part of the scores (report_statistics.py); InputError for no reports."""
        assert len(references) == len(hypotheses), (len(references), len(hypotheses))
        if not references:
            raise InputError("no reports to score: the split is empty")
        listed = [
            [_single_spaced(text) for text in ([texts] if isinstance(texts, str) else texts)] for texts in references
        ]
        hypotheses = [_single_spaced(text) for text in hypotheses]
        tables: Tables = {}
        for metric in tqdm(SENTENCE_METRICS, desc="scoring", leave=False, disable=None):
            if metric.needs_java and not with_meteor:
                continue
            table = self._per_report(metric, listed, hypotheses)
            if table is not None:
                tables[metric.name] = table
        scores: Scores = dict.fromkeys(METRIC_NAMES)
        sums = {name: table.sum(axis=0, keepdims=True, dtype=np.float64) for name, table in tables.items()}
        scores |= {name: float(values[0]) for name, values in scores_of_sums(sums, len(listed)).items()}
        return scores, tables

    def _per_report(
        self, metric: SentenceMetric, references: list[list[str]], hypotheses: list[str]
    ) -> np.ndarray | None:
        """What each report adds to the metric (N, k); None where Java cannot compute it."""
        if not metric.needs_java:
            return metric.load().per_report(references, hypotheses)
        if self._java_failures >= _MAX_JAVA_FAILURES:
            return None
        try:
            table = self.meteor.per_report(references, hypotheses)
        except MeteorError as error:
            self._java_failures += 1
            self.meteor_error = str(error)
            return None
        self._java_failures, self.meteor_error = 0, None
        return table


def measure(
    metrics: Metrics,
    truncated_references: References,
    full_references: References | None,
    hypotheses: Sequence[str],
    *,
    with_meteor: bool = True,
) -> tuple[Scores, Tables]:
    """Score against both forms of the references, each under its own name; return scores and tables.

    ``BLEU_4`` and so on: references as the R2Gen family scores them (cleaned, rare words as ``<unk>``, cut to
    max_seq_length), comparable with published numbers. ``BLEU_4_full`` and so on: the whole cleaned report. Captions
    have one form only, and ``full_references`` is None.
    """
    scores, tables = metrics.measure(truncated_references, hypotheses, with_meteor=with_meteor)
    if full_references is None:
        return scores, tables
    # After a failure a second attempt would only double the wait.
    java_works = all(scores[name] is not None for name in NEED_JAVA)
    full_scores, full_tables = metrics.measure(full_references, hypotheses, with_meteor=java_works)
    scores |= {f"{name}{FULL}": value for name, value in full_scores.items()}
    tables |= {f"{name}{FULL}": table for name, table in full_tables.items()}
    return scores, tables


def _single_spaced(text: str) -> str:
    """ROUGE-L and others split on single spaces: a double one would count as a word."""
    return " ".join(text.split())
