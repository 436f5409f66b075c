"""From attenuation to a greyscale film: exposure, grain, burned-in marker and the word SYNTHETIC."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from scripts.synthetic.scene import Scene


def develop(scene: Scene, rng: np.random.Generator, marker: str) -> np.ndarray:
    """(size, size) uint8 image of a finished scene, bone white; ``marker`` is "R", "L" or ""."""
    patient, size = scene.patient, scene.canvas.size
    grain = rng.standard_normal((size, size), dtype=np.float32)
    exposure = patient.gain * scene.density + 0.02 * scene.canvas.clouds(rng, 2)
    level = 0.52 + patient.contrast * (exposure - 0.52)
    level = level - 0.16 * np.clip(level - 0.72, 0, None) ** 1.0 * 2  # shoulder of the film curve
    level = np.clip(level, 0, None) * 0.92 + patient.noise * grain
    image = Image.fromarray((255 * np.clip(level, 0.012, 1)).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(patient.blur * size))
    _burn_in(image, rng, marker)
    return np.asarray(image)


def _burn_in(image: Image.Image, rng: np.random.Generator, marker: str) -> None:
    draw, size = ImageDraw.Draw(image), image.width
    dx, dy = rng.uniform(0, 0.03, 2)
    if marker:
        x = 0.045 + dx if marker == "R" else 0.90 - dx
        draw.text((x * size, (0.03 + dy) * size), marker, fill=235, font=_font(round(size * 0.062)))
    draw.text((0.015 * size, 0.962 * size), "SYNTHETIC", fill=150, font=_font(max(6, round(size * 0.031))))


@lru_cache
def _font(size: int):
    return ImageFont.load_default(size)
