"""Words of any language: a cleaner without English rules, and scripts that are written without spaces."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

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
