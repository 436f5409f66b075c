"""The scores of generated texts in one table, from which flags, results, pages, curves, records and tables derive.

A sentence metric is a file of this folder and its entry in SENTENCE_METRICS. The file defines

    per_report(references, hypotheses)  (N, k) array: what each of N reports adds. References are N lists of texts,
                                        hypotheses N texts, all split into words by single spaces.
    from_sums(sums, count)              optional; (R, s) array: the s scores of R sets of ``count`` reports each, from
                                        the sums (R, k) of their rows. Without it the scores are the columns' means.

Intervals, paired tests and rewards follow from these two. Importing this module imports none of the metrics' files.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# What a score's name says besides the metric: which references were used, and how reports were generated.
FULL = "_full"  # whole references
SELECTION = "selection"  # of a validation: what the best epoch is chosen by instead of the monitored score
TRUNCATED = "_truncated"  # references cut to max_seq_length, as in the R2Gen family; the same as no suffix
REFERENCE_LABELS = "reference_labels"  # the tag of reports that were generated from labels of their references


@dataclass(frozen=True)
class Score:
    """One number of the results: its key, and how it is shown."""

    name: str  # key in results.json
    label: str  # on pages, curves and in messages
    heading: str = ""  # in the column of a paper's table; the label where it is empty
    smaller_is_better: bool = False


@dataclass(frozen=True)
class SentenceMetric:
    """What one file computes; the last of its scores is its headline."""

    name: str  # of its table in statistics.npz
    module: str  # the file in modules/evaluation
    scores: tuple[Score, ...]
    needs_java: bool = False

    @property
    def headline(self) -> Score:
        """The score that represents the metric where there is room for one."""
        return self.scores[-1]

    @property
    def label(self) -> str:
        """The metric's name on pages."""
        return self.name if len(self.scores) > 1 else self.headline.label

    def load(self) -> ModuleType:
        """Import the metric's file."""
        return importlib.import_module(f"modules.evaluation.{self.module}")


SENTENCE_METRICS = (
    SentenceMetric("BLEU", "bleu", tuple(Score(f"BLEU_{n}", f"BLEU-{n}", f"B-{n}") for n in (1, 2, 3, 4))),
    SentenceMetric("METEOR", "meteor", (Score("METEOR", "METEOR", "M"),), needs_java=True),
    SentenceMetric("ROUGE_L", "rouge", (Score("ROUGE_L", "ROUGE-L", "R-L"),)),
    SentenceMetric("CIDEr", "cider", (Score("CIDEr", "CIDEr", "C"),)),
)
NLL = Score("nll", "nll", smaller_is_better=True)
# What XProNet's released code chooses its best model by (Wang et al., 2022): this sum.
XPRONET_SELECTION = {"BLEU_4": 1.0, "BLEU_1": 0.33, "METEOR": 0.67}
XPRONET_SUM = Score("xpronet_selection", "XProNet's sum")
CLINICAL_F1 = "ce_rule_f1_{}_14_uncertain_negative"
CLINICAL_MONITORED = tuple(
    Score(CLINICAL_F1.format(average), f"clinical F1, {average}") for average in ("micro", "macro", "example")
)

# Errors by the rule labeler's parse (modules/evaluation/report_errors.py), against whole references.
REPORT_ERRORS = (
    Score("comparison_rate", "comparisons without a prior", smaller_is_better=True),
    Score("laterality_conflicts", "laterality conflicts", smaller_is_better=True),
    Score("hallucinated_devices", "hallucinated devices", smaller_is_better=True),
    Score("contradictions", "contradicting sentences", smaller_is_better=True),
)

# Of the measures of variety (modules/evaluation/diversity.py) those that should fall.
MONOTONY = tuple(
    Score(name, name, smaller_is_better=True)
    for name in ("commonest_share", "unk_share", "repetition_2", "repetition_3", "repetition_4")
)

# Scores of the package radeval (modules/evaluation/radeval.py): its metric -> its key for each report -> our score.
RADEVAL: dict[str, dict[str, Score]] = {
    "rouge": {
        "rouge1": Score("RadEval_ROUGE_1", "ROUGE-1 (RadEval)"),
        "rouge2": Score("RadEval_ROUGE_2", "ROUGE-2 (RadEval)"),
        "rougeL": Score("RadEval_ROUGE_L", "ROUGE-L (RadEval)"),
    },
    "bertscore": {"bertscore": Score("RadEval_BERTScore", "BERTScore (RadEval)")},
    "radgraph": {
        f"radgraph_{level}": Score(f"RadEval_RadGraph_F1_{level}", f"RadGraph F1, {level} (RadEval)")
        for level in ("simple", "partial", "complete")
    },
    "ratescore": {"ratescore": Score("RadEval_RaTEScore", "RaTEScore")},
    "sembscore": {"sembscore": Score("RadEval_SembScore", "SembScore")},
    "radcliq": {"radcliq_v1": Score("RadEval_RadCliQ_v1", "RadCliQ-v1", smaller_is_better=True)},
    "green": {"green": Score("RadEval_GREEN", "GREEN")},
}

SENTENCE_SCORES = tuple(score for metric in SENTENCE_METRICS for score in metric.scores)
SCORES = {score.name: score for score in (*SENTENCE_SCORES, NLL, XPRONET_SUM, *CLINICAL_MONITORED)}
METRIC_NAMES = tuple(score.name for score in SENTENCE_SCORES)
# What --monitor_metric and --scst_reward accept.
MONITORED = tuple(SCORES)
REWARDS = (*(score.name for score in SENTENCE_SCORES if not score.smaller_is_better), "clinical_f1")
NEED_JAVA = frozenset(score.name for metric in SENTENCE_METRICS if metric.needs_java for score in metric.scores)


def known_score(name: str) -> Score | None:
    """What is known of the score ``name``, whatever references and tag it names; None for one without an entry here."""
    others = (*REPORT_ERRORS, *MONOTONY, *(score for scores in RADEVAL.values() for score in scores.values()))
    plain = name.removesuffix(FULL).removesuffix(TRUNCATED).removesuffix(f"_{REFERENCE_LABELS}")
    return (SCORES | {score.name: score for score in others}).get(plain)


def smaller_is_better(name: str) -> bool:
    """Whether a smaller value of the score ``name``, as for ``known_score``, is better; unknown scores should grow."""
    known = known_score(name)
    return known is not None and known.smaller_is_better


def is_main(name: str, cut: bool = True) -> bool:
    """Whether a score is shown where there is no room for all; ``name`` is without a tag.

    These are words against references as others cut them, or against whole ones where ``cut`` is false, and labels and
    errors of whole references: a cut or <unk>-ed one says something else.
    """
    if name.startswith("ce_"):
        return name.endswith(tuple(f"_f1_{averaging}_14_uncertain_negative{FULL}" for averaging in ("micro", "macro")))
    if known_score(name) in REPORT_ERRORS:
        return name.endswith(FULL)
    return name.endswith(FULL) is not cut or name == "diversity"


def tagged(name: str, tag: str) -> str:
    """A score's name with ``tag`` in it, if any: BLEU_4_<tag>; the suffix _full stays at the end."""
    if not tag:
        return name
    return f"{name.removesuffix(FULL)}_{tag}" + (FULL if name.endswith(FULL) else "")


def untagged(name: str, tag: str) -> str:
    """The inverse of ``tagged``."""
    return name.replace(f"_{tag}", "") if tag else name


def with_aliases(scores: Mapping[str, Any]) -> dict[str, Any]:
    """``scores`` with an alias ``<name>_truncated`` for each one that also has a ``_full`` form."""
    return {**scores, **{f"{name}{TRUNCATED}": value for name, value in scores.items() if f"{name}{FULL}" in scores}}
