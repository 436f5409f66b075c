"""ReXrank's files: a JSON object of studies by id, to which each report is added as ``model_prediction``.

Fields that are read: ``image_path`` (a list, below the image folder), ``key_image_path`` (the frontal image for models
that read one) and ``frontal_lateral`` (Frontal or Lateral for each image). All fields are kept; ``context``, a text
in no fixed form, is not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.inference.study_files import StudyFiles, images_in
from modules.runtime.errors import InputError
from modules.runtime.input_files import read_json

FLAG, PREDICTION = "--rexrank", "model_prediction"
MAX_BYTES = 2**30


def read_rexrank(path: str) -> dict[str, dict[str, Any]]:
    """The studies by id, in the file's order; InputError that names file, study and field of the first mistake."""
    try:
        studies = read_json(path, MAX_BYTES, object_pairs_hook=_unique)
    except OSError as error:
        raise InputError(f"{FLAG} {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{FLAG} {path}: not JSON ({error}); it takes a file of ReXrank") from error
    if not isinstance(studies, dict) or not studies:
        raise InputError(f"{FLAG} {path}: must be a JSON object of studies by id, with at least one")
    for name, study in studies.items():
        if not isinstance(study, dict):
            raise InputError(f"{FLAG} {path}: study {name!r} is not an object with the field image_path")
        _images(path, name, study)
    return studies


def rexrank_files(path: str, studies: Mapping[str, Any], root: str) -> list[StudyFiles]:
    """The images of each study below ``root`` in the order a model reads them.

    The key image is first, then those of the other projection: a model that reads two gets a frontal and a lateral
    one. InputError for a folder that is not there, and for a path that leaves it.
    """
    if not Path(root).is_dir():
        raise InputError(f"{FLAG}: the folder of images {root} is not there")
    found = []
    for name, study in studies.items():
        images, key = _images(path, name, study)
        sides = study.get("frontal_lateral")
        side = dict(zip(images, map(str, sides), strict=True)) if _fits(sides, images) else {}
        others = [image for image in images if image != key]
        same = [image for image in others if side.get(image) == side.get(key)]
        ordered = [key, *(image for image in others if image not in same), *same]
        places = images_in(root, [image.lstrip("/") for image in ordered], f"{FLAG} {path}: study {name!r}")
        found.append(StudyFiles(name, places))
    return found


def _images(path: str, name: str, study: Mapping[str, Any]) -> tuple[list[str], str]:
    """A study's images, and its key image: without one the first frontal image, else the first."""
    images = study.get("image_path")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) and image for image in images):
        raise InputError(f"{FLAG} {path}: study {name!r}: image_path must be a list of at least one path")
    key, sides = study.get("key_image_path"), study.get("frontal_lateral")
    if key is None:
        at = sides.index("Frontal") if _fits(sides, images) and "Frontal" in sides else 0
        return images, images[at]
    if not isinstance(key, str) or not key:
        raise InputError(f"{FLAG} {path}: study {name!r}: key_image_path must be a path")
    return images, key


def _fits(sides: Any, images: list[str]) -> bool:
    return isinstance(sides, list) and len(sides) == len(images)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice in one object")
    return found
