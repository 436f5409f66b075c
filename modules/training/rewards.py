"""Rewards of sampled reports: sentence metrics against a study's references (self-critical training)."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.rouge.rouge import Rouge

from modules.evaluation.meteor import Meteor, MeteorError
from modules.evaluation.metrics import cider_scores, document_frequencies
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables, meteor_table, scores_of_sums
from modules.labels.labeler import label_reports
from modules.runtime.errors import InputError
from modules.runtime.records import write_private

References = Sequence[Sequence[str]]
Frequencies = tuple[Counter, int]  # in how many studies each n-gram occurs, and the number of studies


class Reward:
    """``reward(samples, texts)`` scores each text against the references of its sample.

    ``references`` are the cleaned texts of every training sample, by its index. ``name`` is CIDEr (CIDEr-D with
    ``frequencies``), BLEU_1..BLEU_4 (of the single report, smoothed as pycocoevalcap does), ROUGE_L, METEOR (needs
    Java) or clinical_f1 (F1 of the 14 rule-based labels against those of the first reference).
    """

    def __init__(self, name: str, references: References, *, frequencies: Frequencies | None = None):
        self.name, self.references = name, references
        self._score = _scorer(name, frequencies)

    def __call__(self, samples: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """(N,) float64."""
        return self._score([list(self.references[sample]) for sample in samples], list(texts))


def _scorer(name: str, frequencies: Frequencies | None) -> Callable[[list, list], np.ndarray]:
    if name == "CIDEr":
        return lambda references, texts: cider_scores(references, texts, *frequencies)
    if name.startswith("BLEU_"):
        return lambda references, texts: _bleu(references, texts, int(name[-1]))
    if name == "METEOR":
        meteor = Meteor()
        return lambda references, texts: _meteor(meteor, references, texts)
    return {"ROUGE_L": _rouge, "clinical_f1": _clinical_f1}[name]


def _bleu(references: list[list[str]], texts: list[str], order: int) -> np.ndarray:
    scorer = BleuScorer(n=order)
    for own, text in zip(references, texts, strict=True):
        scorer += (text, own)
    return np.array(scorer.compute_score(option="closest")[1][order - 1])


def _rouge(references: list[list[str]], texts: list[str]) -> np.ndarray:
    return Rouge().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(texts)})[1]


def _meteor(meteor: Meteor, references: list[list[str]], texts: list[str]) -> np.ndarray:
    try:
        table = meteor_table(meteor.report_statistics(references, texts))
    except (MeteorError, ValueError) as error:
        raise InputError(f"--scst_reward METEOR: {error}; choose another reward, such as CIDEr") from error
    return scores_of_sums({"METEOR": table}, 1)["METEOR"]


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
