"""Which clinical labels of a reference its generated report has, lacks or adds; and which studies to show first.

Labels are 1 positive, 0 negative, -1 uncertain, NaN not mentioned. Shapes: N studies, 14 classes in CLASSES order.
"""

from typing import NamedTuple

import numpy as np

from modules.evaluation.clinical_scores import outcomes, ratios
from modules.labels.rules import CLASSES

OUTCOMES = ("found", "missed", "invented")
RANKS = ("best", "middle", "worst")
# Labels that do not make a study worth showing: what is left is a finding.
_NO_FINDINGS = ("No Finding", "Support Devices")


class Finding(NamedTuple):
    """A class, and what to know of the side that does not claim it: "uncertain in the reference", or nothing."""

    name: str
    note: str = ""

    @property
    def number(self) -> int:
        """Its place in CLASSES."""
        return CLASSES.index(self.name)


class Findings(NamedTuple):
    """The positive labels of a reference and a generated report."""

    found: tuple[Finding, ...]  # of both
    missed: tuple[Finding, ...]  # of the reference only
    invented: tuple[Finding, ...]  # of the generated report only


def compare_labels(reference: np.ndarray, generated: np.ndarray) -> Findings:
    """Compare the labels (14,) of one study, uncertain ones as negative as in the scores."""

    def chosen(rows: np.ndarray, other: np.ndarray, side: str) -> tuple[Finding, ...]:
        return tuple(
            Finding(CLASSES[column], f"uncertain in the {side}" if other[column] == -1 else "")
            for column in np.flatnonzero(rows)
        )

    true, claimed = reference == 1, generated == 1
    return Findings(
        chosen(true & claimed, generated, "generated report"),
        chosen(true & ~claimed, generated, "generated report"),
        chosen(~true & claimed, reference, "reference"),
    )


def agreement(references: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """F1 (N,) of each study's labels (N, 14), uncertain ones as negative."""
    found = outcomes(references, generated, "negative")
    counts = (found.true_positive, found.false_positive, found.false_negative)
    return ratios(*(count.sum(axis=1) for count in counts))["f1"]


def best_middle_worst(
    references: np.ndarray | None, generated: np.ndarray | None, words: np.ndarray
) -> tuple[list[tuple[str, int]], str]:
    """Three studies, each with its rank in words, and a sentence on how they were chosen.

    Where there are labels (N, 14), the candidates are the studies whose reference has a finding (all studies, if these
    are fewer than three), ranked by their ``agreement`` and then by ``words`` (N,), a score of each report; without
    labels all studies by ``words``. Fewer studies give fewer.
    """
    count = len(words)
    rows, rank, by = np.arange(count), words[:, None], "word score"
    if references is not None and generated is not None:
        rank = np.column_stack([agreement(references, generated), words])
        by = "F1 of the findings, then word score"
        findings = [column for column, name in enumerate(CLASSES) if name not in _NO_FINDINGS]
        rows = np.flatnonzero((references[:, findings] == 1).any(axis=1))
    if len(rows) < len(RANKS):
        rows = np.arange(count)
    which = "studies with a finding" if len(rows) < count else "studies"
    # The last key is the first to sort by; equal studies stay in the split's order.
    order = rows[np.lexsort([-column for column in rank[rows].T[::-1]])]
    chosen: dict[int, str] = {}
    for name, place in zip(RANKS, (0, len(order) // 2, -1), strict=True):
        if len(order):
            chosen.setdefault(int(order[place]), name)
    return [(name, row) for row, name in chosen.items()], f"Of {len(rows):,} {which}, by {by}."
