"""What the drawing functions pass on, and the vessel tree that both views grow."""

from dataclasses import dataclass

import numpy as np

from scripts.synthetic.anatomy import Anatomy
from scripts.synthetic.canvas import Canvas


@dataclass
class Scene:
    """A view being drawn; lesions add to ``density`` and read the masks."""

    canvas: Canvas
    patient: Anatomy
    density: np.ndarray  # (size, size) float32
    lungs: dict[int, np.ndarray]  # side (-1 right, 1 left) -> mask (size, size), weak where the heart covers it
    vessels: np.ndarray  # (size, size) what was added for vessels, to be removed where a lung has collapsed


def grow_vessels(
    rng: np.random.Generator,
    starts: np.ndarray,
    angles: np.ndarray,
    lengths: np.ndarray,
    sides: np.ndarray,
    width: float,
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Strokes, thinnest first, of N tapering vessels (starts (N, 2), the rest (N,)) and two orders of branches.

    Angles are counted from outwards (``sides`` -1 or 1), positive = down.
    """
    orders = []
    for depth in range(3):
        turns = angles[:, None] + rng.normal(0, 0.14, len(angles))[:, None] * np.arange(4)  # (N, 4)
        steps = (lengths / 4)[:, None, None] * np.stack([sides[:, None] * np.cos(turns), np.sin(turns)], axis=-1)
        points = starts[:, None, :] + np.concatenate([np.zeros((len(angles), 1, 2)), np.cumsum(steps, axis=1)], axis=1)
        orders.append((points, width * np.linspace(1, 0.3, 5), 0.9 - 0.28 * depth))  # points (N, 5, 2)
        parent = np.repeat(np.arange(len(angles)), 3)  # three branches each
        turn = rng.choice((-1, 1), len(parent)) * rng.uniform(0.35, 0.8, len(parent))
        starts, angles = points[parent, rng.integers(1, 4, len(parent))], angles[parent] + turn
        lengths, sides, width = 0.5 * lengths[parent], sides[parent], 0.62 * width
    return orders[::-1]
