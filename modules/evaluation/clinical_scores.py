"""Clinical efficacy: precision, recall and F1 of generated reports' labels against the references' labels.

Every key names labeler, score, averaging, class set and how uncertain labels count, for instance
``ce_rule_f1_micro_14_uncertain_negative``: published figures differ in each of these.

Shapes: N reports, C = 14 classes in the order of ``modules.labels.rules.CLASSES``.
"""

from dataclasses import dataclass

import numpy as np

from modules.labels.rules import CLASSES

# The five classes of the CheXpert competition (Irvin et al., 2019, arXiv:1901.07031).
FIVE_CLASSES = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
CLASS_SETS = {"14": CLASSES, "5": FIVE_CLASSES}
UNCERTAIN_POLICIES = ("negative", "positive", "ignored")
AVERAGINGS = ("micro", "macro", "weighted", "example")
RATIOS = ("precision", "recall", "f1")
# F1 macro is given a second time, over the classes with this many reference positives: its interval can be trusted.
MIN_POSITIVES = 5
FREQUENT = f"min{MIN_POSITIVES}"


@dataclass(frozen=True)
class Outcomes:
    """The outcome of each label of each report, (N, C) bool: resampling the N rows gives all scores of a resample."""

    true_positive: np.ndarray
    false_positive: np.ndarray
    false_negative: np.ndarray


def outcomes(references: np.ndarray, hypotheses: np.ndarray, uncertain: str) -> Outcomes:
    """Compare two (N, C) label arrays (1, 0, -1, NaN), with uncertain labels (-1) as a policy of UNCERTAIN_POLICIES.

    Not mentioned (NaN) counts as negative. ``ignored``: where either side is uncertain the pair is left out.
    ValueError for arrays of different shapes or another ``uncertain``.
    """
    references, hypotheses = np.asarray(references), np.asarray(hypotheses)
    if references.shape != hypotheses.shape or references.ndim != 2:
        raise ValueError(f"labels of shape {references.shape} cannot be compared with {hypotheses.shape}")
    if uncertain not in UNCERTAIN_POLICIES:
        raise ValueError(f"uncertain must be one of {UNCERTAIN_POLICIES}, not {uncertain!r}")
    truth, claim = _binary(references, uncertain), _binary(hypotheses, uncertain)
    if uncertain == "ignored":
        kept = (references != -1) & (hypotheses != -1)
        return Outcomes(truth & claim, ~truth & claim & kept, truth & ~claim & kept)
    return Outcomes(truth & claim, ~truth & claim, truth & ~claim)


def scores_of(result: Outcomes) -> dict[str, float]:
    """Precision, recall and F1 with each averaging of AVERAGINGS, keyed ``f1_micro`` and so on.

    Macro is the mean over classes, weighted the mean with their reference positives as weights, example the mean over
    reports. A ratio with denominator 0 is 0, as in scikit-learn with ``zero_division=0``: a class or report without any
    positive label scores 0, so even perfect labels can stay below 1, most of all in example-based scores of the five
    classes.
    """
    counts = np.stack([result.true_positive, result.false_positive, result.false_negative])  # (3, N, C)
    by_class = counts.sum(axis=1)  # (3, C)
    scores = averages(by_class[:, None])
    for name, values in ratios(*counts.sum(axis=2)).items():
        scores[f"{name}_example"] = values.mean(keepdims=True)
    return {
        f"{ratio}_{averaging}": float(scores[f"{ratio}_{averaging}"][0]) for averaging in AVERAGINGS for ratio in RATIOS
    }


def averages(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Micro, macro and weighted averages (R,), keyed ``f1_micro`` and so on, of the classes' counts (3, R, C).

    The counts are true positives, false positives and false negatives of R sets of reports.
    """
    support = counts[0] + counts[2]  # (R, C)
    weights = support / np.maximum(support.sum(axis=1, keepdims=True), 1)
    scores = {f"{name}_micro": values for name, values in ratios(*counts.sum(axis=2)).items()}
    for name, values in ratios(*counts).items():
        scores[f"{name}_macro"] = values.mean(axis=1)
        scores[f"{name}_weighted"] = (values * weights).sum(axis=1)
    return scores


def clinical_scores(references: np.ndarray, hypotheses: np.ndarray, labeler: str = "rule") -> dict[str, float]:
    """The clinical scores of (N, 14) labels, in [0, 1], keyed ``ce_<labeler>_<score>_<averaging>_...``.

    For each policy 24 scores over the 14 and the five classes, and F1 macro over the classes with at least
    MIN_POSITIVES reference positives (``f1_macro_min5``) where there is one.
    """
    scores = {}
    for uncertain in UNCERTAIN_POLICIES:
        result = outcomes(references, hypotheses, uncertain)
        for class_set, names in CLASS_SETS.items():
            columns = [CLASSES.index(name) for name in names]
            chosen = Outcomes(
                result.true_positive[:, columns], result.false_positive[:, columns], result.false_negative[:, columns]
            )
            for name, value in scores_of(chosen).items():
                scores[f"ce_{labeler}_{name}_{class_set}_uncertain_{uncertain}"] = value
        frequent = frequent_classes(_counts(outcomes(references, hypotheses, counted_as(uncertain))))
        if frequent.any():
            f1 = ratios(*_counts(result)[:, :, frequent].sum(axis=0))["f1"]
            scores[f"ce_{labeler}_f1_macro_{FREQUENT}_uncertain_{uncertain}"] = float(f1.mean())
    return scores


def _counts(result: Outcomes) -> np.ndarray:
    return np.stack([result.true_positive, result.false_positive, result.false_negative], axis=1)  # (N, 3, C)


def counted_as(uncertain: str) -> str:
    """The policy that tells how many reference positives there are for the scores of ``uncertain``: "ignored" leaves
    out what a system was uncertain about, so that two systems would be averaged over different classes.
    """
    return "negative" if uncertain == "ignored" else uncertain


def frequent_classes(counts: np.ndarray) -> np.ndarray:
    """(C,) bool: the classes with at least MIN_POSITIVES reference positives in outcomes (N, 3, C).

    The outcomes are those of ``counted_as`` a score's policy.
    """
    return (counts[:, 0] + counts[:, 2]).sum(axis=0) >= MIN_POSITIVES


def class_table(references: np.ndarray, hypotheses: np.ndarray, uncertain: str = "negative") -> list[dict]:
    """Precision, recall, F1 and numbers of positives of each class, from labels (N, 14) of both sides."""
    result = outcomes(references, hypotheses, uncertain)
    true_positive, false_positive, false_negative = (
        count.sum(axis=0) for count in (result.true_positive, result.false_positive, result.false_negative)
    )
    scores = ratios(true_positive, false_positive, false_negative)
    return [
        {
            "class": name,
            **{score: float(values[column]) for score, values in scores.items()},
            "reference_positives": int(true_positive[column] + false_negative[column]),
            "generated_positives": int(true_positive[column] + false_positive[column]),
        }
        for column, name in enumerate(CLASSES)
    ]


def _binary(labels: np.ndarray, uncertain: str) -> np.ndarray:
    positive = labels == 1
    return positive | (labels == -1) if uncertain == "positive" else positive


def ratios(true_positive: np.ndarray, false_positive: np.ndarray, false_negative: np.ndarray) -> dict[str, np.ndarray]:
    """Elementwise precision, recall and F1 = 2 TP / (2 TP + FP + FN) of counts, all of one shape."""
    return {
        "precision": true_positive / np.maximum(true_positive + false_positive, 1),
        "recall": true_positive / np.maximum(true_positive + false_negative, 1),
        "f1": 2 * true_positive / np.maximum(2 * true_positive + false_positive + false_negative, 1),
    }
