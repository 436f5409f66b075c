"""A small drawing board: masks of polygons, strokes and blobs in body coordinates, as float32 arrays.

Body coordinates: x from -0.5 to 0.5 (0 = midline of the image), y from 0 (top) to 1 (bottom). A tilt, scale and
shift carry them to pixels, so that a rotated or larger patient needs no other drawing code.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 2
THUMBNAIL, WIDE = 4, 5.0  # blurs of more than WIDE pixels work on an image so many times smaller
SHARPEST = 0.4  # blurs of fewer pixels are left out: the supersampling does as much


def smooth_curve(points, samples: int = 12, closed: bool = False) -> np.ndarray:
    """Catmull-Rom curve through ``points`` (N, 2), ``samples`` points per span, as an (M, 2) array."""
    points = np.asarray(points, dtype=np.float64)
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t, t2, t3 = _powers(samples)
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None, :] for i in range(4))  # (spans, 1, 2) each
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t2 + (3 * p1 - p0 - 3 * p2 + p3) * t3)
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


@cache
def _powers(samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, its square and its cube, (1, samples, 1) each, for t from 0 towards 1."""
    t = np.linspace(0, 1, samples, endpoint=False)[None, :, None]
    return t, t**2, t**3


def _ribbon(points: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Polygons (..., 2M, 2) of lines along ``points`` (..., M, 2); ``width`` (..., M)."""
    along = np.empty_like(points)
    along[..., 1:-1, :] = points[..., 2:, :] - points[..., :-2, :]
    along[..., 0, :] = points[..., 1, :] - points[..., 0, :]
    along[..., -1, :] = points[..., -1, :] - points[..., -2, :]
    length = np.maximum(np.hypot(along[..., 0], along[..., 1]), 1e-9)  # points may coincide
    offset = (0.5 * width / length)[..., None] * along[..., ::-1] * (-1, 1)
    return np.concatenate([points + offset, (points - offset)[..., ::-1, :]], axis=-2)


class Canvas:
    """Rasterises shapes given in body coordinates to (size, size) float32 masks between 0 and 1."""

    def __init__(self, size: int, tilt: float = 0.0, scale: float = 1.0, shift=(0.0, 0.0)):
        """``tilt`` in radians, ``scale`` of the body about the image centre, ``shift`` in image widths."""
        self.size = size
        self.scale = scale
        cos, sin = np.cos(tilt), np.sin(tilt)
        self._forward = scale * np.array([[cos, -sin], [sin, cos]])
        self._shift = np.asarray(shift, dtype=np.float64)
        pixel = (np.arange(size) + 0.5) / size
        image = np.stack(np.meshgrid(pixel - 0.5, pixel - 0.5), axis=-1) - self._shift
        body = image @ np.linalg.inv(self._forward).T
        self.x = body[..., 0].astype(np.float32)  # (size, size)
        self.y = (body[..., 1] + 0.5).astype(np.float32)

    def _pixels(self, points) -> list[list[float]]:
        """Supersampled pixel coordinates of polygons (..., M, 2), each as [x0, y0, x1, ...]."""
        centred = np.asarray(points, dtype=np.float64) - (0.0, 0.5)
        image = centred @ self._forward.T + self._shift + 0.5
        return (image * self.size * SUPERSAMPLING).reshape(-1, 2 * image.shape[-2]).tolist()

    def _finish(self, image: Image.Image, blur: float) -> np.ndarray:
        image = image.reduce(SUPERSAMPLING)
        sigma = blur * self.size * self.scale
        if sigma >= WIDE:
            thumbnail = image.reduce(THUMBNAIL).filter(ImageFilter.GaussianBlur(sigma / THUMBNAIL))
            image = thumbnail.resize(image.size, Image.Resampling.BICUBIC)
        elif sigma >= 2:
            image = image.filter(ImageFilter.GaussianBlur(sigma))
        elif sigma >= SHARPEST:  # a box of the same variance costs a third
            image = image.filter(ImageFilter.BoxBlur((math.sqrt(12 * sigma**2 + 1) - 1) / 2))
        return np.asarray(image, dtype=np.float32) / 255

    def _blank(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("L", (self.size * SUPERSAMPLING,) * 2)
        return image, ImageDraw.Draw(image)

    def fill(self, *polygons, blur: float = 0.0) -> np.ndarray:
        """Mask of the union of ``polygons`` ((M, 2) each); ``blur`` is a Gaussian sigma in body units."""
        image, draw = self._blank()
        for polygon in polygons:
            draw.polygon(*self._pixels(polygon), fill=255)
        return self._finish(image, blur)

    def _ribbons(self, points: Sequence[np.ndarray], widths: Sequence) -> list[list[list[float]]]:
        """Each stroke's polygons in pixels. Strokes of one shape are computed together: numpy's calls cost the most."""
        thinnest = 1 / (self.size * SUPERSAMPLING * self.scale)
        of_shape = defaultdict(list)
        for index, stroke in enumerate(points):
            of_shape[stroke.shape].append(index)
        found: list = [None] * len(points)
        for shape, rows in of_shape.items():
            width = np.empty((len(rows), *shape[:-1]))
            for row, index in enumerate(rows):
                width[row] = widths[index]
            ribbons = _ribbon(np.stack([points[index] for index in rows]), np.maximum(width, thinnest))
            polygons, each = self._pixels(ribbons), math.prod(shape[:-2])
            for row, index in enumerate(rows):
                found[index] = polygons[row * each : (row + 1) * each]
        return found

    def strokes(self, strokes, blur: float = 0.0) -> np.ndarray:
        """Mask of ribbons along polylines, later ones on top; ``strokes`` are (points (..., M, 2), width, value 0..1).

        Width is in body units, one number or one per point; a ribbon is never thinner than one supersampled pixel.
        """
        image, draw = self._blank()
        points, widths, values = zip(*strokes, strict=True)
        ribbons = self._ribbons([np.asarray(line, dtype=np.float64) for line in points], widths)
        for polygons, value in zip(ribbons, values, strict=True):
            for polygon in polygons:
                draw.polygon(polygon, fill=round(255 * value))
        return self._finish(image, blur)

    def blob(self, centre, radii, angle: float = 0.0) -> np.ndarray:
        """Gaussian spot with standard deviations ``radii`` along its axes, turned by ``angle`` radians."""
        return np.exp(-0.5 * self._distance_squared(centre, radii, angle))

    def disc(self, centre, radii, angle: float = 0.0, edge: float = 0.15) -> np.ndarray:
        """Ellipse of half-axes ``radii`` with an edge whose width is the share ``edge`` of its radius."""
        radius = np.sqrt(self._distance_squared(centre, radii, angle))
        return np.clip((1 - radius) / edge + 0.5, 0, 1)

    def _distance_squared(self, centre, radii, angle: float) -> np.ndarray:
        dx, dy = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return ((cos * dx + sin * dy) / np.float32(radii[0])) ** 2 + ((cos * dy - sin * dx) / np.float32(radii[1])) ** 2

    def clouds(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Smooth noise with about ``cells`` bumps across the image, mean 0 and standard deviation about 1."""
        grid = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
        image = Image.fromarray(grid).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(image) * np.float32(1.4)
