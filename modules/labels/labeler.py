"""Rule-based CheXpert-style labels of a radiology report, on the standard library alone.

In each sentence, phrases name observations and the words around them negate or doubt them; over the report, a
positive mention outranks an uncertain one, and an uncertain one a negative (Irvin et al., 2019, arXiv:1901.07031). The
phrase tables are in ``rules``, sentence splitting in ``sentences``; scores of these labels are called ``ce_rule_*``.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from modules.labels import rules as clinical_rules
from modules.labels.rules import CLASSES, PARENTS, TABLES, Table
from modules.labels.sentences import split_sentences
from modules.runtime.run_log import Bar

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CLASSES", "RuleLabeler", "label_report", "label_reports", "label_sentence", "with_parents"]

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1
_STRENGTH = {None: 0, NEGATIVE: 1, UNCERTAIN: 2, POSITIVE: 3}
# A finding outside the classes: it is judged like one of them, but its only effect is to rule out No Finding.
_OTHER = "Other Finding"
# No Finding is about the patient: a tube is not a finding.
_NOT_A_FINDING = ("No Finding", "Support Devices")

_WORD_END = re.compile(r"[a-z]*")


def _compile(tables: dict[str, str]) -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern) for name, pattern in tables.items()}


class RuleLabeler:
    """The labeler with the tables of ``rules``; keyword arguments replace some of them by name."""

    def __init__(self, **changed: Table):
        tables = {name: getattr(clinical_rules, name) for name in TABLES} | changed
        self._findings = _compile(tables["FINDINGS"] | {_OTHER: tables["OTHER_FINDINGS"]})
        self._anatomy = _compile(tables["ANATOMY"])
        self._not_mentions = _compile(tables["NOT_MENTIONS"])
        self._weak_mentions = _compile(tables["WEAK_MENTIONS"])
        self._implied = _compile(tables["IMPLIED"])
        self._enlarged = _compile(tables["ENLARGED"])
        self._cues = _compile({name: table for name, table in tables.items() if isinstance(table, str)})
        self._conventions: dict[str, list[tuple[re.Pattern[str], int]]] = {}
        for name, pattern, label in tables["CONVENTIONS"]:
            self._conventions.setdefault(name, []).append((re.compile(pattern), label))
        # Reports repeat sentences, generated reports most of all.
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
        sentence = self._cues["ONE_SIDE"].sub(" and ", sentence)
        labels: list[tuple[str, int]] = []
        breaks: list[tuple[int, int]] | None = None  # where the reach of a cue ends
        for name, match in self._mentions(sentence):
            if breaks is None:
                breaks = [found.span() for found in self._cues["SCOPE_END"].finditer(sentence)]
            end = _WORD_END.match(sentence, match.end()).end()  # some patterns are the beginning of a word
            label = self._judge_finding(sentence, match.start(), end, breaks)
            weak = self._weak_mentions.get(name)
            if label == POSITIVE and weak and weak.search(match.group()):
                label = UNCERTAIN
            labels.append((name, label))
            if label != NEGATIVE:
                labels += [(other, UNCERTAIN) for other, cause in self._implied.items() if cause.match(match.group())]
        for name, pattern in self._anatomy.items():
            found = pattern.search(sentence)
            if found:
                enlarged = self._cues["IS_ENLARGED"].match(sentence, found.end())
                labels.append((name, POSITIVE if enlarged else self._judge_anatomy(name, sentence)))
        return tuple((name, self._convention(name, sentence, label)) for name, label in labels)

    def _mentions(self, sentence: str) -> Iterator[tuple[str, re.Match[str]]]:
        for name, pattern in self._findings.items():
            other_meaning = self._not_mentions.get(name)
            hidden = {match.end() for match in other_meaning.finditer(sentence)} if other_meaning else ()
            for match in pattern.finditer(sentence):
                if match.end() not in hidden:
                    yield name, match

    def _judge_finding(self, sentence: str, start: int, end: int, breaks: list[tuple[int, int]]) -> int:
        """Decide a mention by the cues that reach it from before and after; a "no" before it outranks doubt."""
        scope_start, scope_end = 0, len(sentence)
        for first, last in breaks:
            if last <= start:
                scope_start = last
            elif last > end:
                scope_end = max(first, end)
                break
        before, after, rest = sentence[scope_start:start], sentence[end:scope_end], sentence[end:]
        kept = max((match.end() for match in self._cues["KEPT"].finditer(before)), default=0)
        if kept:  # "no change in this or that" neither denies nor doubts them
            before, after = before[kept:].replace(" or ", " and "), after.replace(" or ", " and ")
        if self._cues["NEGATION_BEFORE"].search(before) or self._cues["DENIED_AFTER"].match(rest):
            return UNCERTAIN if self._cues["DENIAL_DOUBTED"].search(sentence) else NEGATIVE
        if self._cues["UNCERTAIN_BEFORE"].search(before) or self._cues["UNCERTAIN_AFTER"].search(after):
            return UNCERTAIN
        if self._cues["NEGATION_AFTER"].search(after):
            return NEGATIVE
        return POSITIVE

    def _judge_anatomy(self, name: str, sentence: str) -> int:
        """Decide the size of heart or mediastinum by the words of its sentence; positive where none of them says."""
        if self._cues["NOT_NORMAL"].search(sentence):
            return POSITIVE
        if self._cues["STABLE_BEFORE_NORMAL"].search(sentence) or self._cues["SIZE_DOUBTED"].search(sentence):
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


def label_sentence(sentence: str) -> tuple[tuple[str, int], ...]:
    """Class and label of each mention in one of ``sentences.split_sentences``'s sentences."""
    return tuple((name, label) for name, label in _labeler.label_sentence(sentence) if name != _OTHER)


def label_reports(texts: Sequence[str], progress: bool = False) -> "np.ndarray":
    """Return the labels of N reports as (N, 14) float64 in CLASSES order; NaN means not mentioned."""
    import numpy as np

    labels = np.full((len(texts), len(CLASSES)), np.nan)
    for row, text in enumerate(Bar(texts, "labels", shown=progress)):
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
