"""What a page shows of single studies: labels, scores of its own for each report, and the studies that open it.

Shapes: N reports.
"""

import numpy as np

from modules.evaluation.metric_table import FULL
from modules.evaluation.scored import Scored
from modules.pages.comparison import report_scores
from modules.pages.findings import best_middle_worst, compare_labels
from modules.pages.html_scores import OWN_SCORES, shown_name
from modules.pages.studies import Sample

RANKING = "ROUGE_L"  # of single reports: BLEU-4 is zero for most


def labels_of(scored: Scored, system: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels (N, 14) of whole references and of a system's reports, by the first labeler; None without one."""
    first = next(iter(scored.labels.values()), None)
    return None if first is None else (first[f"references{FULL}"], first[system])


def own_scores(scored: Scored, system: str) -> dict[str, np.ndarray]:
    """Each headline score of single reports (N,), by its name in results.json; only those that were computed."""
    found = {name: report_scores(scored.statistics[system], name) for name in OWN_SCORES}
    return {name: values for name, values in found.items() if values is not None}


def highlights(scored: Scored, system: str) -> tuple[list[tuple[str, int]], str]:
    """The studies that open the page, each with its rank, and how they were chosen."""
    words = report_scores(scored.statistics[system], RANKING)
    chosen, by = best_middle_worst(*(labels_of(scored, system) or (None, None)), words)
    return chosen, by.replace("word score", shown_name(RANKING))


def samples_without_images(
    scored: Scored, system: str, ids: list[str], references: list[list[str]], *, captions: bool
) -> list[Sample]:
    """Every study with its texts, findings and scores; of ``captions`` a reference has several texts."""
    labels, scores = labels_of(scored, system), own_scores(scored, system)
    return [
        Sample(
            id=ids[row],
            images=[],
            views=[],
            reference=texts[0],
            generated=scored.reports[system][row],
            captions=texts if captions else (),
            findings=None if labels is None else compare_labels(labels[0][row], labels[1][row]),
            scores={name: float(values[row]) for name, values in scores.items()},
        )
        for row, texts in enumerate(references)
    ]
