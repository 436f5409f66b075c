"""From attenuation to a greyscale film: exposure, grain, burned-in marker and the word SYNTHETIC."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from scripts.synthetic.scene import Scene

# Left and upper edge of the identification plate, by department, as shares of the image: where its films have it.
_PLATES = ((0.02, 0.16), (0.80, 0.16), (0.02, 0.84), (0.80, 0.84), (0.41, 0.01), (0.41, 0.88))
_PLATE_WIDTH, _PLATE_HEIGHT = 0.18, 0.09


def develop(scene: Scene, rng: np.random.Generator, marker: str, department: int | None = None) -> np.ndarray:
    """(size, size) uint8 image of a finished scene, bone white; ``marker`` is "R", "L" or "".

    Films of a ``department`` have the unexposed field of its identification plate, without a name on it.
    """
    patient, size = scene.patient, scene.canvas.size
    grain = rng.standard_normal((size, size), dtype=np.float32)
    exposure = patient.gain * scene.density + 0.02 * scene.canvas.clouds(rng, 2)
    level = 0.52 + patient.contrast * (exposure - 0.52)
    level = level - 0.16 * np.clip(level - 0.72, 0, None) ** 1.0 * 2  # shoulder of the film curve
    level = np.clip(level, 0, None) * 0.92 + patient.noise * grain
    image = Image.fromarray((255 * np.clip(level, 0.012, 1)).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(patient.blur * size))
    _burn_in(image, rng, marker)
    if department is not None:
        _expose_plate(image, rng, department)
    return np.asarray(image)


def _burn_in(image: Image.Image, rng: np.random.Generator, marker: str) -> None:
    draw, size = ImageDraw.Draw(image), image.width
    dx, dy = rng.uniform(0, 0.03, 2)
    if marker:
        x = 0.045 + dx if marker == "R" else 0.90 - dx
        draw.text((x * size, (0.03 + dy) * size), marker, fill=235, font=_font(round(size * 0.062)))
    draw.text((0.015 * size, 0.962 * size), "SYNTHETIC", fill=150, font=_font(max(6, round(size * 0.031))))


def _expose_plate(image: Image.Image, rng: np.random.Generator, department: int) -> None:
    size, (x, y) = image.width, _PLATES[department % len(_PLATES)]
    x, y = x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.015, 0.015)
    corners = [round(size * value) for value in (x, y, x + _PLATE_WIDTH, y + _PLATE_HEIGHT)]
    ImageDraw.Draw(image).rectangle(corners, fill=int(rng.integers(215, 245)), outline=20)


@lru_cache
def _font(size: int):
    return ImageFont.load_default(size)
