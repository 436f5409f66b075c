"""Values of any depth as 8-bit grey values, some rows at a time so that temporary copies stay small."""

from collections.abc import Callable

import numpy as np

DETECTOR_BITS = (8, 10, 12, 14, 16, 32)
BYTES_PER_PIXEL = 3  # decoded, of an image of max_pixels; smaller ones may have deeper pixels
_BLOCK = 2**20  # values converted at a time


def full_scale(highest: int) -> int:
    """The highest value of the smallest detector depth that holds ``highest``: 4095 for 3000.

    Files often declare 16 bits and hold 12; their own highest value says what white is, within a factor of four.
    """
    return next(2**bits - 1 for bits in DETECTOR_BITS if highest < 2**bits)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Unsigned integers of any shape and depth as uint8 of that shape: value * 255 / ``full_scale``, rounded."""
    if values.dtype == np.uint8:
        return values
    top = full_scale(int(values.max()))
    if top > 65535:
        return by_rows(lambda rows: np.rint(rows * (255 / top)).astype(np.uint8), values)
    table = np.rint(np.linspace(0, 255, top + 1)).astype(np.uint8)
    return by_rows(lambda rows: table[rows], values)


def by_rows(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """``function`` of ``values`` (H, ...), which treats rows alike, called for some rows at a time."""
    step = max(1, _BLOCK * len(values) // max(values.size, 1))
    return np.concatenate([function(values[start : start + step]) for start in range(0, len(values), step)])
