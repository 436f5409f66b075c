"""report.html: one file that shows what a model scored, how it trained, and what it wrote beside what it should have.

Self-contained (images inside, no script, nothing fetched), escaped, and closed by a Content-Security-Policy to all
but its own style sheet: the reports in it are private, and they are text that others wrote.
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

from modules.plots import PANEL_TITLES, History, training_figures
from modules.records import write_private
from modules.sentences import Sentence, compare_sentences

THUMBNAIL = 320  # pixels of the longer side
_TEMPLATES = Path(__file__).parent / "templates"
_NAMES = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
_HEADLINES = ("BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
_REFERENCES = {
    "": "References cut to the maximum length, as the R2Gen family scores (comparable with published figures)",
    "_full": "Full references (nothing cut, rare words kept)",
}
_VARIETY = (
    ("Reports", "num_reports", "{:,}"), ("Different reports", "unique_reports", "{:,}"),
    ("Share of different reports", "unique_share", "{:.1%}"),
    ("Share of the commonest report", "commonest_share", "{:.1%}"),
    ("Mean length in tokens", "mean_length", "{:.1f}"), ("Diversity within reports (SimCTG)", "diversity", "{:.3f}"),
)


@dataclass(frozen=True)
class ScoreRow:
    """A line of the score table; ``scores`` as modules.metrics.score names them, None where one could not run.

    ``tag`` says beside its name, and beside its headline figures, what they cannot be compared without knowing.
    """

    name: str
    split: str
    scores: Mapping[str, float | None]
    is_floor: bool = False
    tag: str = ""


@dataclass(frozen=True)
class Sample:
    """A study: its images, the name of each view, the reference (cleaned, not cut) and the generated report."""

    id: str
    images: Sequence[Image.Image]
    views: Sequence[str]
    reference: str
    generated: str


def write_report(
    path: str | Path, *, title: str, subtitle: str, synthetic: bool, scores: Sequence[ScoreRow],
    meteor_error: str | None, history: History, best_epoch: int | None, variety: Mapping[str, Mapping[str, Any]],
    warnings: Sequence[str], samples: Iterable[Sample], flags: Mapping[str, Any], provenance: Mapping[str, Any],
) -> None:
    """Write the page with mode 0600. InputError where it cannot be written.

    ``scores``: the model's rows and the floors'. ``history``: see modules.plots. ``variety``: a name ("generated",
    "references", ...) to its modules.diversity.collapse_statistics. ``samples`` may be a generator: one study's images
    are held at a time. ``flags`` and ``provenance`` are shown as they are, nested ones flattened.
    """
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    figures = training_figures(history, best_epoch=best_epoch)
    page = environment.get_template("report.html.j2").render(
        title=title, subtitle=subtitle, synthetic=synthetic, warnings=warnings, style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        written=time.strftime("%Y-%m-%d %H:%M"), tiles=_tiles(scores), tables=_score_tables(scores),
        meteor_error=meteor_error, variety=_variety(variety),
        figures=[(PANEL_TITLES[name], data_uri(png, "image/png")) for name, png in figures.items()],
        samples=[_sample(sample) for sample in tqdm(samples, desc="report page", leave=False, disable=None)],
        settings=[("Flags", _flatten(flags)), ("Provenance", _flatten(provenance))])
    write_private(path, page)


def data_uri(content: bytes, media_type: str) -> str:
    """Return ``content`` as a data: address."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: Image.Image) -> bytes:
    """Return a JPEG at most THUMBNAIL pixels long; whatever the file said beside its pixels is left out."""
    small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _sample(sample: Sample) -> dict[str, Any]:
    reference, generated = compare_sentences(sample.reference, sample.generated)
    shared = sum(sentence.shared for sentence in generated)
    if shared == len(reference) == len(generated):
        agreement = "same"
    else:
        agreement = "part" if shared else "none"
    views = [*sample.views, *[""] * (len(sample.images) - len(sample.views))]
    images = [{"uri": data_uri(thumbnail(image), "image/jpeg"), "view": view or f"view {number}"}
              for number, (image, view) in enumerate(zip(sample.images, views, strict=False), start=1)]
    return {"id": sample.id, "images": images, "agreement": agreement, "shared": shared,
            "sides": [_side("reference", reference, sample.reference), _side("generated", generated, sample.generated)]}


def _side(name: str, sentences: list[Sentence], report: str) -> dict[str, Any]:
    return {"name": name, "sentences": sentences, "tokens": len(report.split())}


def _tiles(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """The headline figures of the test split (else of the first row's), each beside the better floor's."""
    models = [row for row in rows if not row.is_floor]
    if not models:
        return []
    model = next((row for row in models if row.split == "test"), models[0])
    tiles = []
    for name in _HEADLINES:
        value = model.scores.get(name)
        floors = [(row.scores[name], row.name) for row in rows
                  if row.is_floor and row.split == model.split and row.scores.get(name) is not None]
        floor = max(floors, default=None)
        above = None if floor is None or value is None else value > floor[0]
        shown = f"{_shown_name(name)} {model.tag}".rstrip()
        tiles.append({"name": shown, "split": model.split, "value": _shown(value), "above": above,
                      "floor": floor and (_shown(floor[0]), floor[1])})
    return tiles


def _score_tables(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    tables = []
    for suffix, caption in _REFERENCES.items():
        extra = [name for row in rows for name in row.scores
                 if name.endswith("_full") == bool(suffix) and name.removesuffix("_full") not in _NAMES]
        names = [f"{name}{suffix}" for name in _NAMES] + list(dict.fromkeys(extra))
        names = [name for name in names if any(name in row.scores for row in rows)]
        if names:
            tables.append({"caption": caption, "columns": [_shown_name(name) for name in names],
                           "rows": [_score_line(row, names, rows) for row in rows]})
    return tables


def _score_line(row: ScoreRow, names: Sequence[str], rows: Sequence[ScoreRow]) -> dict[str, Any]:
    cells = []
    for name in names:
        rivals = [other.scores[name] for other in rows
                  if other.split == row.split and other.scores.get(name) is not None]
        value = row.scores.get(name)
        best = len(rivals) > 1 and value is not None and value == (min(rivals) if name == "nll" else max(rivals))
        cells.append({"text": _shown(value), "best": best})
    name = f"{row.name} ({row.tag})" if row.tag else row.name
    return {"name": name, "split": row.split, "is_floor": row.is_floor, "cells": cells}


def _variety(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"names": list(columns), "lines": [
        (label, [form.format(column[key]) if column[key] is not None else "–" for column in columns.values()])
        for label, key, form in _VARIETY]}


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


def _shown_name(name: str) -> str:
    return {"ROUGE_L": "ROUGE-L", "CIDEr_train_idf": "CIDEr (training idf)"}.get(
        name.removesuffix("_full"), name.removesuffix("_full").replace("BLEU_", "BLEU-"))


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
