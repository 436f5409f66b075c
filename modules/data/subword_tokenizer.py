"""Characters or subwords learnt from the training reports, for any language: the word tokenizer's interface."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from modules.data.tokenizers import BOS, EOS, PAD, UNKNOWN, join_words, plain_text, word_matches, words_of
from modules.runtime.errors import InputError

_SPACE = "\u2581"  # in place of a space, at the start of a piece
_END = "<end>"  # id 0: begin, end and padding
CLEANER = "any"


def read_definition(definition: str, name: str) -> Library:
    """The tokenizer with this ``definition``, which leaves texts whole. InputError, with its ``name``, for another."""
    try:
        found = Library.from_str(definition)
    except Exception as error:  # the Rust library raises plain Exceptions
        raise InputError(f"{name}: its definition cannot be read: {str(error)[:200]}") from error
    found.encode_special_tokens = True  # a report that spells out a special token means its letters
    found.no_truncation()
    found.no_padding()
    return found


class SubwordTokenizer:
    """Maps reports to ids and back; ``definition`` is the JSON of a tokenizers.Tokenizer, which a checkpoint stores.

    Texts are cleaned by the rules called "any". ``decode`` gives cleaned texts, whose words
    are separated by spaces: characters, in a script without them. InputError for another definition.
    """

    special_ids = (BOS, EOS, PAD)
    cleaner = CLEANER

    def __init__(self, definition: str):
        self._bpe = read_definition(definition, "subword tokenizer")
        if self._bpe.token_to_id(_END) != EOS or self._bpe.token_to_id(UNKNOWN) is None:
            raise InputError(f"subword tokenizer: {_END} is not its id {EOS}, or {UNKNOWN} is missing")
        self.definition = definition
        self._pieces = {index: piece for piece, index in self._bpe.get_vocab().items()}

    @classmethod
    def from_reports(cls, reports: Iterable[str], size: int, threshold: int = 1) -> "SubwordTokenizer":
        """Byte-pair encoding of ``reports`` (the train split): their characters, and pairs merged until there are
        ``size`` tokens or none occurs ``threshold`` times. Size 0 keeps the characters alone.
        """
        found = Library(models.BPE(unk_token=UNKNOWN))
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(replacement=_SPACE), pre_tokenizers.Punctuation("isolated")]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=threshold, special_tokens=[_END, UNKNOWN], show_progress=False
        )
        found.train_from_iterator(map(plain_text, reports), trainer)
        return cls(found.to_str())

    @property
    def num_ids(self) -> int:
        """Rows of embeddings and logits."""
        return self._bpe.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        """Tokens other than the end."""
        return self.num_ids - 1

    @property
    def unk_id(self) -> int:
        """The id of <unk>, which replaces characters that the training reports do not have."""
        return self._bpe.token_to_id(UNKNOWN)

    @property
    def sha256(self) -> str:
        """SHA-256 of the definition: equal when every id means the same token."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode(self, report: str) -> list[int]:
        """Ids of the report between two zeros, not truncated; unknown characters become <unk>."""
        return [BOS, *self._bpe.encode(plain_text(report), add_special_tokens=False).ids, EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Words of ``ids`` (without the leading begin) up to the first 0, joined by single spaces."""
        return words_of("".join(self._texts(itertools.takewhile(lambda index: index != EOS, map(int, ids)))))

    def _texts(self, ids: Iterable[int]) -> list[str]:
        pieces = [self._pieces[index].replace(_SPACE, " ") for index in ids]
        return [f" {UNKNOWN} " if piece == UNKNOWN else piece for piece in pieces]

    def words(self, ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """The words that ``ids`` (without begin and end) are pieces of, each with the range of its pieces.

        Words that a piece has in common with the next ones are given as one.
        """
        texts = self._texts(map(int, ids))
        piece_at = [place for place, text in enumerate(texts) for _ in text]  # by the place of a character
        stops: list[int] = []
        for word in word_matches("".join(texts)):
            if stops and piece_at[word.start()] < stops[-1]:
                stops.pop()
            stops.append(piece_at[word.end() - 1] + 1)
        spans = itertools.pairwise([0, *stops])
        return [(join_words("".join(texts[start:stop]).split()), start, stop) for start, stop in spans]

    def decode_batch(self, rows) -> list[str]:
        """Text of every row of ``rows``: lists of ids, or an integer array or tensor (B, L)."""
        return [self.decode(row) for row in (rows.tolist() if hasattr(rows, "tolist") else rows)]

    def state(self) -> dict:
        """What ``modules.run.vocabulary.tokenizer_from_state`` needs, in JSON's types."""
        return {"subwords": self.definition, "cleaner": self.cleaner}
