"""The studies of report.html: images, reports with their differences, findings, scores; sorted and filtered by CSS.

The page runs no script: a choice in a list is a state that the style sheet reads. The rules made here consist of
numbers only.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from modules.evaluation.metric_table import smaller_is_better
from modules.labels.rules import CLASSES
from modules.pages.findings import OUTCOMES, Finding, Findings
from modules.pages.html_scores import shown_name, shown_value
from modules.pages.rendering import data_uri
from modules.pages.sentences import Sentence, compare_captions, compare_sentences

THUMBNAIL = 320  # pixels of the longer side


@dataclass(frozen=True)
class Sample:
    """A study: its images, the name of each view, the reference (cleaned, not cut) and the generated report.

    ``captions``, if any, are shown instead of the reference. ``findings`` are None where nothing was labelled;
    ``scores`` are the report's own, by their names in results.json.
    """

    id: str
    images: Sequence[Image.Image]
    views: Sequence[str]
    reference: str
    generated: str
    captions: Sequence[str] = ()
    findings: Findings | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG at most THUMBNAIL pixels long, without the file's metadata."""
    small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def shown_study(sample: Sample) -> dict[str, Any]:
    """What the template takes of one study; of its images only small JPEGs are kept."""
    if sample.captions:
        reference, generated = compare_captions(sample.captions, sample.generated)
    else:
        reference, generated = compare_sentences(sample.reference, sample.generated)
    views = [*sample.views, *[""] * (len(sample.images) - len(sample.views))]
    images = [
        {"uri": data_uri(thumbnail(image), "image/jpeg"), "view": view or f"view {number}"}
        for number, (image, view) in enumerate(zip(sample.images, views, strict=False), start=1)
    ]
    return {
        "id": sample.id,
        "images": images,
        "agreement": _agreement(reference, "captions" if sample.captions else "sentences"),
        "sides": [_side("reference", reference), _side("generated", generated)],
        "findings": _outcomes(sample.findings),
        "labels": sample.findings,
        "values": dict(sample.scores),
        "scores": [(shown_name(name), shown_value(value)) for name, value in sample.scores.items()],
        "classes": "",
    }


def _side(name: str, sentences: list[Sentence]) -> dict[str, Any]:
    return {"name": name, "sentences": sentences, "tokens": sum(each.words for each in sentences)}


def _agreement(reference: list[Sentence], what: str) -> str:
    """How much of the reference was generated."""
    words = sum(sentence.words for sentence in reference)
    if what == "captions" or not words:
        return f"{sum(sentence.shared for sentence in reference)} of {len(reference)} {what} generated"
    share = sum(sentence.shared_words for sentence in reference) / words
    same = sum(sentence.shared for sentence in reference)
    return f"{same} of {len(reference)} reference sentences and {share:.0%} of its words generated"


def _outcomes(findings: Findings | None) -> list[tuple[str, Sequence[Finding]]] | None:
    return findings and [(name, getattr(findings, name)) for name in OUTCOMES]


@dataclass(frozen=True)
class Browser:
    """What sorts and filters the studies: the entries of each list, and the rules of the style sheet."""

    studies: Sequence[dict[str, Any]]
    scores: Sequence[str]  # headings of those that every study has
    classes: Sequence[tuple[int, str, Sequence[int]]]  # number, name, how often found, missed, invented
    style: str


def browser(studies: Sequence[dict[str, Any]]) -> Browser:
    """Prepare ``studies`` (of ``shown_study``); each gets the class names that the rules select it by."""
    names = [name for name in (studies[0]["values"] if studies else ()) if all(name in s["values"] for s in studies)]
    classes: list[list[str]] = [[] for _ in studies]
    rules = []
    for key, name in enumerate(names):
        values = np.array([study["values"][name] for study in studies])
        worst_first = np.argsort(-values if smaller_is_better(name) else values, kind="stable")
        quarter = -(-len(studies) // 4)
        for place, row in enumerate(worst_first.tolist(), start=1):
            place_rule = f"> :nth-child({row + 1}) {{ order: calc(var(--way) * {place}); }}"
            rules.append(f".browse:has(.by-{key}:checked) .samples {place_rule}")
            classes[row] += [f"low-{key}"] * (place <= quarter) + [f"high-{key}"] * (place > len(studies) - quarter)
        rules += [_only(f":has(.{end}-of-{key}:checked)", f".{end}-{key}") for end in ("low", "high")]
    counts = {number: [0, 0, 0] for number in range(len(CLASSES))}
    for study, own in zip(studies, classes, strict=True):
        for kind, (outcome, found) in enumerate(study["findings"] or ()):
            own += [outcome] * bool(found)
            for finding in found:
                own.append(f"{outcome}-{finding.number}")
                counts[finding.number][kind] += 1
    occurring = [(number, CLASSES[number], count) for number, count in counts.items() if any(count)]
    rules += _class_rules([number for number, _, _ in occurring])
    labelled = [study | {"classes": " ".join(own)} for study, own in zip(studies, classes, strict=True)]
    return Browser(labelled, [shown_name(name) for name in names], occurring, "\n".join(rules))


def _class_rules(numbers: Iterable[int]) -> list[str]:
    """Rules for each class with each outcome or any, and for each outcome of any class."""
    rules = [_only(f":has(.class-any:checked):has(.{name}-only:checked)", f".{name}") for name in OUTCOMES]
    for number in numbers:
        state, every = f":has(.class-{number}:checked)", ", ".join(f".{name}-{number}" for name in OUTCOMES)
        rules.append(_only(f"{state}:has(.any-outcome:checked)", every))
        rules += [_only(f"{state}:has(.{name}-only:checked)", f".{name}-{number}") for name in OUTCOMES]
    return rules


def _only(state: str, selected: str) -> str:
    return f".browse{state} .samples > :not({selected}) {{ display: none; }}"
