"""Errors of generated reports that labels do not show, by the rule labeler's parse; no weights are needed.

Each score is a mean over reports, and a smaller one is better; docs/EVALUATION.md defines each in one sentence.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from modules.evaluation.metric_table import REPORT_ERRORS
from modules.labels.report_facts import LEFT, OTHER_DEVICE, RIGHT, ReportFacts, report_facts


def report_errors(
    references: Sequence[str], generated: Sequence[str], with_prior: Sequence[bool] | None = None
) -> dict[str, np.ndarray]:
    """(N, 1) of each score of REPORT_ERRORS by name: what each of N reports adds to its mean.

    Of comparison_rate (N, 2): the second column says which reports are counted, those of studies without an earlier
    examination. ``with_prior`` says which have one; where it is None, those whose reference compares.
    """
    pairs = [
        (report_facts(reference), report_facts(text)) for reference, text in zip(references, generated, strict=True)
    ]
    if with_prior is not None:
        pairs = [
            (dataclasses.replace(reference, compares=bool(prior)), text)
            for (reference, text), prior in zip(pairs, with_prior, strict=True)
        ]
    found = {
        score.name: np.array([_COUNTS[score.name](*pair) for pair in pairs], dtype=np.float64)[:, None]
        for score in REPORT_ERRORS
    }
    counted = np.array([not reference.compares for reference, _ in pairs], dtype=np.float64)[:, None]
    found["comparison_rate"] = np.concatenate([found["comparison_rate"], counted], axis=1)
    return found


def _compares_with_nothing(reference: ReportFacts, generated: ReportFacts) -> int:
    return int(generated.compares and not reference.compares)


def _on_the_other_side(reference: ReportFacts, generated: ReportFacts) -> int:
    opposite = ({LEFT}, {RIGHT}), ({RIGHT}, {LEFT})
    return int(any((generated.sides[name], reference.sides.get(name)) in opposite for name in generated.sides))


def _devices_that_are_not_there(reference: ReportFacts, generated: ReportFacts) -> int:
    """Kinds of devices; one that either side names in general only may be any."""
    if OTHER_DEVICE in reference.devices:
        return 0
    new = generated.devices - reference.devices
    return len(new - {OTHER_DEVICE} if reference.devices else new)


def _contradictions(_: ReportFacts, generated: ReportFacts) -> int:
    return generated.contradictions


_COUNTS: Mapping[str, Callable[[ReportFacts, ReportFacts], int]] = {
    "comparison_rate": _compares_with_nothing,
    "laterality_conflicts": _on_the_other_side,
    "hallucinated_devices": _devices_that_are_not_there,
    "contradictions": _contradictions,
}
