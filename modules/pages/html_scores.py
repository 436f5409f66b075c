"""The scores of report.html: headline figures, tables for both forms of the references, clinical tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modules.evaluation.clinical_scores import FREQUENT, MIN_POSITIVES
from modules.evaluation.metric_table import (
    CLINICAL_F1,
    FULL,
    METRIC_NAMES,
    NLL,
    SENTENCE_METRICS,
    known_score,
    smaller_is_better,
)

_CLINICAL_HEADLINES = {
    CLINICAL_F1.format("micro") + FULL: "Clinical F1 (rules)",
    CLINICAL_F1.format("macro") + FULL: "Clinical F1, macro (rules)",
}
_HEADLINES = (*(metric.headline.name for metric in SENTENCE_METRICS), *_CLINICAL_HEADLINES)
_EXAMPLE_F1 = CLINICAL_F1.format("example") + FULL
_CLINICAL_NAMES = {**_CLINICAL_HEADLINES, _EXAMPLE_F1: "Clinical F1 (rules)"}
# What the page says of single reports; corpus scores of several words in a row are zero for most of them.
OWN_SCORES = (*(metric.headline.name for metric in SENTENCE_METRICS if metric.name != "BLEU"), _EXAMPLE_F1)
REPORTS = {
    "": "References cut to the maximum length, as the R2Gen family scores (comparable with published figures)",
    FULL: "Full references (nothing cut, rare words kept)",
}
CAPTIONS = {"": "Against all captions of an image, as COCO's evaluation scores (comparable with published figures)"}
_LABELERS = {"rule": "labels by rules", "chexbert": "labels by CheXbert"}
_CLINICAL = {
    "precision_micro_14": "Precision, micro",
    "recall_micro_14": "Recall, micro",
    "f1_micro_14": "F1, micro",
    "f1_macro_14": "F1, macro",
    f"f1_macro_{FREQUENT}": f"F1, macro, classes with ≥ {MIN_POSITIVES} positives",
    "f1_example_14": "F1, by report",
    "f1_micro_5": "F1, micro, 5 classes",
    "f1_macro_5": "F1, macro, 5 classes",
}


@dataclass(frozen=True)
class ScoreRow:
    """A row of the score tables; ``scores`` by their names in results.json, None where one could not be computed.

    ``tag`` is shown with the row's name and its headline figures: what a reader must know to compare them.
    ``intervals``: the limits of each score that has them.
    """

    name: str
    split: str
    scores: Mapping[str, float | None]
    is_baseline: bool = False
    tag: str = ""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def score_tiles(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """The headline figures of the test split (else of the first row's), each with the better baseline's."""
    models = [row for row in rows if not row.is_baseline]
    if not models:
        return []
    model = next((row for row in models if row.split == "test"), models[0])
    baselines = [row for row in rows if row.is_baseline and row.split == model.split]
    tiles = []
    for name in _HEADLINES:
        if name in _CLINICAL_HEADLINES and name not in model.scores:
            continue
        best = _best_baseline(name, baselines)
        tiles.append(
            {
                "name": f"{shown_name(name)} {model.tag}".rstrip(),
                "split": model.split,
                "value": shown_value(model.scores.get(name)),
                "verdict": _verdict(name, model, baselines),
                "interval": _interval(model, name),
                "baseline": best and (shown_value(best[0]), best[1]),
            }
        )
    return tiles


def _best_baseline(name: str, baselines: Sequence[ScoreRow]) -> tuple[float, str] | None:
    """The best score of the baselines, and whose it is."""
    found = [(row.scores[name], row.name) for row in baselines if row.scores.get(name) is not None]
    return (min if smaller_is_better(name) else max)(found, default=None)


def _verdict(name: str, model: ScoreRow, baselines: Sequence[ScoreRow]) -> str:
    """ "above" the better baseline, "cut" where that holds against cut references only, else "not above"."""
    full = f"{name}{FULL}"
    if not _beats(name, model, baselines):
        return "not above"
    return "cut" if model.scores.get(full) is not None and not _beats(full, model, baselines) else "above"


def _beats(name: str, model: ScoreRow, baselines: Sequence[ScoreRow]) -> bool:
    value, best = model.scores.get(name), _best_baseline(name, baselines)
    if value is None or best is None:
        return False
    return value < best[0] if smaller_is_better(name) else value > best[0]


def reference_table(by_reference: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Headline scores for references seen in training and for the others; None where one kind does not occur."""
    if not all(part["scores"] for part in by_reference.values()) or not by_reference:
        return None
    names = [
        name
        for headline in _HEADLINES
        for name in dict.fromkeys((headline, f"{headline.removesuffix(FULL)}{FULL}"))
        if any(name in scores for part in by_reference.values() for scores in part["scores"].values())
    ]
    rows = [
        (f"{system}, {part['reports']:,} references {kind}", [shown_value(scores.get(name)) for name in names])
        for kind, part in by_reference.items()
        for system, scores in part["scores"].items()
    ]
    columns = [f"{shown_name(name)}{' (full)' if name.endswith(FULL) else ''}" for name in names]
    return {"columns": columns, "rows": rows}


def score_tables(rows: Sequence[ScoreRow], references: Mapping[str, str] = REPORTS) -> list[dict[str, Any]]:
    """A table for each form of the references, then one for each labeler's clinical scores."""
    tables = []
    for suffix, caption in references.items():
        names = [f"{name}{suffix}" for name in METRIC_NAMES]
        names += [
            name
            for row in rows
            for name in row.scores
            if name.endswith(FULL) == bool(suffix) and not name.startswith("ce_")
        ]
        tables.append(_table(caption, {name: shown_name(name) for name in names}, rows))
    for labeler in dict.fromkeys(found for row in rows for found in _labelers(row)):
        columns = {f"ce_{labeler}_{key}_uncertain_negative{FULL}": heading for key, heading in _CLINICAL.items()}
        caption = (
            f"Clinical efficacy against full references: {_LABELERS.get(labeler, labeler)}, 14 classes, "
            "uncertain as negative"
        )
        tables.append(_table(caption, columns, rows))
    return [table for table in tables if table["columns"]]


def class_tables(classes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Classes of each labeler: precision, recall, F1 ("–" without any positive), and positives on each side."""
    tables = []
    for labeler, lines in classes.items():
        rows = [
            (
                line["class"],
                [
                    shown_value(line["precision"] if line["generated_positives"] else None),
                    shown_value(line["recall"] if line["reference_positives"] else None),
                    shown_value(line["f1"] if line["generated_positives"] or line["reference_positives"] else None),
                    f"{line['reference_positives']:,}",
                    f"{line['generated_positives']:,}",
                ],
            )
            for line in lines
        ]
        tables.append({"labeler": _LABELERS.get(labeler, labeler), "rows": rows})
    return tables


def _labelers(row: ScoreRow) -> list[str]:
    return [match[1] for name in row.scores if (match := re.match(r"ce_([a-z0-9]+)_", name))]


def _table(caption: str, columns: Mapping[str, str], rows: Sequence[ScoreRow]) -> dict[str, Any]:
    shown = {name: heading for name, heading in columns.items() if any(name in row.scores for row in rows)}
    lines = [_line(row, list(shown), rows) for row in rows if any(name in row.scores for name in shown)]
    return {"caption": caption, "columns": list(shown.values()), "rows": lines}


def _line(row: ScoreRow, names: Sequence[str], rows: Sequence[ScoreRow]) -> dict[str, Any]:
    cells = []
    for name in names:
        rivals = [
            other.scores[name] for other in rows if other.split == row.split and other.scores.get(name) is not None
        ]
        value = row.scores.get(name)
        best = len(rivals) > 1 and value is not None and value == (min if smaller_is_better(name) else max)(rivals)
        cells.append({"text": shown_value(value), "best": best, "interval": _interval(row, name)})
    name = f"{row.name} ({row.tag})" if row.tag else row.name
    return {"name": name, "split": row.split, "is_baseline": row.is_baseline, "cells": cells}


def _interval(row: ScoreRow, name: str) -> str:
    limits = row.intervals.get(name)
    return f"{limits[0]:.3f} – {limits[1]:.3f}" if limits else ""


def shown_name(name: str) -> str:
    """How a score is called on the page; with or without _full."""
    name = name.removesuffix(FULL)
    if f"{name}{FULL}" in _CLINICAL_NAMES:
        return _CLINICAL_NAMES[f"{name}{FULL}"]
    known = known_score(name)
    if known is None:
        return name.replace("BERTScore_", "BERTScore ")
    return f"{known.label} ↓" if known.smaller_is_better and known is not NLL else known.label


def shown_value(value: float | None) -> str:
    """A score with three digits."""
    return "–" if value is None else f"{value:.3f}"
