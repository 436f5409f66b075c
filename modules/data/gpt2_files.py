"""A pretrained GPT-2: where its files lie, its weights and its sizes."""

from pathlib import Path
from typing import TYPE_CHECKING

from modules.runtime.errors import InputError
from modules.runtime.hub import download_model

if TYPE_CHECKING:
    from torch import Tensor

_WITHOUT = "'--gpt2_path \"\"' trains from random weights and a word vocabulary, which need no download"


def find_gpt2(name: str) -> Path:
    """Folder of the GPT-2 called ``name``: a local folder, or the id of a model on the Hugging Face hub.

    Only a hub id leads to a download, once. InputError with what to do where it cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"--gpt2_path {name}: no such folder (nor a hub id such as gpt2); {_WITHOUT}")
    return download_model(name, flag="--gpt2_path", otherwise=_WITHOUT)


def read_gpt2(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, int]]:
    """Weights by GPT-2's names (wte.weight, h.0.ln_1.weight, ...), and its sizes by the names of the flags.

    They come from safetensors, or through torch's weights_only reader. InputError where the folder holds no GPT-2.
    """
    import torch
    from transformers import GPT2Model, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = GPT2Model.from_pretrained(
            folder, local_files_only=True, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files surface as whatever their readers raise
        raise InputError(
            f"--gpt2_path {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}; {_WITHOUT}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"--gpt2_path {folder}: holds no GPT-2: {len(missing)} tensors are missing, such as "
            f"{missing[0]}; {_WITHOUT}"
        )
    config = model.config
    sizes = {
        "d_model": config.n_embd,
        "num_heads": config.n_head,
        "gpt2_layers": config.n_layer,
        "gpt2_positions": config.n_positions,
    }
    return {name: value for name, value in model.named_parameters()}, sizes
