"""A report's sentences, in the form that the rule labeler's patterns expect.

Sections that are not about this examination's findings (why it was made, how, what it is compared with) are left out;
list items, numbered or on lines of their own, become sentences; misspelt names of findings are corrected.
"""

import html
import re
from functools import lru_cache

from modules.data.report_tables import MISSING

# ---- sections

_BACKGROUND = (
    r"(?:(?:clinical|patient|medical|surgical|brief|interval|additional|relevant|past|past medical|past surgical) )?"
    r"(?:history|indications?)(?: of (?:the )?present illness)?"
    r"|(?:clinical|patient) (?:information|details|data|question)|chief complaints?|symptoms?"
    r"|reasons?(?: (?:for|of) [a-z]+(?: [a-z]+)?)?|techniques?|views?"
    r"|(?:reference |prior )?comparisons?(?: (?:stud(?:y|ies)|exams?|films?))?"
    r"|(?:type of |date of )?(?:exam(?:ination)?s?|procedures?|study|studies)|date|hpi|pmh|hx"
)
_RESULT = r"(?:findings?|impressions?|conclusions?|opinion|interpretation|report|assessment)"
# At the start of a line or sentence; result headings anywhere, since "Indication: pain Findings: ..." occurs.
_HEADING = re.compile(
    rf"(?:^|(?<=[.;]))[^\S\n]*(?P<background>{_BACKGROUND})[^\S\n]*(?::|$)"
    rf"|\b{_RESULT}[^\S\n]*:|^[^\S\n]*[a-z][a-z /&,()-]{{2,40}}:",
    re.IGNORECASE | re.MULTILINE,
)
_PARAGRAPH = re.compile(r"\s*\S[^\n]*(?:\n[^\S\n]*\S[^\n]*)*\n[^\S\n]*\n")
_FIRST_SENTENCE = re.compile(r"\s*.*?(?:[.!?](?=\s|$)|\n(?=[^\S\n]*[A-Z][a-z])|\Z)", re.DOTALL)

# ---- lines and sentences

_PLAIN = str.maketrans(
    {"\r": "\n", "\u3002": ". ", "\uff0c": ", ", "\uff1b": "; ", "\uff1a": ": ", "\u2026": ". "}
    | dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2013\u2014\u2212", " - ") | dict.fromkeys("\u2022\u00b7\u25aa\u25cf\u25e6", "\n- ")
)  # fmt: skip
_HYPHENATED = re.compile(r"(?<=[A-Za-z]{2})-\n\s*(?=[A-Za-z]{2})")
# A line that starts like this begins a sentence, unless the line before it ends in a word that cannot end one.
_NEW_LINE = re.compile(
    r"(?:[-*+>]|\(?(?:\d{1,2}|[a-hA-H])[.)])\s"
    r"|(?:[A-Z][a-z]|[A-Z]{2,5}\s|no\b|there (?:is|are)\b|[A-Za-z][A-Za-z /&()-]{2,40}:)"
)
_UNFINISHED = re.compile(
    r"(?:[,/(&-]|\b(?:a|an|the|this|of|or|and|nor|no|not|without|with|in|on|at|to|for|from|by|is|are|was|were|be|been|has"
    r"|have|may|could|left|right|small|large|mild|moderate|severe|new|old|stable|prior|previous|acute|focal|pleural"
    r"|pulmonary|vs\.?|versus))\s*$",
    re.IGNORECASE,
)
_ITEM = re.compile(
    r"\n(?:[-*+>]|\(?(?:\d{1,2}|[a-h])[.)])\s|\s\(?(?:\d{1,2}|[a-h]|[ivx]{1,3})\)\s+(?=[a-z])|\s\d{1,2}\.(?=[a-z]{2})"
)
_SENTENCE_END = re.compile(r"(?<=[.!])\s+|(?<=[^\s,]\?)\s+|(?<=[a-z]{2}[.!?])(?=[a-z])|\n")
_SHORT = {
    "and/or": "or", "andor": "or", "w/o": "without", "w/": "with ", "s/p": "status post", "r/o": "rule out",
    "c/w": "consistent with", "vs.": "vs",
}  # fmt: skip
_SHORTENED = re.compile(r"(?<![a-z])(?:and/or|andor|w/o|w/|s/p|r/o|c/w)(?![a-z])|\bvs\.")
_DOUBTED = re.compile(r"(?:^|(?<=[\s,(;:.-]))\?\s*(?=[a-z])")  # "?pneumonia", "opacity, ? pneumonia"
_LETTER = re.compile(r"[^\W\d_]")
_SPACED = (" .", " ,", " ;", " :", " !", " ?")
_SPACE_BEFORE = re.compile(r"[^\S\n]+(?=[.,;:!]|\?(?:\s|$))")
# A first sentence about the patient or the question of the examination; left out if more sentences follow.
_WHY = re.compile(
    r"(?:this is )?(?:an? )?(?:\d{1,3}|_+|xxxx)[ -]*(?:years?|yrs?|months?|weeks?|days?|y)[ -/]*(?:old|o)\b"
    r"|(?:please )?(?:rule out|(?:evaluate|assess) for)\b"
)
# "..., it has resolved", "Today there is none.": refers to the findings before it.
_NO_MORE = re.compile(
    r"\b(?:there (?:is|are) (?:now )?none\b"
    r"|(?:it|this|these|they|which)(?: (?:is|are|has|have|can|cannot|now|since|been|be|completely|fully|entirely))+ "
    r"(?:gone|resolved|cleared|disappeared|removed|no longer|(?:not|no more)(?: \w+)? "
    r"(?:seen|visible|present|identified|evident|visuali[sz]ed|demonstrated))\b"
    r"(?! (?:on|in) (?:the |an? )?(?:\w+ )?(?:lateral|frontal|prior|previous|earlier)))"
    r"(?:(?!,| but | and | with )[^.;])*"
)
_NOW = re.compile(
    r"[.;,]?\s*(?:\b(?:and|but|today|now|currently|at present|on (?:the (?:current|present)|this|today's) \w+),? )*$"
)
_PRONOUNS = (" none", " it ", " this ", " these ", " they ", " which ", " it's ")
_NOW_LETTERS = 200  # before a clause, in which _NOW is looked for: its time grows with their square
GONE = " [gone]"  # replaces such a clause
_LONGEST = 2000  # letters of a sentence; more are no sentence, and the labeler's time grows with their square


def split_sentences(text: str) -> list[str]:
    """Return a report's sentences in lower case, with single spaces and none before punctuation, cut at 2,000 letters.

    A cell that means a missing report ("nan", "None") has none.
    """
    if is_missing(text):
        return []
    if not text.isascii():
        text = text.replace("\r\n", "\n").translate(_PLAIN)
    if "&" in text:
        text = html.unescape(text).replace("&", " and ")
    if "\n" in text or "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        text = _HYPHENATED.sub("", text)
    text = _without_background(text)
    text = _join_lines(text) if "\n" in text else " ".join(text.split())
    text = _correct(text.lower())
    if "/" in text or "vs." in text or "andor" in text:
        text = _SHORTENED.sub(lambda match: _SHORT[match.group()], text)
        text = re.sub(r"(?<=[a-z])/(?=[a-z])", " / ", text)
    if "?" in text:
        text = _DOUBTED.sub("questionable ", text)
    if any(mark in text for mark in _SPACED):
        text = _SPACE_BEFORE.sub("", text.replace(" ,", ", "))
    if "\n" in text or ")" in text or "1." in text:
        text = _ITEM.sub("\n", text)
    if any(word in text for word in _PRONOUNS):
        text = _without_pronouns(text)
    sentences = [" ".join(sentence.split()) for sentence in _SENTENCE_END.split(text)]
    sentences = [long[at : at + _LONGEST] for long in sentences for at in range(0, len(long), _LONGEST)]
    sentences = [sentence for sentence in sentences if _LETTER.search(sentence)]
    if len(sentences) > 1 and _WHY.match(sentences[0]):
        del sentences[0]
    return sentences


def _without_pronouns(text: str) -> str:
    """``text`` with GONE in place of clauses that say of the findings before them that they are not there any more."""
    kept, position = [], 0
    for match in _NO_MORE.finditer(text):
        now = _NOW.search(text, max(position, match.start() - _NOW_LETTERS), match.start())
        kept += [text[position : now.start()], GONE]
        position = match.end()
    return "".join([*kept, text[position:]])


def is_missing(text: str) -> bool:
    """Whether ``text`` is blank or means a missing report."""
    return len(text) < 16 and text.strip(" .\n").lower() in {"", *MISSING}


def _without_background(text: str) -> str:
    """``text`` without its background sections, which end with the next heading, their paragraph or their sentence."""
    if ":" not in text and "\n" not in text:
        return text
    headings = list(_HEADING.finditer(text))
    kept, position = [], 0
    for index, match in enumerate(headings):
        if not match["background"]:
            continue
        kept.append(text[position : match.start()])
        following = headings[index + 1].start() if index + 1 < len(headings) else None
        paragraph = _PARAGRAPH.match(text, match.end(), len(text) if following is None else following)
        if paragraph:
            position = paragraph.end()
        elif following is not None:
            position = following
        else:
            position = _FIRST_SENTENCE.match(text, match.end()).end()
    return "\n\n".join([*kept, text[position:]]) if kept else text


def _join_lines(text: str) -> str:
    """``text`` with wrapped lines joined; each line that is left begins a sentence. White space is single spaces."""
    joined: list[str] = []
    before = ""
    for line in (" ".join(line.split()) for line in text.split("\n")):
        starts = not before or (_NEW_LINE.match(line) and not _UNFINISHED.search(before))
        joined += ["\n" if starts else " ", line] if line else []
        before = line
    return "".join(joined[1:])


# ---- misspellings

# Names that are long enough to be told from other words with a letter wrong, missing, doubled or swapped.
_NAMES = (
    "pneumothorax", "pneumothoraces", "hydropneumothorax", "pneumonia", "effusion", "effusions", "consolidation",
    "consolidations", "atelectasis", "cardiomegaly", "opacity", "opacities", "opacification", "infiltrate",
    "infiltrates", "edema", "fracture", "fractures", "nodule", "nodules", "catheter", "pacemaker",
)  # fmt: skip
_WORDS = frozenset({"enema", "pneumonic", "pneumonitis", "noodle", "module"})  # correct words that are near to a name
_LONG_WORD = re.compile(r"[a-z]{4,}")
_correct_tokens: set[str] = set()  # words that reports repeat, with their punctuation


def _correct(text: str) -> str:
    new = {token for token in text.split() if token not in _correct_tokens}
    if not new:
        return text
    corrected = _LONG_WORD.sub(lambda match: _nearest_name(match.group()), text)
    if corrected == text and len(_correct_tokens) < 1 << 17:
        _correct_tokens.update(new)
    return corrected


@lru_cache(maxsize=1 << 16)
def _nearest_name(word: str) -> str:
    """The name that ``word`` misspells, else ``word``: same first letter, one slip, or two in 11 letters and more."""
    if word in _WORDS or any(name in word for name in _NAMES):
        return word
    for name in _NAMES:
        allowed = 2 if len(name) > 10 else 1
        if name[0] == word[0] and abs(len(name) - len(word)) <= allowed and count_slips(word, name) <= allowed:
            return name
    return word


def count_slips(first: str, second: str) -> int:
    """Letters to insert, delete, replace or swap with their neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        before, previous, row = row, before, [i]
        for j, other in enumerate(second, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, previous[j - 2] + 1)
            row.append(cost)
    return row[-1]
