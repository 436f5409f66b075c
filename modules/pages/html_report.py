"""report.html: one file with a model's scores, its training curves, and generated reports next to their references.

Self-contained (images inside, no script, nothing fetched), escaped, and restricted by a Content-Security-Policy to its
own style sheet: the reports are private, and they are untrusted text.
"""

import base64
import hashlib
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from modules.pages.html_scores import REPORTS, ScoreRow, class_tables, reference_table, score_tables, score_tiles
from modules.pages.plots import PANEL_TITLES, History, training_figures
from modules.pages.sentences import Sentence, compare_captions, compare_sentences
from modules.runtime.records import write_private

THUMBNAIL = 320  # pixels of the longer side
_TEMPLATES = Path(__file__).parent / "templates"
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


@dataclass(frozen=True)
class Sample:
    """A study: its images, the name of each view, the reference (cleaned, not cut) and the generated report.

    ``captions``, if any, are shown instead of the reference.
    """

    id: str
    images: Sequence[Image.Image]
    views: Sequence[str]
    reference: str
    generated: str
    captions: Sequence[str] = ()


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
    flags: Mapping[str, Any],
    provenance: Mapping[str, Any],
    references: Mapping[str, str] = REPORTS,
    by_reference: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the page with mode 0600; InputError where it cannot be written.

    ``scores``: the model's rows and the baselines'. ``classes``: by labeler, its class_table
    (modules.evaluation.clinical_scores). ``history``: see modules.pages.plots. ``variety``: collapse_statistics of
    "model", "references" and so on. ``samples`` may be a generator: one study's images are in memory at a time.
    ``references``: the heading of each form of them. ``by_reference``: scores of references seen in training and of
    others. ``notes``: sentences below the scores. ``flags`` and ``provenance`` are shown as they are, nested ones
    flattened.
    """
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = training_figures(history, best_epoch=best_epoch)
    page = environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        synthetic=synthetic,
        warnings=warnings,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        written=time.strftime("%Y-%m-%d %H:%M"),
        tiles=score_tiles(scores),
        tables=score_tables(scores, references),
        class_tables=class_tables(classes),
        reference_table=reference_table(by_reference or {}),
        notes=notes,
        variety=_variety(variety),
        figures=[(PANEL_TITLES[name], data_uri(png, "image/png")) for name, png in figures.items()],
        samples=[_sample(sample) for sample in tqdm(samples, desc="report page", leave=False, disable=None)],
        settings=[("Flags", _flatten(flags)), ("Provenance", _flatten(provenance))],
    )
    write_private(path, page)


def data_uri(content: bytes, media_type: str) -> str:
    """``content`` as a data: URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG at most THUMBNAIL pixels long, without the file's metadata."""
    small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _sample(sample: Sample) -> dict[str, Any]:
    if sample.captions:
        reference, generated = compare_captions(sample.captions, sample.generated)
    else:
        reference, generated = compare_sentences(sample.reference, sample.generated)
    shared = sum(sentence.shared for sentence in generated)
    if shared == len(reference) == len(generated):
        agreement = "same"
    else:
        agreement = "part" if shared else "none"
    views = [*sample.views, *[""] * (len(sample.images) - len(sample.views))]
    images = [
        {"uri": data_uri(thumbnail(image), "image/jpeg"), "view": view or f"view {number}"}
        for number, (image, view) in enumerate(zip(sample.images, views, strict=False), start=1)
    ]
    texts = " ".join(sample.captions) or sample.reference
    return {
        "id": sample.id,
        "images": images,
        "agreement": agreement,
        "shared": shared,
        "what": "captions" if sample.captions else "reference sentences",
        "sides": [_side("reference", reference, texts), _side("generated", generated, sample.generated)],
    }


def _side(name: str, sentences: list[Sentence], report: str) -> dict[str, Any]:
    return {"name": name, "sentences": sentences, "tokens": len(report.split())}


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
