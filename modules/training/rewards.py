"""Rewards of sampled reports: sentence metrics against a study's references (self-critical training)."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from modules.evaluation.cider import cider_scores, document_frequencies
from modules.evaluation.meteor import Meteor, MeteorError
from modules.evaluation.metric_table import SENTENCE_METRICS
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables, scores_of_sums
from modules.labels.labeler import label_reports
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_json
from modules.runtime.records import write_private

References = Sequence[Sequence[str]]
Frequencies = tuple[Counter, int]  # in how many studies each n-gram occurs, and the number of studies


class Reward:
    """``reward(samples, texts)`` scores each text against the references of its sample.

    ``references`` are the cleaned texts of every training sample, by its index. ``name`` is one of
    modules.evaluation.metric_table.REWARDS: a sentence metric of the single report (CIDEr is CIDEr-D with
    ``frequencies``), or clinical_f1, the F1 of the 14 rule-based labels against those of the first reference.
    ``java_timeout``: seconds without an answer after which METEOR's Java counts as hung.
    """

    def __init__(
        self, name: str, references: References, *, frequencies: Frequencies | None = None, java_timeout: float = 120.0
    ):
        self.name, self.references = name, references
        self._score = _scorer(name, frequencies, java_timeout)

    def __call__(self, samples: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """(N,) float64. InputError where Java is needed and fails."""
        return self._score([list(self.references[sample]) for sample in samples], list(texts))


def _scorer(name: str, frequencies: Frequencies | None, java_timeout: float) -> Callable[[list, list], np.ndarray]:
    if name == "CIDEr":
        assert frequencies is not None
        counts, studies = frequencies
        return lambda references, texts: cider_scores(references, texts, counts, studies)
    if name == "clinical_f1":
        return _clinical_f1
    [metric] = [metric for metric in SENTENCE_METRICS if name in [score.name for score in metric.scores]]
    per_report = Meteor(timeout=java_timeout).per_report if metric.needs_java else metric.load().per_report

    def score(references: list[list[str]], texts: list[str]) -> np.ndarray:
        try:
            table = per_report(references, texts)
        except MeteorError as error:
            raise InputError(f"--scst_reward {name}: {error}; choose another reward, such as CIDEr") from error
        return scores_of_sums({metric.name: table.astype(np.float64)}, 1)[name]

    return score


def _clinical_f1(references: list[list[str]], texts: list[str]) -> np.ndarray:
    tables = clinical_tables(label_reports([own[0] for own in references]), label_reports(texts), "rule")
    columns = ReportStatistics(tables, "", "").columns()
    return scores_of_sums(columns, 1)["ce_rule_f1_example_14_uncertain_negative"]


def training_frequencies(path: Path, studies: References) -> Frequencies:
    """Document frequencies of ``studies``' cleaned texts: from ``path`` if it is about them, else counted and kept.

    What occurs in one study only weighs as much as what occurs in none, and is left out.
    """
    key = hashlib.sha256(json.dumps(list(map(list, studies))).encode()).hexdigest()
    kept = _read(path)
    if kept.get("texts_sha256") != key:
        found = document_frequencies([list(texts) for texts in studies])
        kept = {
            "texts_sha256": key,
            "studies": len(studies),
            "frequencies": {" ".join(ngram): count for ngram, count in sorted(found.items()) if count > 1},
        }
        write_private(path, json.dumps(kept, ensure_ascii=False))
    frequencies = Counter({tuple(ngram.split(" ")): count for ngram, count in kept["frequencies"].items()})
    return frequencies, kept["studies"]


def _read(path: Path) -> dict:
    try:
        content = read_json(path, MAX_ANNOTATION)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
