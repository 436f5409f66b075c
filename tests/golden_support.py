"""Reading of golden vectors: the folder layout of GOLDEN_DIR, and the seeded rules that stand in for large files."""

import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.settings import declared_presets, declared_settings
from modules.layers.visual_extractor import IMAGENET_MEAN, IMAGENET_STD

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


@dataclass
class Golden:
    """One folder of golden vectors."""

    config: dict
    arrays: dict[str, Tensor]
    state: dict[str, Tensor]  # stored tensors, without the visual extractor

    @property
    def options(self) -> dict:
        """The reference's command-line options."""
        return self.config["args"]

    def images(self, name: str = "images_small") -> Tensor:
        """(B, N, 3, 224, 224) normalised images; N = 1 where the reference had no view axis."""
        images = normalised_images(self.arrays[name].numpy())
        return images if images.dim() == 5 else images.unsqueeze(1)


def published_settings(name: str) -> dict:
    """The settings of the backbone ``name`` that its published run script gives, by name."""
    own = {item.name for item in dataclasses.fields(declared_settings(name))}
    return {key: value for key, value in declared_presets(name)["*"].items() if key in own}


def read_golden(*folder: str) -> Golden:
    """The vectors in GOLDEN_DIR/folder."""
    path = GOLDEN_DIR.joinpath(*folder)
    with np.load(path / "data.npz") as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    return Golden(json.loads((path / "config.json").read_text()), arrays, load_file(path / "state.safetensors"))


def visual_tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The extractor's tensor ``key`` (the name after "visual_extractor.model."), drawn from a frozen stream."""
    if key.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    stream = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    draw = stream.standard_normal(int(np.prod(shape))).reshape(shape)
    if len(shape) == 4:  # convolution
        draw *= np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        draw = 1.0 + 0.5 * np.abs(draw)
    elif key.endswith(("running_mean", "bias")):
        draw *= 0.1
    else:  # weight of a batch norm
        draw = 0.8 + 0.1 * draw
    return draw.astype(np.float32)


def load_visual(extractor: torch.nn.Module, seed: int) -> None:
    """Fill ``extractor.model`` by the seeded rule."""
    shapes = {key: tuple(value.shape) for key, value in extractor.model.state_dict().items()}
    extractor.model.load_state_dict(
        {key: torch.from_numpy(visual_tensor(key, shape, seed)) for key, shape in shapes.items()}
    )


def normalised_images(small: np.ndarray, factor: int = 16) -> Tensor:
    """uint8 (..., 3, 14, 14) enlarged by repeating pixels, scaled to [0, 1] and normalised."""
    large = small.repeat(factor, axis=-1).repeat(factor, axis=-2).astype(np.float32) / np.float32(255)
    mean = np.array(IMAGENET_MEAN, np.float32).reshape(3, 1, 1)
    std = np.array(IMAGENET_STD, np.float32).reshape(3, 1, 1)
    return torch.from_numpy((large - mean) / std)
