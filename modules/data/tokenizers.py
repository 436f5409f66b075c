"""The word tokenizer of the R2Gen family: report cleaning, vocabulary and ids, equal to theirs bit for bit.

Captions of natural images, and reports in other languages, are cleaned by other rules. One id, 0, is begin, end and
padding at once; words have the ids 1..V.
"""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from modules.runtime.errors import InputError

BOS = EOS = PAD = 0
UNKNOWN = "<unk>"

_NUMBERING = [("1. ", "")] + [(f". {n}. ", ". ") for n in range(2, 6)] + [(f" {n}. ", ". ") for n in range(2, 6)]
# What is replaced in the whole report before it is split into sentences, in this order. The repetitions are
# part of the definition: a run of dots longer than they can fold keeps some.
_REPLACEMENTS = {
    "iu_xray": [("..", ".")] * 3 + _NUMBERING,
    "mimic_cxr": [("\n", " ")] + [("__", "_")] * 7 + [("  ", " ")] * 6 + [("..", ".")] * 8 + _NUMBERING,
}
_QUOTES_AND_SLASHES = str.maketrans("", "", "\"/\\'")
# The published character class holds the range from ":" to "[", which deletes = @ < > too; the hyphen stays.
_PUNCTUATION = str.maketrans("", "", ".,?;*!%^&_+(){}]" + "".join(map(chr, range(ord(":"), ord("[") + 1))))
# In captions hyphens, dashes and slashes become spaces; all other punctuation is deleted.
_BETWEEN_WORDS, _NO_WORD = re.compile(r"[-\u2010-\u2015/_]"), re.compile(r"[^\w\s]")


def _clean_sentence(sentence: str) -> str:
    return sentence.translate(_QUOTES_AND_SLASHES).strip().lower().translate(_PUNCTUATION)


def _clean_with(replacements: Sequence[tuple[str, str]], report: str) -> str:
    """Lower-cased ``report`` without numbering and punctuation, sentences closed by `` .`` (R2Gen's rules)."""
    for old, new in replacements:
        report = report.replace(old, new)
    return " . ".join(_clean_sentence(sentence) for sentence in report.strip().lower().split(". ")) + " ."


def _clean_caption(caption: str) -> str:
    """Lower-cased ``caption`` without punctuation, as VisualGPT's are; no full stop is added."""
    return " ".join(_NO_WORD.sub("", _BETWEEN_WORDS.sub(" ", caption.lower())).split())


# ---- any language: Unicode instead of English rules

# Han and kana; then the scripts of Thai, Lao, Tibetan, Burmese and Khmer, which put spaces between phrases only.
_HAN = "\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PHRASES = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
_WIDE_SIGNS = "\u3000-\u303f\u30fb"
_SIGNS = (
    "!-/:-@\\[-`{-~\u00a1\u00a7\u00ab\u00ac\u00b0\u00b1\u00b6\u00b7\u00bb\u00bf\u00d7\u00f7"
    f"\u060c\u061b\u061f\u066a\u06d4\u0964\u0965\u2000-\u206f\u2190-\u22ff{_WIDE_SIGNS}"
)
_LETTERS = f"[^\\s{_SIGNS}{_HAN}{_PHRASES}]+"
# <unk>; a character of a script without spaces; a number with its decimals; a word with its apostrophes and hyphens.
_WORD = re.compile(f"<unk>|[{_HAN}{_PHRASES}]|\\d+(?:[.,]\\d+)*|{_LETTERS}(?:['-]{_LETTERS})*|[{_SIGNS}]")
_BETWEEN_HAN = re.compile(
    f"(?<=[{_HAN}{_WIDE_SIGNS}])\\s+(?=[{_HAN}{_WIDE_SIGNS},;:!?)(])|(?<=[,;:!?)(])\\s+(?=[{_HAN}])"
)
# Mean number of a script's characters in a "word" above which a text has no spaces between words: word segmenters leave
# about 2 and 4.
_UNSPACED = {re.compile(f"[{_HAN}]"): 3.0, re.compile(f"[{_PHRASES}]"): 6.0}


def plain_text(report: str) -> str:
    """``report`` in lower case and Unicode's compatible form (NFKC), on one line, nothing deleted; spaces between
    characters of Han and kana are taken out.
    """
    text = unicodedata.normalize("NFKC", report).replace("\u2019", "'").lower()
    return join_words(text.split())


def words_of(report: str) -> str:
    """The words of a report in any language, joined by single spaces; signs are words, and so is each character of a
    script without spaces.
    """
    return " ".join(match[0] for match in word_matches(plain_text(report)))


def word_matches(text: str) -> Iterator[re.Match[str]]:
    """The words of a ``text`` that is plain already, in their places."""
    return _WORD.finditer(text)


def join_words(words: Sequence[str]) -> str:
    """``words`` joined by spaces, but for those between characters of Han and kana."""
    return _BETWEEN_HAN.sub("", " ".join(words))


def lacks_spaces(reports: Sequence[str]) -> bool:
    """Whether most of the ``reports`` are in a script without spaces, and no word segmenter has put some in."""
    return 2 * sum(map(_lacks_spaces, reports)) > len(reports)


def _lacks_spaces(report: str) -> bool:
    letters = sum(map(str.isalpha, report))
    for script, longest in _UNSPACED.items():
        counts = [count for word in report.split() if (count := len(script.findall(word)))]
        if 2 * sum(counts) > letters and sum(counts) > longest * len(counts):
            return True
    return False


# A data set's DataSpec names one of these, and a checkpoint's vocabulary keeps the name.
CLEANERS: dict[str, Callable[[str], str]] = {
    name: functools.partial(_clean_with, replacements) for name, replacements in _REPLACEMENTS.items()
} | {"coco": _clean_caption, "any": words_of}


def clean_report(report: str, cleaner: str) -> str:
    """``report`` as the rules called ``cleaner`` (a key of CLEANERS) clean it; InputError for an unknown name."""
    if not isinstance(cleaner, str) or cleaner not in CLEANERS:
        raise InputError(f"cleaner {cleaner!r} is unknown; choose one of {', '.join(CLEANERS)}")
    return CLEANERS[cleaner](report)


def count_words(reports: Iterable[str], cleaner: str) -> Counter[str]:
    """How often each token occurs in the cleaned ``reports``."""
    return Counter(token for report in reports for token in clean_report(report, cleaner).split())


def unknown_share(counts: Mapping[str, int], threshold: int) -> float:
    """The share of all tokens that ``threshold`` turns into <unk>, in [0, 1]."""
    return sum(count for count in counts.values() if count < threshold) / max(sum(counts.values()), 1)


def largest_threshold(counts: Mapping[str, int], share: float) -> int:
    """The largest threshold that turns at most ``share`` of all tokens into <unk>."""
    total, lost = sum(counts.values()), 0
    by_count = Counter(counts.values())
    for count in sorted(by_count):
        lost += count * by_count[count]
        if lost > share * total:
            return count
    return 1


class Tokenizer:
    """Maps reports to ids and back; ``tokens`` are the words of the ids 1..V, in order."""

    special_ids = (BOS, EOS, PAD)

    def __init__(self, tokens: Sequence[str], cleaner: str):
        clean_report("", cleaner)  # an unknown cleaner is refused here
        self.cleaner = cleaner
        self.idx2token = dict(enumerate(tokens, start=1))
        self.token2idx = {token: index for index, token in self.idx2token.items()}
        if len(self.token2idx) != len(self.idx2token):
            raise InputError("tokenizer: the vocabulary holds a token twice; every token needs one id")
        if UNKNOWN not in self.token2idx:
            raise InputError(f"tokenizer: the vocabulary lacks {UNKNOWN}")

    @classmethod
    def from_reports(cls, reports: Iterable[str], threshold: int, cleaner: str) -> "Tokenizer":
        """Vocabulary of <unk> and the tokens seen at least ``threshold`` times in ``reports`` (the train split)."""
        return cls.from_counts(count_words(reports, cleaner), threshold, cleaner)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], threshold: int, cleaner: str) -> "Tokenizer":
        """The same, of the ``counts`` that ``count_words`` gives."""
        frequent = {token for token, count in counts.items() if count >= threshold}
        return cls(sorted(frequent | {UNKNOWN}), cleaner)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens: the ids are 1..V."""
        return len(self.idx2token)

    @property
    def num_ids(self) -> int:
        """V + 1, the number of rows of embeddings and logits (0 is begin, end and padding)."""
        return len(self.idx2token) + 1

    @property
    def unk_id(self) -> int:
        """The id of <unk>."""
        return self.token2idx[UNKNOWN]

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokens joined by newlines: equal when every id means the same token."""
        return hashlib.sha256("\n".join(self.idx2token.values()).encode()).hexdigest()

    def encode(self, report: str) -> list[int]:
        """Ids of the cleaned report between two zeros, not truncated; unknown words become <unk>."""
        words = clean_report(report, self.cleaner).split()
        return [BOS, *(self.token2idx.get(word, self.unk_id) for word in words), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens of ``ids`` (without the leading begin) up to the first 0, joined by single spaces."""
        words = []
        for index in ids:
            if index == EOS:
                break
            words.append(self.idx2token[int(index)])
        return " ".join(words)

    def words(self, ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """The words of ``ids`` (without begin and end), each with its range of ids, which is one of them."""
        return [(self.decode([index]), place, place + 1) for place, index in enumerate(ids)]

    def decode_batch(self, rows) -> list[str]:
        """Text of every row of ``rows``: lists of ids, or an integer array or tensor (B, L)."""
        return [self.decode(row) for row in (rows.tolist() if hasattr(rows, "tolist") else rows)]

    def state(self) -> dict:
        """What ``from_state`` needs, in JSON's types."""
        return {"tokens": list(self.idx2token.values()), "cleaner": self.cleaner}

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """The tokenizer that ``state()`` described; InputError for another dictionary."""
        tokens = state.get("tokens") if isinstance(state, dict) else None
        if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
            raise InputError("tokenizer state: expected {'tokens': [strings], 'cleaner': name}")
        return cls(tokens, state.get("cleaner"))


def cut_report(report: str, tokenizer: Any, max_seq_length: int) -> str:
    """A report as the R2Gen family scores references: cleaned, rare words as <unk>, cut to ``max_seq_length`` ids."""
    return tokenizer.decode(tokenizer.encode(report)[:max_seq_length][1:])
