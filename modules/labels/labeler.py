"""Rule-based CheXpert-style labels of a radiology report, on the standard library alone.

Sentence by sentence, phrases name an observation and the words around them negate or doubt it; over the report, a
positive mention outranks an uncertain one, and that a negative one (Irvin et al., 2019, arXiv:1901.07031). The
phrase tables are in ``clinical_rules``; scores made from these labels are called ``ce_rule_*``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from modules.labels import rules as clinical_rules
from modules.labels.rules import CLASSES, PARENTS, TABLES, Table

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CLASSES", "RuleLabeler", "label_report", "label_reports", "with_parents"]

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1
_STRENGTH = {None: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
# A finding that belongs to none of the classes: it is judged like one, and only ever rules out No Finding.
_OTHER = "Other Finding"
# No Finding is about the observations of the patient: a tube in the right place is no finding.
_NOT_A_FINDING = ("No Finding", "Support Devices")

# A full stop, the start of a list's next item, or an empty line. Other line breaks are white space.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[a-z]{2}[.!?])(?=[a-z])|\n\s*(?:[-*\u2022]|\(?\d{1,2}[.)])\s+|\n\s*\n")
# What a whole report says besides its findings: why it was made, how, and what it was compared with.
_BACKGROUND = (
    r"(?:clinical |patient )?(?:indications?|history|information)|reason for \w+(?: \w+)?|techniques?"
    r"|comparisons?|exam(?:ination)?|procedure|study|date"
)
# Such a section ends before the next heading or an empty line; on a single line, with its sentence.
_BACKGROUND_LINES = re.compile(
    rf"^[^\S\n]*(?:{_BACKGROUND})\s*:.*?(?=^[^\S\n]*[a-z][a-z ()/-]{{2,40}}:|\n\s*\n|\Z)", re.MULTILINE | re.DOTALL
)
_BACKGROUND_SENTENCE = re.compile(
    rf"(?:^|(?<=\.))\s*(?:{_BACKGROUND})\s*:.*?(?:\.(?=\s|$)|$|(?=findings?:|impression:))"
)


def _compile(tables: dict[str, str]) -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern) for name, pattern in tables.items()}


class RuleLabeler:
    """The labeler with the tables of ``clinical_rules``, or with others in place of some of them, by name."""

    def __init__(self, **changed: Table):
        tables = {name: getattr(clinical_rules, name) for name in TABLES} | changed
        self._findings = _compile(tables["FINDINGS"] | {_OTHER: tables["OTHER_FINDINGS"]})
        self._anatomy = _compile(tables["ANATOMY"])
        self._not_mentions = _compile(tables["NOT_MENTIONS"])
        self._weak_mentions = _compile(tables["WEAK_MENTIONS"])
        self._enlarged = _compile(tables["ENLARGED"])
        self._cues = _compile({name: table for name, table in tables.items() if isinstance(table, str)})
        self._conventions: dict[str, list[tuple[re.Pattern[str], int]]] = {}
        for name, pattern, label in tables["CONVENTIONS"]:
            self._conventions.setdefault(name, []).append((re.compile(pattern), label))
        # Reports repeat their sentences, a model's reports most of all.
        self.label_sentence = lru_cache(maxsize=1 << 15)(self._label_sentence)

    def label_report(self, text: str) -> dict[str, int | None]:
        """Return the 14 CheXpert labels of a report: 1 positive, 0 negative, -1 uncertain, None not mentioned.

        A blank report gets None throughout: it says nothing, not even No Finding.
        """
        labels: dict[str, int | None] = dict.fromkeys((*CLASSES, _OTHER))
        sentences = split_sentences(text)
        for sentence in sentences:
            for name, label in self.label_sentence(sentence):
                if _STRENGTH[label] > _STRENGTH[labels[name]]:
                    labels[name] = label
        found = any(label in (POSITIVE, UNCERTAIN) for name, label in labels.items() if name not in _NOT_A_FINDING)
        if sentences and not found:
            labels["No Finding"] = POSITIVE
        del labels[_OTHER]
        return labels

    def _label_sentence(self, sentence: str) -> tuple[tuple[str, int], ...]:
        labels = []
        for name, pattern in self._findings.items():
            other_meaning = self._not_mentions.get(name)
            hidden = {match.end() for match in other_meaning.finditer(sentence)} if other_meaning else ()
            for match in pattern.finditer(sentence):
                if match.end() not in hidden:
                    label = self._judge_finding(sentence, match.start(), match.end())
                    weak = self._weak_mentions.get(name)
                    if label == POSITIVE and weak and weak.search(match.group()):
                        label = UNCERTAIN
                    labels.append((name, label))
        for name, pattern in self._anatomy.items():
            if pattern.search(sentence):
                labels.append((name, self._judge_anatomy(name, sentence)))
        return tuple((name, self._convention(name, sentence, label)) for name, label in labels)

    def _judge_finding(self, sentence: str, start: int, end: int) -> int:
        """Decide a mention by the cues before and after it, as far as they reach; "no" before it outranks doubt."""
        before, after = sentence[self._scope_start(sentence, start) : start], sentence[end:]
        if self._cues["NEGATION_BEFORE"].search(before):
            return NEGATIVE
        if self._cues["DENIED_AFTER"].match(after):
            return NEGATIVE
        if self._cues["UNCERTAIN_BEFORE"].search(before):
            return UNCERTAIN
        after = self._cues["SCOPE_END"].split(after, maxsplit=1)[0]
        if self._cues["UNCERTAIN_AFTER"].search(after):
            return UNCERTAIN
        if self._cues["NEGATION_AFTER"].search(after):
            return NEGATIVE
        return POSITIVE

    def _scope_start(self, sentence: str, position: int) -> int:
        start = 0
        for match in self._cues["SCOPE_END"].finditer(sentence):
            if match.end() > position:
                break
            start = match.end()
        return start

    def _judge_anatomy(self, name: str, sentence: str) -> int:
        """Decide the size of heart or mediastinum by what the sentence says of it; without a word it is abnormal."""
        if self._cues["NOT_NORMAL"].search(sentence):
            return POSITIVE
        if self._cues["STABLE_BEFORE_NORMAL"].search(sentence):
            return UNCERTAIN
        if self._cues["NORMAL"].search(sentence):
            return NEGATIVE
        if self._cues["STABLE"].search(sentence) and not self._enlarged[name].search(sentence):
            return UNCERTAIN
        return POSITIVE

    def _convention(self, name: str, sentence: str, label: int) -> int:
        for pattern, convention in self._conventions.get(name, ()):
            if pattern.search(sentence):
                return convention
        return label


_labeler = RuleLabeler()


def label_report(text: str) -> dict[str, int | None]:
    """Return the 14 CheXpert labels of a report by class: 1, 0, -1 or None, see ``RuleLabeler.label_report``."""
    return _labeler.label_report(text)


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
    for child, parent in PARENTS.items():
        if labels[child] in (POSITIVE, UNCERTAIN) and _STRENGTH[labels[child]] > _STRENGTH[labels[parent]]:
            labels[parent] = labels[child]
    return labels


def split_sentences(text: str) -> list[str]:
    """Return a report's sentences in lower case, with single spaces and none before punctuation.

    Headed sections that are no findings (indication, technique, comparison, ...) are left out.
    """
    text = text.lower().replace("and/or", "or").replace("vs.", "vs")
    if ":" in text:
        text = (_BACKGROUND_LINES if "\n" in text.strip() else _BACKGROUND_SENTENCE).sub(" ", text)
    text = re.sub(r"(?<=[a-z])/(?=[a-z])", " / ", text)
    text = re.sub(r"[^\S\n]+(?=[.,;:!?])", "", text)
    sentences = (" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text))
    return [sentence for sentence in sentences if sentence.strip(".")]
