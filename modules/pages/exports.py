"""A run's reports in the formats of other tools and public leaderboards.

Reports and ids are private: all files are readable by their owner only (mode 0600).
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from modules.labels.rules import CLASSES
from modules.runtime.records import write_private, write_results


def write_exports(folder: str | Path, ids: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> None:
    """Write N generated reports and their references, unchanged from the annotation, into ``folder``.

    ``reports.json``: a list of {id, report, reference}. ``predicted_reports.csv`` and ``gt_reports.csv``: study_id and
    report, for CXR-Report-Metric (BLEU, BERTScore, CheXbert similarity, RadGraph F1, RadCliQ). ``rexrank.json``: what
    ReXrank's scripts take, by id, the reference as its findings, with an empty impression, which they would otherwise
    spell None. ``captions.json``: COCO's format of results, with its integer ids.
    """
    folder = Path(folder)
    triples = list(zip(ids, generated, references, strict=True))
    write_results(
        folder / "reports.json",
        [{"id": key, "report": report, "reference": reference} for key, report, reference in triples],
    )
    write_results(
        folder / "rexrank.json",
        {
            key: {"model_prediction": report, "section_findings": reference, "section_impression": ""}
            for key, report, reference in triples
        },
    )
    write_results(
        folder / "captions.json", [{"image_id": _coco_id(key), "caption": report} for key, report, _ in triples]
    )
    for name, reports in (("predicted_reports.csv", generated), ("gt_reports.csv", references)):
        _write_csv(folder / name, [("study_id", "report"), *zip(ids, reports, strict=True)])


def write_caption_exports(
    folder: str | Path, ids: Sequence[str], generated: Sequence[str], captions: Sequence[Sequence[str]]
) -> None:
    """Write N generated captions and all captions of their images, unchanged from the annotation, into ``folder``.

    ``captions.json`` and ``references.json`` are the two files that COCO's evaluation reads; ``reports.json``: a list
    of {id, report, references}.
    """
    folder, keys = Path(folder), [_coco_id(key) for key in ids]
    texts = [(key, text) for key, several in zip(keys, captions, strict=True) for text in several]
    write_results(
        folder / "captions.json",
        [{"image_id": key, "caption": text} for key, text in zip(keys, generated, strict=True)],
    )
    write_results(
        folder / "references.json",
        {
            "info": {},
            "images": [{"id": key} for key in keys],
            "annotations": [
                {"id": number, "image_id": key, "caption": text} for number, (key, text) in enumerate(texts)
            ],
        },
    )
    write_results(
        folder / "reports.json",
        [
            {"id": key, "report": report, "references": list(several)}
            for key, report, several in zip(ids, generated, captions, strict=True)
        ],
    )


def _coco_id(key: str) -> int | str:
    # COCO's own ids are numbers; "001" is another one than "1".
    return int(key) if len(key) < 19 and key.isdecimal() and str(int(key)) == key else key


def write_labelled(
    folder: str | Path,
    generated: Sequence[str],
    references: Sequence[str],
    labels: np.ndarray,
    reference_labels: np.ndarray,
) -> None:
    """Write ``res_labeled.csv`` and ``gts_labeled.csv``, which R2Gen's compute_ce.py reads.

    Both have a column of N reports, then the classes of ``labels`` and ``reference_labels`` (N, 14): 1, 0, -1, nothing.
    """
    for name, reports, values in (
        ("res_labeled.csv", generated, labels),
        ("gts_labeled.csv", references, reference_labels),
    ):
        cells = [["" if np.isnan(value) else str(int(value)) for value in row] for row in values]
        rows = [[report, *row] for report, row in zip(reports, cells, strict=True)]
        _write_csv(Path(folder) / name, [("Reports", *CLASSES), *rows])


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_private(path, text.getvalue())
