"""Places the PNG files of Open-i or Kaggle, from an archive or a folder, as images/<study>/<number>.png."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from modules.archives import is_archive, read_files
from modules.errors import InputError
from modules.image_placing import Placing, place_all
from modules.openi import kaggle_name
from modules.records import write_private

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
        print(f"warning: {len(missing)} of {len(targets)} images could not be had; studies that need one of them are "
              f"left out. The first is {image}: {reason}", file=sys.stderr)
    return set(missing)


def _from_folder(source: Path, by_name: dict, placing: Placing, workers: int) -> dict[str, str | None]:
    found = {_name(file): Path(place, file) for place, _, files in os.walk(source) for file in files
             if file.lower().endswith(".png")}
    pairs = [(found[name], target) for name, (_, target) in by_name.items() if name in found]
    images = {target: image for image, target in by_name.values()}
    reasons = {}
    with tqdm(total=len(pairs), desc="images", unit="image") as bar:
        for placed in place_all(placing, pairs, workers):
            reasons |= {images[target]: reason for target, reason in placed}
            bar.update(len(placed))
    return reasons


def _from_archive(source: Path, by_name: dict, placing: Placing, workers: int) -> dict[str, str | None]:
    """One process: the archive must be unpacked from its beginning."""
    reasons: dict[str, str | None] = {}
    with tqdm(total=len(by_name), desc="images", unit="image") as bar:
        for file, read in read_files(source, ".png", MAX_PNG):
            image, target = by_name.get(_name(file), (None, None))
            if image is None or image in reasons:
                continue
            reasons[image] = None
            if not target.is_file() and not placing.resize:
                write_private(target, read())
            elif not target.is_file():
                whole = target.with_name(f".{target.name}.whole")
                write_private(whole, read())
                reasons[image] = placing.place(whole, target)
                whole.unlink()
            bar.update()
    return reasons


def _name(file: str) -> str:
    """Kaggle's name of an image's file, whichever of both collections it is of."""
    return kaggle_name(Path(file).name.split(".")[0])
