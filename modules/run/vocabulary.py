"""The tokenizer of a run: the one that --tokenizer names, made of the training reports, or a checkpoint's own."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

from modules.config import Config
from modules.data.tokenizers import Tokenizer, count_words, lacks_spaces, largest_threshold, unknown_share
from modules.runtime.errors import InputError

if TYPE_CHECKING:  # imported where they are used
    from modules.data.bpe_tokenizer import BpeTokenizer
    from modules.data.subword_tokenizer import SubwordTokenizer

logger = logging.getLogger("ithn")
AnyTokenizer = Union[Tokenizer, "BpeTokenizer", "SubwordTokenizer"]

MOST_UNKNOWN = 0.05  # share of the training tokens that may become <unk> without a word


def build_tokenizer(config: Config, reports: Sequence[str], *, kind: str, files: str = "gpt2_path") -> AnyTokenizer:
    """The tokenizer that --tokenizer names, of the training ``reports``; auto is the backbone's ``kind``, bpe only
    where the setting ``files`` names a folder. InputError where it cannot be made, or where words need spaces that the
    reports lack.
    """
    if config.tokenizer in ("subword", "character"):
        from modules.data.subword_tokenizer import SubwordTokenizer

        size = config.subword_vocabulary if config.tokenizer == "subword" else 0
        return SubwordTokenizer.from_reports(reports, size, config.threshold)
    wants_bpe = config.tokenizer == "bpe" or (config.tokenizer == "auto" and kind == "bpe" and getattr(config, files))
    if wants_bpe and (found := _own_tokenizer(config, files)) is not None:
        return found
    if problem := needs_spaces(config, reports):
        raise InputError(f"{config.ann_path}: {problem}")
    counts = count_words(reports, config.dataset.cleaner)
    if line := many_unknown(counts, config.threshold):
        logger.warning("%s", line)
    made = Tokenizer.from_counts(counts, config.threshold, config.dataset.cleaner)
    if made.vocab_size == 1:  # <unk> alone
        raise InputError(
            f"--threshold {config.threshold}: no word of the training reports in {config.ann_path} occurs that often, "
            "so the vocabulary would be empty; give a smaller one"
        )
    return made


def needs_spaces(config: Config, reports: Sequence[str]) -> str | None:
    """One line where a word tokenizer would take whole sentences of the ``reports`` for words, else None."""
    if config.tokenizer not in ("auto", "word") or config.dataset.cleaner == "any" or not lacks_spaces(reports):
        return None
    return (
        "most reports have no spaces between words, so every sentence would count as one word; give "
        "--tokenizer subword or --tokenizer character"
    )


def many_unknown(counts: dict[str, int], threshold: int) -> str | None:
    """One line where ``threshold`` turns more than MOST_UNKNOWN of the training tokens into <unk>, else None."""
    share = unknown_share(counts, threshold)
    if share <= MOST_UNKNOWN:
        return None
    better = largest_threshold(counts, MOST_UNKNOWN)
    return (
        f"--threshold {threshold}: {share:.1%} of the training tokens become <unk>; with --threshold {better} it would "
        f"be {unknown_share(counts, better):.1%}"
    )


def _own_tokenizer(config: Config, files: str) -> "BpeTokenizer | None":
    """The tokenizer of the language model that the setting ``files`` names."""
    name, flag = getattr(config, files), f"--{files}"
    if not name:
        raise InputError(f"--tokenizer bpe: give the folder or hub id with its vocab.json and merges.txt as {flag}")
    from modules.data.bpe_tokenizer import BpeTokenizer, find_gpt2

    found = BpeTokenizer.from_folder(find_gpt2(name, flag), config.dataset.cleaner, flag)
    if found is not None:
        return found
    lacking = f"{flag} {name}: no BPE files (vocab.json and merges.txt, or tokenizer.json) there"
    if config.tokenizer == "bpe":
        raise InputError(f"{lacking}; add them, or give --tokenizer word")
    logger.warning("%s: the vocabulary is the words of the training reports", lacking)
    return None


def tokenizer_from_state(state: Any) -> AnyTokenizer:
    """The tokenizer whose ``state()`` a checkpoint stores; InputError for anything else."""
    if isinstance(state, dict) and isinstance(state.get("subwords"), str):
        from modules.data.subword_tokenizer import SubwordTokenizer

        return SubwordTokenizer(state["subwords"])
    if isinstance(state, dict) and isinstance(state.get("bpe"), str):
        from modules.data.bpe_tokenizer import BpeTokenizer

        special = state.get("special")
        if special is None:
            return BpeTokenizer(state["bpe"], state.get("cleaner"))
        if not (isinstance(special, list) and len(special) == 3 and all(isinstance(token, str) for token in special)):
            raise InputError("its vocabulary names no tokens for begin, end and padding")
        return BpeTokenizer(state["bpe"], state.get("cleaner"), special)
    return Tokenizer.from_state(state)
