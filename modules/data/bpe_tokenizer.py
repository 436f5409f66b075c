"""A language model's own tokenizer (GPT-2's byte pairs, or another's) behind the word tokenizer's interface, and the
files of a pretrained GPT-2.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modules.data.subword_tokenizer import read_definition
from modules.data.tokenizers import BOS, EOS, UNKNOWN, clean_report
from modules.runtime.errors import InputError
from modules.runtime.hub import download_model
from modules.runtime.input_files import require_regular_folder

if TYPE_CHECKING:
    from torch import Tensor

_WHITE_SPACE = "\u0120\u010a\u2581"  # how GPT-2 and SentencePiece write a space at the start of a piece
_SIGNS_IN_WORDS = ("-", "'", ".", ",")  # WordPiece cuts words at them: x-ray, don't, 1.5
# Begin and padding are VisualGPT's choice, as GPT-2 has no such tokens; the end is GPT-2's own.
BEGIN, END, PADDING = "<?", "<|endoftext|>", "+="


def _without(flag: str) -> str:
    return f"'{flag} \"\"' trains from random weights and a word vocabulary, which need no download"


class BpeTokenizer:
    """Maps reports to ids and back; ``definition`` is the JSON of a tokenizers.Tokenizer, ``cleaner`` a report's.

    As everywhere, id 0 is begin, end and padding at once. GPT-2 has a word at 0: that word and GPT-2's end token
    exchange ids, all others are GPT-2's. ``special_ids`` are its ids of begin, end and padding, the tokens ``special``;
    where a vocabulary lacks those for begin and padding, its end token serves. ``unk_id`` is the id of unknown words,
    None where bytes spell every word. InputError for an unreadable definition.
    """

    def __init__(self, definition: str, cleaner: str, special: Sequence[str] = (BEGIN, END, PADDING)):
        clean_report("", cleaner)  # an unknown cleaner is refused here
        self._bpe = read_definition(definition, "BPE tokenizer")
        self.special = tuple(special)
        begin, end, padding = (self._bpe.token_to_id(token) for token in self.special)
        if end is None:
            reason = ", so it is not GPT-2's" if self.special[1] == END else ""
            raise InputError(f"BPE tokenizer: its vocabulary lacks {self.special[1]}{reason}")
        self.cleaner, self.definition = cleaner, definition
        self.special_ids = (end if begin is None else begin, end, end if padding is None else padding)
        model = json.loads(definition)["model"]
        # BERT's vocabularies; "##" alone is no sign of them, as GPT-2 has such a token too.
        self._inside = model.get("continuing_subword_prefix", "##") if model.get("type") == "WordPiece" else None
        unknown = self._bpe.token_to_id(model.get("unk_token") or "")
        unknown = model.get("unk_id") if unknown is None else unknown
        self.unk_id = None if unknown is None or unknown in self.special_ids else self._exchange(unknown)

    @classmethod
    def from_folder(cls, folder: Path, cleaner: str, flag: str = "--gpt2_path") -> "BpeTokenizer | None":
        """The tokenizer that transformers saved in ``folder``, or None where it has no files of one.

        ``flag`` named the folder: --gpt2_path takes GPT-2's alone, with VisualGPT's special tokens. InputError for
        damaged files.
        """
        require_regular_folder(folder, flag)
        if flag != "--gpt2_path":
            return cls._of_any_model(folder, cleaner, flag)
        names = [path.name for path in folder.iterdir()]
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
            return None
        from transformers import GPT2TokenizerFast

        try:
            found = GPT2TokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # damaged files surface as whatever their readers raise
            raise InputError(f"BPE tokenizer {folder}: cannot be read: {' '.join(str(error).split())[:200]}") from error
        return cls(found.backend_tokenizer.to_str(), cleaner)

    @classmethod
    def _of_any_model(cls, folder: Path, cleaner: str, flag: str) -> "BpeTokenizer | None":
        """The fast tokenizer in ``folder`` with the special tokens that its model uses."""
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
            return None
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            definition = found.backend_tokenizer.to_str()
        except Exception as error:  # damaged files surface as whatever their readers raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{flag} {folder}: its tokenizer cannot be read: {reason}") from error
        end = found.eos_token or found.sep_token
        if end is None:
            raise InputError(f"{flag} {folder}: its tokenizer has no token that ends a text")
        begin = found.bos_token or found.cls_token or found.pad_token or end
        return cls(definition, cleaner, (begin, end, found.pad_token or end))

    @property
    def num_ids(self) -> int:
        """Rows of embeddings and logits."""
        return self._bpe.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        """Tokens other than the end."""
        return self.num_ids - 1

    @property
    def sha256(self) -> str:
        """SHA-256 of the definition: equal when every id means the same token."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode(self, report: str) -> list[int]:
        """Ids of the cleaned report between two zeros, not truncated."""
        ids = self._bpe.encode(clean_report(report, self.cleaner), add_special_tokens=False).ids
        return [BOS, *map(self._exchange, ids), EOS]

    def _exchange(self, index: int) -> int:
        end = self.special_ids[1]
        return {0: end, end: 0}.get(index, index)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` (without the leading begin) up to the first 0; begin and padding tokens are left out."""
        words = []
        for index in ids:
            if index == EOS:
                break
            own = self._exchange(int(index))
            if own not in self.special_ids:
                words.append(own)
        if self._inside is not None:
            return self._spelled(list(map(self._piece, words)))
        return " ".join(self._bpe.decode(words, skip_special_tokens=False).split())

    def _piece(self, own: int) -> str:
        """The token of GPT-2's id ``own``, empty for a row of the model beyond the vocabulary."""
        return self._bpe.id_to_token(own) or ""

    def _spelled(self, pieces: list[str]) -> str:
        """The text of WordPiece's ``pieces`` as the cleaner writes it; the library gives "clear." and "x - ray"."""
        starts = set(self._starts(pieces))
        unknown = None if self.unk_id is None else self._piece(self._exchange(self.unk_id))
        shown = (UNKNOWN if piece == unknown else piece.removeprefix(self._inside) for piece in pieces)
        return " ".join("".join(f" {text}" if place in starts else text for place, text in enumerate(shown)).split())

    def _starts(self, pieces: list[str]) -> list[int]:
        """The places of ``pieces`` that begin a word."""
        if self._inside is None:
            return [place for place, piece in enumerate(pieces) if place == 0 or piece[:1] in _WHITE_SPACE]
        signs = {place for place in range(1, len(pieces) - 1) if self._is_in_a_word(*pieces[place - 1 : place + 2])}
        within = signs | {place + 1 for place in signs}
        return [
            place
            for place, piece in enumerate(pieces)
            if place == 0 or not (place in within or piece.startswith(self._inside))
        ]

    def _is_in_a_word(self, left: str, sign: str, right: str) -> bool:
        """Whether ``sign`` joins its neighbours: pieces do not tell, but most that a cleaner would leave there do."""
        if sign not in _SIGNS_IN_WORDS or not (left[-1:].isalnum() and right[:1].isalnum()):
            return False
        joined = left[-1] + sign + right[0]
        return clean_report(joined, self.cleaner).removesuffix(" .") == joined

    def words(self, ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """The words that ``ids`` (without begin and end) are pieces of, each with the range of its pieces."""
        starts = self._starts([self._piece(self._exchange(int(index))) for index in ids])
        spans = [(self.decode(ids[start:stop]), start, stop) for start, stop in itertools.pairwise([*starts, len(ids)])]
        return [span for span in spans if span[0]]

    def decode_batch(self, rows) -> list[str]:
        """Text of every row of ``rows``: lists of ids, or an integer array or tensor (B, L)."""
        return [self.decode(row) for row in (rows.tolist() if hasattr(rows, "tolist") else rows)]

    def state(self) -> dict:
        """What ``tokenizer_from_state`` needs, in JSON's types."""
        special = {} if self.special == (BEGIN, END, PADDING) else {"special": list(self.special)}
        return {"bpe": self.definition, "cleaner": self.cleaner, **special}


def find_gpt2(name: str, flag: str = "--gpt2_path") -> Path:
    """Folder of the language model that ``flag`` calls ``name``: a folder, or the id of a model on the hub.

    Only a hub id leads to a download, once. InputError, with the remedy, where it cannot be loaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{flag} {name}: no such folder (nor a hub id such as gpt2); {_without(flag)}")
    return download_model(name, flag=flag, otherwise=_without(flag))


def read_gpt2(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, int]]:
    """Weights by GPT-2's names (wte.weight, h.0.ln_1.weight, ...), and its sizes by the names of the flags.

    Read from safetensors, or by torch's weights_only reader. InputError where the folder does not hold a GPT-2.
    """
    import torch
    from transformers import GPT2Model, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    require_regular_folder(folder, "--gpt2_path")
    try:
        model, report = GPT2Model.from_pretrained(
            folder, local_files_only=True, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files surface as whatever their readers raise
        raise InputError(
            f"--gpt2_path {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}; {_without('--gpt2_path')}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"--gpt2_path {folder}: does not hold a GPT-2: {len(missing)} tensors are missing, such as "
            f"{missing[0]}; {_without('--gpt2_path')}"
        )
    config = model.config
    sizes = {
        "d_model": config.n_embd,
        "num_heads": config.n_head,
        "gpt2_layers": config.n_layer,
        "gpt2_positions": config.n_positions,
    }
    return {name: value for name, value in model.named_parameters()}, sizes
