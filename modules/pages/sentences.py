"""What two reports share, for the marks of the pages: whole sentences, and words inside sentences that are alike."""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

# A full stop ends a sentence where white space or nothing follows: not in "1.5 cm". Chinese, Japanese and Hindi have
# full stops of their own.
_END = re.compile(r"\s*(?:\.(?:\s+|$)|[\u3002\u0964]\s*)")
# Words are separated by spaces; in Chinese and Japanese every character is compared by itself.
_CHARACTERS = "\u3040-\u30ff\u3400-\u9fff\uff00-\uffef"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\s{_CHARACTERS}]+")
_MARKS = ",;:()\"'"  # which cleaning removes from one side of some comparisons
# Share of their words, by Dice's coefficient, from which two sentences are shown as one that was changed.
ALIKE = 0.5


class Run(NamedTuple):
    """Words that follow one another, whether the other report has them in the same place, and the space after them."""

    text: str
    shared: bool
    after: str = ""


class Sentence(NamedTuple):
    """A sentence without its full stop, whether the other report has it too, and its words in runs."""

    text: str
    shared: bool
    runs: tuple[Run, ...]

    @property
    def words(self) -> int:
        """How many words it has."""
        return len(split_words(self.text))

    @property
    def shared_words(self) -> int:
        """How many of its words are shared."""
        return sum(len(split_words(run.text)) for run in self.runs if run.shared)


def split_sentences(report: str) -> list[str]:
    """The sentences of a raw or cleaned report, without full stops; empty ones are dropped."""
    return [piece.strip() for piece in _END.split(report) if piece.strip()]


def split_words(text: str) -> list[str]:
    """The words of a sentence in small letters, without marks around them; of Chinese and Japanese its characters."""
    return [word.lower().strip(_MARKS) or word for word in _WORD.findall(text)]


def compare_sentences(reference: str, generated: str) -> tuple[list[Sentence], list[Sentence]]:
    """Mark what both reports share, each list in its report's own order.

    Letter case, white space and the order of sentences do not count; a sentence that occurs twice is shared twice only
    if it occurs twice in both. The other sentences are paired with the one that is most alike, and share the words
    that both have in the same order; without one that is ALIKE they share nothing.
    """
    sides = split_sentences(reference), split_sentences(generated)
    equal = _equal(*sides)
    left = [[i for i in range(len(side)) if not flags[i]] for side, flags in zip(sides, equal, strict=True)]
    runs: list[dict[int, tuple[Run, ...]]] = [{}, {}]
    for i, j in _pairs([sides[0][i] for i in left[0]], [sides[1][j] for j in left[1]]):
        first, second = left[0][i], left[1][j]
        runs[0][first], runs[1][second] = _runs(sides[0][first], sides[1][second])
    first, second = (
        [
            Sentence(text, flag, own.get(number, (Run(text, flag),)))
            for number, (text, flag) in enumerate(zip(side, flags, strict=True))
        ]
        for side, flags, own in zip(sides, equal, runs, strict=True)
    )
    return first, second


def compare_captions(captions: Sequence[str], generated: str) -> tuple[list[Sentence], list[Sentence]]:
    """Mark the captions that equal ``generated``, and ``generated`` if there is one; case and full stops do not count.

    Each caption is a sentence of the first list, ``generated`` the only one of the second; its words are compared with
    those of the caption that is most alike.
    """
    texts, wanted = [text.strip().removesuffix(".") for text in captions], _key(generated.rstrip(" ."))
    marked = [_against(text, generated, _key(text.rstrip(" .")) == wanted) for text in texts]
    if not generated:
        return marked, []
    nearest = max(texts, key=lambda text: _alike(text, generated), default="")
    return marked, [_against(generated, nearest, any(sentence.shared for sentence in marked))]


def _against(text: str, other: str, equal: bool) -> Sentence:
    runs = (Run(text, True),) if equal else (Run(text, False),)
    if not equal and _alike(text, other) >= ALIKE:
        runs, _ = _runs(text, other)
    return Sentence(text, equal, runs)


def _equal(*sides: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """For each sentence of two reports, whether the other has it."""
    common = Counter(map(_key, sides[0])) & Counter(map(_key, sides[1]))
    flags: tuple[list[bool], list[bool]] = ([], [])
    for sentences, found in zip(sides, flags, strict=True):
        left = common.copy()
        for text in sentences:
            found.append(left[_key(text)] > 0)
            left[_key(text)] -= 1
    return flags


def _pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Each sentence with at most one of the other side, the most alike first."""
    ranked = sorted(
        (-likeness, i, j)
        for i, text in enumerate(first)
        for j, other in enumerate(second)
        if (likeness := _alike(text, other)) >= ALIKE
    )
    pairs: dict[int, int] = {}
    for _, i, j in ranked:
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    return list(pairs.items())


def _alike(text: str, other: str) -> float:
    words, others = Counter(split_words(text)), Counter(split_words(other))
    return 2 * (words & others).total() / max(1, words.total() + others.total())


def _runs(text: str, other: str) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """The words of both sentences in runs: the longest ones that both have in the same order are shared."""
    words = split_words(text), split_words(other)
    blocks = SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
    return _marked(text, [(block.a, block.size) for block in blocks]), _marked(
        other, [(block.b, block.size) for block in blocks]
    )


def _marked(text: str, shared: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    """``text`` in runs; ``shared`` has the words (start, length) that are, the last of no length at the end."""
    spans = [match.span() for match in _WORD.finditer(text)]
    runs, position = [], 0
    for start, length in shared:
        for first, last, flag in ((position, start, False), (start, start + length, True)):
            if first < last:
                stop = spans[last][0] if last < len(spans) else len(text)
                piece = text[spans[first][0] : stop]
                runs.append(Run(piece.rstrip(), flag, piece[len(piece.rstrip()) :]))
        position = start + length
    return tuple(runs)


def _key(sentence: str) -> str:
    return " ".join(sentence.lower().split())
