"""What the reports of several systems came to: scores, intervals, statistics, labels, variety and warnings.

Shapes: N reports of a split, C = 14 classes.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modules.evaluation.bootstrap import LEVEL, RESAMPLES
from modules.evaluation.clinical_scores import MIN_POSITIVES, class_table
from modules.evaluation.diversity import collapse_statistics, collapse_warning, unk_warning
from modules.evaluation.metric_table import FULL, METRIC_NAMES, untagged
from modules.evaluation.report_statistics import ReportStatistics

FEW_UNITS = 10  # over fewer a bootstrap interval is told to be too narrow
CLINICAL_RECORDED = "_14_uncertain_negative"  # of the clinical scores, those that logs and records keep


@dataclass
class Scored:
    """The scores of several systems (a model, the baselines) on one split, and what they were computed from.

    ``references`` are the first texts that words were scored against, one for each report.
    """

    references: Sequence[str] = ()
    reports: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by system
    words: dict[str, Sequence[str]] = field(default_factory=dict)  # by system: what words were scored of, cleaned
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    statistics: dict[str, ReportStatistics] = field(default_factory=dict)
    labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # labeler -> text -> (N, 14)
    missing: dict[str, str] = field(default_factory=dict)  # METEOR, ce_rule, ce_chexbert: why its scores are null
    seen: np.ndarray | None = None  # (N,) bool: references that are training reports word for word

    @property
    def cut(self) -> bool:
        """Whether words were scored against cut references and whole ones, each under its own name."""
        return any(f"{name}{FULL}" in own for own in self.scores.values() for name in METRIC_NAMES)

    @functools.cached_property
    def variety(self) -> dict[str, dict[str, float | int | None]]:
        """The collapse statistics of each system's reports, and of the references."""
        texts = dict(self.reports) | {"references": self.references}
        return {name: collapse_statistics(reports) for name, reports in texts.items()}

    def warnings(self, system: str) -> list[str]:
        """What a reader of this system's scores has to know of its reports and references, a line each."""
        variety, studies = self.variety, self.statistics[system].studies
        lines = [
            collapse_warning(variety[system]),
            unk_warning(variety[system]["unk_share"], variety["references"]["unk_share"]),
        ]
        if len(set(self.references)) == 1 or (studies is not None and len(set(studies.tolist())) == 1):
            lines.append("CIDEr is 0 whatever is generated: with one study, or equal references, no n-gram is rare")
        units, numbers = self.statistics[system].units
        if (count := len(set(numbers.tolist()))) < FEW_UNITS:
            lines.append(
                f"there are {count} {units}: intervals over so few are too narrow"
                if count > 1
                else f"all reports are of one of the {units}: no interval can be given"
            )
        return [line for line in lines if line]

    @functools.cached_property
    def by_reference(self) -> dict[str, dict[str, Any]]:
        """Scores of the reports whose reference is a training report word for word ("seen"), and of the others.

        Empty where nothing is known of the training reports. CIDEr's document frequencies are those of all references.
        """
        if self.seen is None:
            return {}
        found = {}
        for name, rows in (("seen", self.seen), ("unseen", ~self.seen)):
            scores = {}
            if rows.any():
                scores = {
                    system: recorded(statistics.scores(rows), statistics.tag)
                    for system, statistics in self.statistics.items()
                }
            found[name] = {"reports": int(rows.sum()), "scores": scores}
        return found

    @property
    def intervals_are(self) -> str:
        """How the intervals were made."""
        units, _ = next(iter(self.statistics.values())).units
        return (
            f"percentile bootstrap over {units}, {RESAMPLES} resamples, level {LEVEL:g}; none for macro averages over "
            f"classes with fewer than {MIN_POSITIVES} reference positives"
        )

    def class_tables(self, system: str) -> dict[str, list[dict[str, Any]]]:
        """Precision, recall and F1 of each class by labeler, against whole references, uncertain labels as negative."""
        return {
            labeler: class_table(labels[f"references{FULL}"], labels[system]) for labeler, labels in self.labels.items()
        }


def recorded(scores: Mapping[str, Any], tag: str = "") -> dict[str, Any]:
    """The scores that records keep: of clinical ones those of 14 classes, uncertain as negative, ``_full``."""
    return {
        name: value
        for name, value in scores.items()
        if not name.startswith("ce_") or untagged(name, tag).endswith(f"{CLINICAL_RECORDED}{FULL}")
    }
