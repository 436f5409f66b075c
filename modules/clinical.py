"""Rule-based CheXpert-style labels of a radiology report, on the standard library alone.

Sentence by sentence, phrases name an observation and the words around them negate or doubt it; over the report, a
positive mention outranks an uncertain one, and that a negative one (Irvin et al., 2019, arXiv:1901.07031). The
phrase tables are in ``clinical_rules``; scores made from these labels are called ``ce_rule_*``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from modules import clinical_rules as rules
from modules.clinical_rules import CLASSES

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CLASSES", "label_report", "label_reports", "with_parents"]

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1
_STRENGTH = {None: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
# A finding that belongs to none of the classes: it is judged like one, and only ever rules out No Finding.
_OTHER = "Other Finding"
# No Finding is about the observations of the patient: a tube in the right place is no finding.
_NOT_A_FINDING = ("No Finding", "Support Devices")

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[a-z]{2}[.!?])(?=[a-z])|\n\s*\n")
_FINDINGS = {name: re.compile(pattern) for name, pattern in rules.FINDINGS.items()}
_FINDINGS[_OTHER] = re.compile(rules.OTHER_FINDINGS)
_ANATOMY = {name: re.compile(pattern) for name, pattern in rules.ANATOMY.items()}
_NOT_MENTIONS = {name: re.compile(pattern) for name, pattern in rules.NOT_MENTIONS.items()}
_WEAK_MENTIONS = {name: re.compile(pattern) for name, pattern in rules.WEAK_MENTIONS.items()}
_CONVENTIONS = {
    name: [(re.compile(pattern), label) for about, pattern, label in rules.CONVENTIONS if about == name]
    for name in {about for about, _, _ in rules.CONVENTIONS}
}
_NEGATION_BEFORE = re.compile(rules.NEGATION_BEFORE)
_NEGATION_AFTER = re.compile(rules.NEGATION_AFTER)
_UNCERTAIN_BEFORE = re.compile(rules.UNCERTAIN_BEFORE)
_UNCERTAIN_AFTER = re.compile(rules.UNCERTAIN_AFTER)
_SCOPE_END = re.compile(rules.SCOPE_END)
_NORMAL = re.compile(rules.NORMAL)
_NOT_NORMAL = re.compile(rules.NOT_NORMAL)
_ENLARGED = {name: re.compile(pattern) for name, pattern in rules.ENLARGED.items()}
_STABLE = re.compile(rules.STABLE)
_STABLE_BEFORE_NORMAL = re.compile(rules.STABLE_BEFORE_NORMAL)


def label_report(text: str) -> dict[str, int | None]:
    """Return the 14 CheXpert labels of a report: 1 positive, 0 negative, -1 uncertain, None not mentioned.

    A blank report gets None throughout: it says nothing, not even No Finding.
    """
    labels: dict[str, int | None] = dict.fromkeys((*CLASSES, _OTHER))
    sentences = _split_sentences(text)
    for sentence in sentences:
        for name, label in _label_sentence(sentence):
            if _STRENGTH[label] > _STRENGTH[labels[name]]:
                labels[name] = label
    found = any(label in (POSITIVE, UNCERTAIN) for name, label in labels.items() if name not in _NOT_A_FINDING)
    if sentences and not found:
        labels["No Finding"] = POSITIVE
    del labels[_OTHER]
    return labels


def label_reports(texts: Sequence[str], progress: bool = False) -> "np.ndarray":
    """Return the labels of N reports as (N, 14) float64 in CLASSES order; NaN stands for not mentioned."""
    import numpy as np

    reports: Iterable[str] = texts
    if progress:
        from tqdm import tqdm

        reports = tqdm(texts, desc="labels", unit="report")
    labels = np.full((len(texts), len(CLASSES)), np.nan)
    for row, text in enumerate(reports):
        for column, label in enumerate(label_report(text).values()):
            if label is not None:
                labels[row, column] = label
    return labels


def with_parents(labels: dict[str, int | None]) -> dict[str, int | None]:
    """Return the labels with a positive or uncertain observation carried up to its parents: edema is an opacity.

    Neither the CheXpert labeler nor ``label_report`` does so: use it on both sides of a comparison or on none.
    """
    labels = dict(labels)
    for child, parent in rules.PARENTS.items():
        if labels[child] in (POSITIVE, UNCERTAIN) and _STRENGTH[labels[child]] > _STRENGTH[labels[parent]]:
            labels[parent] = labels[child]
    return labels


def _split_sentences(text: str) -> list[str]:
    """Lower-case the report and cut it into sentences with single spaces and no space before punctuation."""
    text = text.lower().replace("and/or", "or").replace("vs.", "vs")
    text = re.sub(r"(?<=[a-z])/(?=[a-z])", " / ", text)
    text = re.sub(r"\s+(?=[.,;:!?])", "", text)
    sentences = (" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text))
    return [sentence for sentence in sentences if sentence.strip(".")]


@lru_cache(maxsize=1 << 15)  # reports repeat their sentences, a model's reports most of all
def _label_sentence(sentence: str) -> tuple[tuple[str, int], ...]:
    labels = []
    for name, pattern in _FINDINGS.items():
        other_meaning = _NOT_MENTIONS.get(name)
        hidden = {match.end() for match in other_meaning.finditer(sentence)} if other_meaning else ()
        for match in pattern.finditer(sentence):
            if match.end() not in hidden:
                label = _judge_finding(sentence, match.start(), match.end())
                weak = _WEAK_MENTIONS.get(name)
                if label == POSITIVE and weak and weak.search(match.group()):
                    label = UNCERTAIN
                labels.append((name, label))
    for name, pattern in _ANATOMY.items():
        if pattern.search(sentence):
            labels.append((name, _judge_anatomy(name, sentence)))
    return tuple((name, _convention(name, sentence, label)) for name, label in labels)


def _judge_finding(sentence: str, start: int, end: int) -> int:
    """Decide a mention by the cues before and after it, as far as they reach; "no" before it outranks doubt."""
    before = sentence[_scope_start(sentence, start) : start]
    if _NEGATION_BEFORE.search(before):
        return NEGATIVE
    if _UNCERTAIN_BEFORE.search(before):
        return UNCERTAIN
    after = _SCOPE_END.split(sentence[end:], maxsplit=1)[0]
    if _UNCERTAIN_AFTER.search(after):
        return UNCERTAIN
    if _NEGATION_AFTER.search(after):
        return NEGATIVE
    return POSITIVE


def _scope_start(sentence: str, position: int) -> int:
    start = 0
    for match in _SCOPE_END.finditer(sentence, 0, position):
        start = match.end()
    return start


def _judge_anatomy(name: str, sentence: str) -> int:
    """Decide the size of heart or mediastinum by what the sentence says of it; without a word it is abnormal."""
    if _NOT_NORMAL.search(sentence):
        return POSITIVE
    if _STABLE_BEFORE_NORMAL.search(sentence):
        return UNCERTAIN
    if _NORMAL.search(sentence):
        return NEGATIVE
    if _STABLE.search(sentence) and not _ENLARGED[name].search(sentence):
        return UNCERTAIN
    return POSITIVE


def _convention(name: str, sentence: str, label: int) -> int:
    for pattern, convention in _CONVENTIONS.get(name, ()):
        if pattern.search(sentence):
            return convention
    return label
