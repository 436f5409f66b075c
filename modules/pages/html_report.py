"""report.html: one file with a model's scores, its training curves, and generated reports next to their references.

Self-contained (images inside, no script, nothing fetched), escaped, and restricted by a Content-Security-Policy to its
own style sheet: the reports are private, and they are untrusted text.
"""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modules.pages.curves import svg_curves, value_table
from modules.pages.html_scores import REPORTS, ScoreRow, class_tables, reference_table, score_tables, score_tiles
from modules.pages.plots import History
from modules.pages.rendering import page_parts
from modules.pages.studies import Sample, browser, shown_study
from modules.runtime.records import write_private

_VARIETY = (
    ("Reports", "num_reports", "{:,}"),
    ("Different reports", "unique_reports", "{:,}"),
    ("Share of different reports", "unique_share", "{:.1%}"),
    ("Share of the commonest report", "commonest_share", "{:.1%}"),
    ("Mean length in tokens", "mean_length", "{:.1f}"),
    ("Share of <unk> among the words", "unk_share", "{:.1%}"),
    ("Diversity within reports (SimCTG)", "diversity", "{:.3f}"),
    *(
        (f"Repeated {name} within reports, %", f"repetition_{n}", "{:.2f}")
        for n, name in ((2, "word pairs"), (3, "triples"), (4, "fours"))
    ),
    *(
        (f"Different {name} of all reports (distinct-{n})", f"distinct_{n}", "{:.3f}")
        for n, name in ((1, "words"), (2, "word pairs"), (3, "triples"))
    ),
)


def write_report(
    path: str | Path,
    *,
    title: str,
    subtitle: str,
    synthetic: bool,
    scores: Sequence[ScoreRow],
    classes: Mapping[str, Sequence[Mapping[str, Any]]],
    history: History,
    best_epoch: int | None,
    variety: Mapping[str, Mapping[str, Any]],
    warnings: Sequence[str],
    samples: Iterable[Sample],
    highlights: Iterable[tuple[str, Sample]] = (),
    chosen_by: str = "",
    total: int | None = None,
    flags: Mapping[str, Any],
    provenance: Mapping[str, Any],
    references: Mapping[str, str] = REPORTS,
    by_reference: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the page with mode 0600; InputError where it cannot be written.

    ``scores``: the model's rows and the baselines'. ``classes``: by labeler, its class_table
    (modules.evaluation.clinical_scores). ``history``: see modules.pages.plots. ``variety``: collapse_statistics of
    "model", "references" and so on. ``highlights`` open the page, each with its rank; ``chosen_by`` says how they were
    chosen. ``samples``, of the ``total`` studies that were tested, are the ones to browse. Both may be generators: one
    study's images are in memory at a time. ``references``: the heading of each form. ``by_reference``: scores of
    references seen in training and of others. ``notes``: sentences below the scores. ``flags`` and ``provenance`` are
    shown as they are, nested ones flattened.
    """
    bar = functools.partial(tqdm, desc="report page", leave=False, disable=None)
    studies = browser([shown_study(sample) for sample in bar(samples)])
    template, parts, hashes = page_parts("report.html.j2", ("report.css",), own_style=studies.style)
    page = template.render(
        **parts,
        hashes=hashes,
        title=title,
        subtitle=subtitle,
        synthetic=synthetic,
        warnings=warnings,
        written=time.strftime("%Y-%m-%d %H:%M"),
        highlights=[(rank, shown_study(sample)) for rank, sample in highlights],
        chosen_by=chosen_by,
        tiles=score_tiles(scores),
        tables=score_tables(scores, references),
        class_tables=class_tables(classes),
        reference_table=reference_table(by_reference or {}),
        notes=notes,
        variety=_variety(variety),
        curves=svg_curves(history, best_epoch=best_epoch),
        values=value_table(history),
        studies=studies,
        total=total,
        settings=[("Flags", _flatten(flags)), ("Provenance", _flatten(provenance))],
    )
    write_private(path, page)


def _variety(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "names": list(columns),
        "lines": [
            (label, [form.format(column[key]) if column[key] is not None else "–" for column in columns.values()])
            for label, key, form in _VARIETY
        ],
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            lines.append((f"{prefix}{key}", " ".join(map(str, value))))
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines
