"""The tokeniser of a run, and what a backbone that is built on GPT-2 starts from."""

import logging
from collections.abc import Sequence
from typing import Any

from modules.config import Config
from modules.data.bpe_tokenizer import BpeTokenizer
from modules.data.gpt2_files import find_gpt2, read_gpt2
from modules.data.tokenizers import Tokenizer
from modules.runtime.errors import InputError

AnyTokenizer = Tokenizer | BpeTokenizer
logger = logging.getLogger("ithn")


def build_tokenizer(config: Config, reports: Sequence[str], *, kind: str) -> AnyTokenizer:
    """The tokeniser that --tokenizer names; auto is the backbone's ``kind``, bpe only where --gpt2_path is given."""
    wants_bpe = config.tokenizer == "bpe" or (config.tokenizer == "auto" and kind == "bpe" and config.gpt2_path)
    if wants_bpe and not config.gpt2_path:
        raise InputError(
            "--tokenizer bpe: give the folder or hub id with GPT-2's vocab.json and merges.txt as --gpt2_path"
        )
    if wants_bpe:
        folder = find_gpt2(config.gpt2_path)
        found = BpeTokenizer.from_folder(folder, config.dataset.cleaner)
        if found is not None:
            return found
        lacking = f"--gpt2_path {config.gpt2_path}: no BPE files (vocab.json and merges.txt, or tokenizer.json) there"
        if config.tokenizer == "bpe":
            raise InputError(f"{lacking}; add them, or give --tokenizer word")
        logger.warning("%s: the vocabulary is the words of the training reports", lacking)
    return Tokenizer.from_reports(reports, config.threshold, config.dataset.cleaner)


def gpt2_options(config: Config, tokenizer: AnyTokenizer, pretrained: bool) -> dict[str, Any]:
    """Special ids, and the weights of --gpt2_path unless a checkpoint brings them."""
    if config.max_seq_length > config.gpt2_positions:
        raise InputError(
            f"--max_seq_length {config.max_seq_length}: at most the decoder's --gpt2_positions {config.gpt2_positions}"
        )
    begin, end, padding = tokenizer.special_ids
    weights = None
    if pretrained and config.gpt2_path:
        weights = _weights(config, tokenizer)
    elif pretrained:
        logger.info("--gpt2_path is empty: the decoder starts from random weights")
    return {"begin_id": begin, "end_id": end, "pad_token": padding, "gpt2": weights}


def _weights(config: Config, tokenizer: AnyTokenizer) -> dict[str, Any]:
    weights, sizes = read_gpt2(find_gpt2(config.gpt2_path))
    wrong = {name: value for name, value in sizes.items() if getattr(config, name) != value}
    if wrong:
        raise InputError(
            f"--gpt2_path {config.gpt2_path}: its sizes differ from the flags; give "
            + " ".join(f"--{name} {value}" for name, value in wrong.items())
        )
    rows = len(weights["wte.weight"])
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.num_ids != rows:
        raise InputError(
            f"--gpt2_path {config.gpt2_path}: {rows} token embeddings, but its BPE files have "
            f"{tokenizer.num_ids} tokens"
        )
    if not isinstance(tokenizer, BpeTokenizer):
        logger.warning("GPT-2 with a word vocabulary: its token embeddings do not fit and start at random")
        del weights["wte.weight"]
    return weights
