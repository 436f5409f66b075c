"""A trained model in other formats: the published codes' checkpoints, and a folder in the layout of the hub.

Neither has optimiser state, paths of this machine, ids or reports; the vocabulary has the training reports' words.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.inference.study_files import SETTINGS, instead_of_folder
from modules.runtime.errors import InputError
from modules.runtime.hub import shared_name
from modules.runtime.input_files import open_safetensors, read_json
from modules.runtime.records import private_folder, write_private
from modules.training.checkpoint import require_mean_patches

WEIGHTS, VOCABULARY, CARD = "model.safetensors", "vocabulary.json", "README.md"
ADAPTERS = "adapter"  # folder of low-rank adapters for peft; this project reads them in WEIGHTS
FORMAT = "ithn-shared-1"
MEAN = "mean_patches"  # mean training image of models that decode with guidance
# XProNet's labels predicted from the image; the bias of --contrastive_form sigmoid.
_OURS_ALONE = ("label_head.", "contrastive_bias")
_HEADS = ("temp_1", "temp_3", "img_projection.", "text_projection.")


def published_weights(state: Mapping[str, Tensor], *, heads: bool) -> dict[str, Tensor]:
    """The entries of ``state`` (any shapes) that a published code loads; ``heads`` adds the released ITHN code's.

    The paper's variant has one temperature where the released code has two: both become that one. InputError where
    ``heads`` are asked of weights that were trained without ITHN.
    """
    kept = {name: value for name, value in state.items() if not name.startswith((*_OURS_ALONE, *_HEADS))}
    if not heads:
        return kept
    own = {name: value for name, value in state.items() if name.startswith(_HEADS)}
    if "temp_1" not in own:
        raise InputError("these weights were trained without ITHN: the released ITHN code cannot read them")
    return (
        {"temp_1": own["temp_1"], "temp_3": own.get("temp_3", own["temp_1"].clone())}
        | kept
        | {name: value for name, value in own.items() if not name.startswith("temp_")}
    )


def _without_folder(name: str, value: Any) -> Any:
    """A setting as others may see it: the folders that files lie in are this machine's matter."""
    if name == "visual_extractor":
        return shared_name(value)
    return Path(value).name if name == "detection_features" else value


def hub_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's weights, and its mean training image where it has one."""
    mean = content.get(MEAN)
    return dict(content["state_dict"]) | ({} if mean is None else {MEAN: mean})


def write_hub_folder(folder: Path, content: Mapping[str, Any], card: str, names: Collection[str]) -> None:
    """Write a checkpoint as weights, settings (those in ``names``), vocabulary and card.

    InputError where the folder has a model already.
    """
    from safetensors.torch import save

    if (folder / WEIGHTS).exists():
        raise InputError(f"--out {folder}: already contains a model; name another folder")
    private_folder(folder)
    # Tensors that share memory (tied weights) are written separately, as in the published files.
    weights = {name: value.contiguous().clone() for name, value in hub_tensors(content).items()}
    write_private(folder / WEIGHTS, save(weights, {"format": "pt"}))
    settings = {
        "format": FORMAT,
        "strategy": content["strategy"],
        "epoch": content["epoch"],
        **{name: _without_folder(name, value) for name, value in content["config"].items() if name in names},
    }
    write_private(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    write_private(folder / VOCABULARY, json.dumps(content["vocabulary"], ensure_ascii=False) + "\n")
    write_private(folder / CARD, card)


def write_adapters(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write low-rank adapters, their ``weights`` of any shape and their ``config``, as peft reads them."""
    from safetensors.torch import save

    private_folder(folder)
    write_private(folder / "adapter_model.safetensors", save(dict(weights), {"format": "pt"}))
    write_private(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_hub_folder(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """What ``write_hub_folder`` wrote: state_dict, mean_patches, config, vocabulary, strategy, epoch.

    Of the settings only those in ``names``. InputError for anything else.
    """
    if not (folder / SETTINGS).exists():
        raise InputError(instead_of_folder(folder))
    settings, vocabulary = (_read_json(folder / name) for name in (SETTINGS, VOCABULARY))
    if settings.get("format") != FORMAT:
        raise InputError(f"{folder / SETTINGS}: format is {settings.get('format')!r}, expected {FORMAT!r}")
    try:
        with open_safetensors(folder / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # damaged bytes lead the reader to all kinds of exceptions
        raise InputError(f"{folder / WEIGHTS}: missing or damaged ({type(error).__name__})") from error
    if not isinstance(settings.get("strategy"), str) or not isinstance(settings.get("epoch"), int):
        raise InputError(f"{folder / SETTINGS}: needs the entries strategy and epoch")
    own = {MEAN: weights.pop(MEAN, None)}
    require_mean_patches(own, folder / WEIGHTS)
    return {
        "state_dict": weights,
        **own,
        "config": {name: value for name, value in settings.items() if name in names},
        "vocabulary": vocabulary,
        "strategy": settings["strategy"],
        "epoch": settings["epoch"],
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def same_weights(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both state dicts have the same entries of any shape, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
