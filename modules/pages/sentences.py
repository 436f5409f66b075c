"""Which sentences two reports share, for the marks of report.html."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

# A full stop ends a sentence where white space or nothing follows: not in "1.5 cm". Chinese, Japanese and Hindi have
# full stops of their own.
_END = re.compile(r"\s*(?:\.(?:\s+|$)|[\u3002\u0964]\s*)")


class Sentence(NamedTuple):
    """A sentence without its full stop, and whether the other report has it too."""

    text: str
    shared: bool


def split_sentences(report: str) -> list[str]:
    """The sentences of a raw or cleaned report, without full stops; empty ones are dropped."""
    return [piece.strip() for piece in _END.split(report) if piece.strip()]


def compare_sentences(reference: str, generated: str) -> tuple[list[Sentence], list[Sentence]]:
    """Mark the sentences of both reports as shared or not, each list in its report's own order.

    Letter case, white space and order do not count; a sentence that occurs twice is shared twice only if it occurs
    twice in both.
    """
    sides = [split_sentences(reference), split_sentences(generated)]
    common = Counter(map(_key, sides[0])) & Counter(map(_key, sides[1]))
    marked: tuple[list[Sentence], list[Sentence]] = ([], [])
    for sentences, result in zip(sides, marked, strict=True):
        left = common.copy()
        for text in sentences:
            key = _key(text)
            result.append(Sentence(text, left[key] > 0))
            left[key] -= 1
    return marked


def compare_captions(captions: Sequence[str], generated: str) -> tuple[list[Sentence], list[Sentence]]:
    """Mark the captions that equal ``generated``, and ``generated`` if there is one; case and full stops do not count.

    Each caption is a sentence of the first list, ``generated`` the only one of the second.
    """
    wanted = _key(generated.rstrip(" ."))
    marked = [Sentence(text.strip().removesuffix("."), _key(text.strip(" .")) == wanted) for text in captions]
    found = [Sentence(generated, any(sentence.shared for sentence in marked))] if generated else []
    return marked, found


def _key(sentence: str) -> str:
    return " ".join(sentence.lower().split())
