"""A report grammar in the manner of IU X-Ray: structured findings -> 20 to 50 words of findings section."""

from collections.abc import Sequence

import numpy as np

from scripts.synthetic.findings import Finding
from scripts.synthetic.phrases import DENIED, PHRASES, Wordings
from scripts.synthetic.styles import STYLES, Normal, Style

_CANNED_SHARE = 0.30  # of normal reports that are said word by word
_WORDING_WEIGHTS = (0.68, 0.22, 0.10)  # of the usual and the rarer wordings
_SECTIONS = {
    "h": {"Cardiomegaly", "Enlarged Cardiomediastinum", "tortuous aorta", "aortic calcification", "hiatal hernia"},
    "b": {"Fracture", "degenerative spine", "scoliosis"},
    "d": {"Support Devices"},
}
_LUNG_CLASSES = {"Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}
_LUNG_KINDS = {"granuloma", "scarring", "hyperinflation", "low lung volumes"}

_ZONES = {"upper": "upper lobe", "mid": "midlung", "lower": "lower lobe", "": ""}
_ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely", "": ""}
_MEASURES = {
    ("nodule", "small"): "small",
    ("nodule", "moderate"): "2 cm",
    ("mass", "moderate"): "4 cm",
    ("mass", "large"): "large",
}
_EXTENT = {"small": "small focal", "moderate": "focal", "large": "extensive", "": ""}
_AMOUNT = {"small": "minimal", "moderate": "moderate", "large": "extensive", "": ""}
_FLUFFY = {"small": "minimal", "moderate": "patchy", "large": "extensive", "": ""}


def slots(finding: Finding) -> dict[str, str]:
    """The words that the phrases of PHRASES may ask for."""
    side, zone, both = finding.side, _ZONES[finding.zone], finding.side == "bilateral"
    place = f"both {zone}s" if both else f"the {side} {zone}"
    base = "both bases" if both else f"the {side} base"
    article = "an" if (finding.size or finding.severity).startswith("i") else "a"
    return {
        "side": side,
        "size": finding.size,
        "severity": finding.severity,
        "severely": _ADVERBS[finding.severity],
        "where": f"{side} {zone}",
        "in_where": f"in {place}",
        "over_where": f"over {place}",
        "lung": "both lungs" if both else f"the {side} lung",
        "at_where": f"at {base}" if finding.zone == "lower" else f"in {place}",
        "basilar": ("bibasilar" if both else f"{side} basilar") if finding.zone == "lower" else f"{side} {zone}",
        "measure": _MEASURES.get((finding.kind, finding.size), ""),
        "extent": _EXTENT[finding.size],
        "amount": _AMOUNT[finding.size],
        "fluffy": _FLUFFY[finding.size],
        "apical": "apical" if finding.zone == "upper" else "basilar",
        "apex": ("apices" if both else "apex") if finding.zone == "upper" else ("bases" if both else "base"),
        "rib_zone": {"mid": "middle"}.get(finding.zone, finding.zone),
        "s": "s" if both else "",
        "angle": "angles" if both else "angle",
        "is_": "are" if both else "is",
        "a": "" if both else article,
        "is_a": "are" if both else f"is {article}",
    }


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[0].upper() + text[1:]


def _choose(wordings: Sequence, rng: np.random.Generator):
    weights = np.array(_WORDING_WEIGHTS[: len(wordings)])
    return wordings[rng.choice(len(wordings), p=weights / weights.sum())]


def _maybe(normal: Normal, rng: np.random.Generator) -> list[str]:
    share, wordings = normal
    return [_choose(wordings, rng)] if rng.random() < share else []


def describe(finding: Finding, terse: bool, rng: np.random.Generator) -> str:
    """One sentence about one finding."""
    wordings: Wordings = PHRASES[finding.finding, finding.kind][int(terse)]
    return _sentence(_choose(wordings, rng).format(**slots(finding)))


def deny(denial: str, denied: Sequence[str], present: set[str]) -> list[str]:
    """The sentence that denies what is absent of ``denied``; [] if nothing is left to deny."""
    items = [item for item in denied if not DENIED[item] & present]
    if not items:
        return []
    return [denial.format(" or ".join(filter(None, (", ".join(items[:-1]), items[-1]))))]


def _section(finding: Finding) -> str:
    names = {finding.finding, finding.kind}
    return next((letter for letter, members in _SECTIONS.items() if names & members), "l")


def draw_style(rng: np.random.Generator) -> int:
    """Which of STYLES dictates, by their shares: the first thing that a report draws."""
    weights = np.array([style.weight for style in STYLES])
    return int(rng.choice(len(STYLES), p=weights / weights.sum()))


def write_report(findings: Sequence[Finding], rng: np.random.Generator) -> str:
    """Dictate a report on ``findings`` (completed); styles and wordings are drawn by their shares."""
    style: Style = STYLES[draw_style(rng)]
    if not findings and rng.random() < _CANNED_SHARE:
        return _choose(style.canned, rng)
    present = {finding.finding for finding in findings}
    told: dict[str, list[str]] = {letter: [] for letter in style.order}
    for finding in findings:
        told[_section(finding)].append(describe(finding, style.terse, rng))
    if "Cardiomegaly" not in present:
        told["h"] = _maybe(style.heart, rng) + told["h"]
    if "Enlarged Cardiomediastinum" not in present:
        told["h"] += _maybe(style.mediastinum, rng)
    if "Edema" not in present:
        told["h"] += _maybe(style.vessels, rng)
    if not present & _LUNG_CLASSES and not _LUNG_KINDS & {finding.kind for finding in findings}:
        told["l"] = _maybe(style.lungs, rng) + told["l"]
    if not told["b"]:
        told["b"] = _maybe(style.bones, rng)
    told["n"] = deny(style.denial, _choose(style.denied, rng), present)
    return " ".join(sentence for letter in style.order for sentence in told[letter])
