"""From a real report and its coding to the structured findings of a phantom: a drawing that shows what it says.

Open-i's MeSH coding is taken first (finding, site, side, severity). Where it is silent on one of the 14 CheXpert
classes, or on an incidental finding that the renderer knows, a mention that the rule labeler calls positive adds it,
with the attributes that its own sentence names. Uncertain mentions are not drawn; nor are mentions that the labeler
calls positive, as CheXpert's conventions have it, in a sentence of normality ("heart size within normal limits"), nor
any of the 14 classes where the coders wrote "normal".
"""

import re
from collections.abc import Sequence
from pathlib import Path

from modules.data.report_tables import read_table
from modules.labels.labeler import RuleLabeler, split_sentences
from modules.prepare.openi import read_openi
from modules.runtime.errors import InputError
from scripts.synthetic import phantom_terms as terms
from scripts.synthetic.findings import ATTRIBUTES, OTHER, RULES, Finding, possible_kinds

_SHADOWS = {"Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}
_NORMALITY = re.compile(r"^no\b|\bnormal\b|unremarkable")
# The labeler takes any word on the size of heart or mediastinum ("stable contours") for a mention.
_SIZES, _ENLARGED = ("Cardiomegaly", "Enlarged Cardiomediastinum"), re.compile(r"enlarg|cardiomegaly|widen|prominen")
_NORMAL = "normal"  # the coders' term for a study without findings
CODING_COLUMNS = ("mesh_major", "images")
_OPPOSITES = ("hyperinflation", "low lung volumes")
_labeler = RuleLabeler()
_incidental, _device = (
    RuleLabeler(FINDINGS=words, ANATOMY={}, CONVENTIONS=(), NOT_MENTIONS={}, WEAK_MENTIONS={})
    for words in (terms.INCIDENTAL, dict(terms.KINDS["Support Devices"]))
)


def read_coding(path: Path) -> dict[str, tuple[str, ...]]:
    """Study id of R2Gen's annotation -> its MeSH terms ("Opacity/lung/base/left").

    ``path``: Open-i's XML files (NLMCXR_reports.tgz or their folder), or a CSV with the columns ``mesh_major`` and
    ``images``, both with ';' between entries. InputError for anything else.
    """
    if path.suffix.lower() != ".csv":
        return {study.id: study.mesh for study in read_openi(path) if study.images}
    table = read_table(path, names=CODING_COLUMNS)
    missing = [name for name in CODING_COLUMNS if name not in table.columns]
    if missing:
        raise InputError(f"--coding {path}: no column {', '.join(missing)}; the columns are {', '.join(table.columns)}")
    mesh, images = table.columns.index("mesh_major"), table.columns.index("images")
    return {
        row[images].split(";")[0].strip().rpartition("-")[0]: tuple(
            term.strip() for term in row[mesh].split(";") if term.strip()
        )
        for row in table.rows
        if row[images].strip()
    }


def phantom_findings(coding: Sequence[str], report: str) -> tuple[Finding, ...]:
    """The findings to draw for one study, attributes left empty where neither coding nor report names them."""
    sentences = split_sentences(report)
    found = [finding for term in coding for finding in _from_term(term)]
    devices = [
        made for kind, sentence in _mentions(_device, sentences) for made in _made("Support Devices", kind, sentence)
    ]
    if devices:  # a report's word for a device says more than its code
        found = [finding for finding in found if finding.finding != "Support Devices"] + devices
    coded = {finding.finding for finding in found}
    for name, sentence in [] if _NORMAL in coding else _mentions(_labeler, sentences):
        if name in RULES and name not in coded and not _adds_nothing(name, sentence, found):
            found += _made(name, terms.kind_by_words(name, sentence), sentence)
    coded_kinds = {finding.kind for finding in found}
    for kind, sentence in _mentions(_incidental, sentences):
        if kind not in coded_kinds:
            found += _made(OTHER, kind, sentence)
    return _consistent(found)


def _adds_nothing(name: str, sentence: str, found: list[Finding]) -> bool:
    """Whether a positive mention is a convention of the labeler, or the general word for a shadow that is coded."""
    if name in _SIZES and not _ENLARGED.search(sentence):
        return True
    shadows = any(finding.finding in _SHADOWS or finding.kind == "scarring" for finding in found)
    return bool(_NORMALITY.search(sentence)) or (name == "Lung Opacity" and shadows)


def _from_term(term: str) -> list[Finding]:
    head, *qualifiers = (part.strip().lower() for part in term.split("/"))
    words = " ".join(qualifiers)
    return [
        made
        for pattern, needed, name, kind in terms.MESH
        if re.fullmatch(pattern, head) and re.search(needed, words)
        for made in _made(name, kind, f"{words} {head}")
    ]


def _mentions(labeler: RuleLabeler, sentences: list[str]) -> list[tuple[str, str]]:
    """(name, sentence) of what the labeler calls positive."""
    return [
        (name, sentence)
        for sentence in sentences
        for name, label in dict(labeler.label_sentence(sentence)).items()
        if label == 1
    ]


def _made(name: str, kind: str, words: str) -> list[Finding]:
    """The finding with those attributes of ``words`` that the renderer knows for it; [] for a kind it cannot draw."""
    if kind not in RULES[name] and "" not in RULES[name]:
        return []  # a fracture elsewhere than in ribs and clavicles, a device without a name
    given = {"kind": kind} if kind else {}
    for key, value in terms.attributes_by_words(words).items():
        if possible_kinds(Finding(name, **(given | {key: value}))):
            given[key] = value
    return [Finding(name, **given)]


def _consistent(found: list[Finding]) -> tuple[Finding, ...]:
    """Without repetitions: one finding per class, kind, side and zone, and one volume of the lungs."""
    kept: dict[tuple, Finding] = {}
    for finding in found:
        sided = {key: getattr(finding, key) for key in ATTRIBUTES[1:3]}
        same = [other for other in kept.values() if (other.finding, other.kind) == (finding.finding, finding.kind)]
        # A mention without a place repeats the one that has a place, and the other way round.
        repeats = any(
            all(not value or not getattr(other, key) or value == getattr(other, key) for key, value in sided.items())
            for other in same
        )
        opposite = finding.kind in _OPPOSITES and any(other.kind in _OPPOSITES for other in kept.values())
        if not repeats and not opposite:
            kept[(finding.finding, finding.kind, *sided.values())] = finding
    return tuple(kept.values())
