"""How fast one core reads a user's images, and what to do where that is too slow for a GPU."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from modules.data.images import ImageFolder
from modules.data.transforms import Transform
from modules.runtime.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".tif", ".tiff", ".bmp", ".webp")
LOOKED_AT = 2000  # files of a folder, of which some are read: it may hold hundreds of thousands
SECONDS = 5.0  # for one way of reading


@dataclass(frozen=True)
class ReadingSpeed:
    """Images per second of one core, in processor time: what the disk takes comes on top."""

    images: int
    width: int  # medians
    height: int
    decoded: float
    drafts: float | None  # with --jpeg_draft; None: it would change nothing
    cached: float  # with --image_cache

    def rates(self) -> dict[str, float]:
        """Images per second and core by the way of reading."""
        found = {"decoded in full": self.decoded, "--jpeg_draft": self.drafts, "--image_cache": self.cached}
        return {how: rate for how, rate in found.items() if rate is not None}


def some_images(folder: str, count: int) -> list[str]:
    """Paths, below ``folder``, of at most ``count`` of its images, spread over the first LOOKED_AT files."""
    found = (
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    )
    paths = list(itertools.islice(found, LOOKED_AT))
    return [paths[turn * len(paths) // count] for turn in range(count)] if len(paths) > count else paths


def reading_speed(images: ImageFolder, paths: Sequence[str], transform: Transform) -> ReadingSpeed:
    """The speed at which the images at ``paths`` become the bytes that ``transform`` makes of them.

    Unreadable ones are left out; InputError where all are.
    """
    sizes, drafted, resized = [], [], []
    draft = ImageFolder(images.root, images.max_pixels, images.follow_links, transform.resized_size)
    for path in paths:
        try:
            image = images(path)
        except InputError:
            continue
        sizes.append((path, *image.size))
        drafted.append(draft(path).size != image.size)
        resized.append(transform.resized(image))
    if not sizes:
        raise InputError(f"none of {len(paths)} images in {images.root} could be read")
    readable = [path for path, *_ in sizes]
    rng = torch.Generator().manual_seed(0)

    def rate(read: Callable[[int], Image.Image]) -> float:
        started, ends = time.process_time(), time.monotonic() + SECONDS
        for done in itertools.count(1):
            transform.pixels(read((done - 1) % len(readable)), rng)
            if done >= len(readable) and (done >= 3 * len(readable) or time.monotonic() > ends):
                return done / max(time.process_time() - started, 1e-9)
        raise AssertionError

    return ReadingSpeed(
        images=len(readable),
        width=int(statistics.median(width for _, width, _ in sizes)),
        height=int(statistics.median(height for *_, height in sizes)),
        decoded=rate(lambda turn: images(readable[turn])),
        drafts=rate(lambda turn: draft(readable[turn])) if any(drafted) else None,
        cached=rate(lambda turn: resized[turn]),
    )


def advice(speed: ReadingSpeed, workers: int, needed: float | None) -> tuple[bool, str]:
    """Whether ``workers`` processes read fast enough for a GPU that takes ``needed`` images per second (None: unknown).

    And the figures, with the flag that would help where they do not.
    """
    rates = ", ".join(f"{rate:,.0f} {how}" for how, rate in speed.rates().items())
    text = f"images of {speed.width} x {speed.height} per second and core: {rates}"
    have = workers * speed.decoded
    if needed is None:
        return True, f"{text}; {workers} processes read {have:,.0f} (what GPUs take: docs/TRAINING.md)"
    text += f"; the GPU takes {needed:,.0f} a second, {workers} processes (--num_workers auto) read {have:,.0f}"
    if have >= needed:
        return True, text
    if speed.drafts is not None and workers * speed.drafts >= needed:
        other = "--image_cache FOLDER, or --jpeg_draft true, whose pixels differ slightly"
    elif workers * speed.cached >= needed:
        other = "--image_cache FOLDER, which decodes each image once"
    else:
        other = "--image_cache FOLDER and more cores"
    return False, f"{text}: reading would limit the GPU; give {other}"
