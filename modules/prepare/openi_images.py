"""Places the PNG files of Open-i or Kaggle, from an archive or a folder, as images/<study>/<number>.png."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from modules.prepare.archives import is_archive, read_files
from modules.prepare.image_placing import Placing, place_all
from modules.prepare.openi import kaggle_name
from modules.runtime.errors import InputError
from modules.runtime.records import write_private
from modules.runtime.run_log import Bar

MAX_PNG = 128 * 2**20  # bytes; the collection's largest have some ten million


def place_openi_images(source: Path, targets: Mapping[str, Path], placing: Placing, workers: int) -> set[str]:
    """Bring every image to its target (image name without ending -> path); returns the names that could not be.

    A warning says how many, and why the first. InputError where ``source`` holds none of the images.
    """
    by_name = {kaggle_name(image): (image, target) for image, target in targets.items()}
    place = _from_archive if is_archive(source) else _from_folder
    reasons = dict.fromkeys(targets, f"not in {source}")
    reasons |= place(source, by_name, placing, workers)
    missing = {image: reason for image, reason in reasons.items() if reason is not None}
    if missing:
        image, reason = next(iter(missing.items()))
        if len(missing) == len(targets):
            raise InputError(f"--images: none of the {len(targets)} images could be had; {image}.png: {reason}")
        print(
            f"warning: {len(missing)} of {len(targets)} images could not be had; studies that need one of them are "
            f"left out. The first is {image}: {reason}",
            file=sys.stderr,
        )
    return set(missing)


def _from_folder(source: Path, by_name: dict, placing: Placing, workers: int) -> dict[str, str | None]:
    found = {
        _name(file): Path(place, file)
        for place, _, files in os.walk(source)
        for file in files
        if file.lower().endswith(".png")
    }
    pairs = [(found[name], target) for name, (_, target) in by_name.items() if name in found]
    images = {target: image for image, target in by_name.values()}
    bar = Bar(place_all(placing, pairs, workers), "images", total=len(pairs))
    return {images[target]: reason for target, reason in bar}


def _from_archive(source: Path, by_name: dict, placing: Placing, workers: int) -> dict[str, str | None]:
    """In one process: an archive can be unpacked from its beginning only."""
    return dict(Bar(_unpack(source, by_name, placing), "images", total=len(by_name)))


def _unpack(source: Path, by_name: dict, placing: Placing) -> Iterator[tuple[str, str | None]]:
    done = set()
    for file, read in read_files(source, ".png", MAX_PNG):
        image, target = by_name.get(_name(file), (None, None))
        if image is None or image in done:
            continue
        done.add(image)
        reason = None
        if not target.is_file() and not placing.resize:
            write_private(target, read())
        elif not target.is_file():
            whole = target.with_name(f".{target.name}.whole")
            write_private(whole, read())
            reason = placing.place(whole, target)
            whole.unlink()
        yield image, reason


def _name(file: str) -> str:
    """Kaggle's name of an image's file, whichever of both collections it is of."""
    return kaggle_name(Path(file).name.split(".")[0])
