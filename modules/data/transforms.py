"""From a decoded image to the network's input: resizing, cropping, conversion to float, normalisation.

All of it is here, for training, evaluation, the caches and prediction alike. Shapes: N views, H x W pixels.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modules.data.images import Draft
from modules.runtime.errors import InputError

# R2GenCMN resizes to 256 and crops 224; other image sizes keep that proportion.
RESIZE_PER_CROP = 256 / 224


@dataclass(frozen=True)
class Transform:
    """PIL image -> (3, size, size) float32, normalised; made by ``train_transform`` or ``eval_transform``.

    Its two halves are also used apart: ``pixels`` stays uint8, which is what workers hand over (a quarter of the shared
    memory), and ``normalise`` follows on the device.
    """

    size: int
    resize: int | None  # shorter side before the random crop; None: straight to size x size
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    jpeg_draft: bool = field(default=False, repr=False)  # keys of feature caches that were made before have the repr

    def __call__(self, image: Image.Image, rng: torch.Generator | None = None) -> Tensor:
        """(3, size, size) float32; ``rng`` decides crop and flip, evaluation needs none."""
        return self.normalise(self.pixels(image, rng))

    @property
    def draft(self) -> Draft | None:
        """At what size ImageFolder need not look more closely; None: JPEG files are decoded in full."""
        return self.resized_size if self.jpeg_draft else None

    def blank(self, num_views: int) -> Tensor:
        """(N, 3, size, size) uint8 of zeros, for a sample's views."""
        return torch.zeros(num_views, 3, self.size, self.size, dtype=torch.uint8)

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if self.resize is None:
            return self.size, self.size
        return size_by_shorter_side(width, height, self.resize)

    def resized(self, image: Image.Image) -> np.ndarray:
        """(1 or 3, H, W) uint8: the part without random numbers, which modules/data/image_cache.py keeps."""
        image = image.resize(self.resized_size(*image.size), Image.Resampling.BILINEAR)
        values = np.array(image)  # (H, W) or (H, W, 3)
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)

    def pixels(self, image: Image.Image | np.ndarray, rng: torch.Generator | None = None) -> Tensor:
        """(3, size, size) uint8 of a PIL image, or of one that is ``resized`` (1 or 3, H, W) already, cropped.

        One channel is repeated three times.
        """
        values = self.resized(image) if isinstance(image, Image.Image) else image
        if self.resize is not None:
            values = self._crop(values, rng)
        return torch.from_numpy(np.array(values, order="C")).expand(3, -1, -1)

    def normalise(self, pixels: Tensor, view_mask: Tensor | None = None) -> Tensor:
        """(..., 3, H, W) uint8 -> float32 = (pixel / 255 - mean) / std; 0 where ``view_mask`` (...) is False."""
        white, mean, std = (_channels(values, pixels.device) for values in ((255.0,), self.mean, self.std))
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(white).sub_(mean).div_(std)
        return scaled if view_mask is None else scaled.masked_fill_(~view_mask[..., None, None, None], 0)

    def _crop(self, values: np.ndarray, rng: torch.Generator) -> np.ndarray:
        height, width = values.shape[1:]
        top = int(torch.randint(height - self.size + 1, (), generator=rng))
        left = int(torch.randint(width - self.size + 1, (), generator=rng))
        mirrored = bool(torch.rand((), generator=rng) < 0.5)
        values = values[:, top : top + self.size, left : left + self.size]
        return values[:, :, ::-1] if mirrored and self.flip else values


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a step of training may use what a test has made
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``values`` as (C, 1, 1), uploaded once: a GPU is waited for.

    Tensors, because a GPU would multiply by the reciprocal of a number, and differ from the CPU in the last bit.
    """
    return torch.tensor(values, device=device).view(-1, 1, 1)


def train_transform(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: int | None = None,
    flip: bool = True,
    jpeg_draft: bool = False,
) -> Transform:
    """Shorter side to ``resize`` (by default size * 256 / 224), random crop, with ``flip`` mirrored half of the times.

    Called as t(image, rng). InputError where the crop is larger than the resized image.
    """
    resize = round(size * RESIZE_PER_CROP) if resize is None else resize
    if size > resize:
        raise InputError(f"image size {size} is larger than the resized image, {resize}; crop at most {resize}")
    return Transform(size, resize, flip, tuple(map(float, mean)), tuple(map(float, std)), jpeg_draft)


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float], *, jpeg_draft: bool = False) -> Transform:
    """Resize to exactly ``size`` x ``size``, whatever the aspect ratio; called as t(image)."""
    return Transform(size, None, False, tuple(map(float, mean)), tuple(map(float, std)), jpeg_draft)


def size_by_shorter_side(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height with ``shorter`` as the shorter side; the longer one is rounded down, as torchvision does."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter
