"""COCO's caption files and Karpathy's split; only the fields that captioning needs are kept in memory."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_json

# Karpathy's "restval" are the images of COCO's validation set that he left for training.
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_FILE_NAME = re.compile(r"captions_((?:train|val)\d{4})\.json")


def read_captions(path: Path) -> dict[int, tuple[str, list[str]]]:
    """Image id -> (image path such as train2014/COCO_train2014_000000000009.jpg, captions in the order of their ids).

    ``path`` is one of the official files: its name says which folder the images are in. Empty captions are left out.
    InputError for any other file.
    """
    named = _FILE_NAME.fullmatch(path.name)
    if not named:
        raise InputError(
            f"--captions {path}: keep its published name, such as captions_train2014.json: it says which folder the "
            "images are in"
        )

    def slim(item: dict[str, Any]) -> Any:
        if "caption" in item:
            return item.get("image_id"), item.get("id"), item["caption"]
        return (item.get("id"), item["file_name"]) if "file_name" in item else item

    data = _read_json(path, "--captions", slim)
    if not (isinstance(data, dict) and all(isinstance(data.get(part), list) for part in ("images", "annotations"))):
        raise InputError(
            f"--captions {path}: not a caption file of COCO; it needs the lists 'images' and 'annotations'"
        )
    found: dict[int, list[tuple[int, str]]] = {}
    for row, item in enumerate(data["annotations"]):
        if not (
            isinstance(item, tuple)
            and isinstance(item[0], int)
            and isinstance(item[1], int)
            and isinstance(item[2], str)
        ):
            raise InputError(
                f"--captions {path}: annotation {row} lacks image_id, id or caption; files of "
                "instances and keypoints have none"
            )
        if item[2].strip():
            found.setdefault(item[0], []).append((item[1], item[2].strip()))
    images = {}
    for row, item in enumerate(data["images"]):
        if not (isinstance(item, tuple) and isinstance(item[0], int) and isinstance(item[1], str)):
            raise InputError(f"--captions {path}: image {row} lacks id or file_name")
        image, name = item
        images[image] = (f"{named[1]}/{name}", [text for _, text in sorted(found.get(image, []))])
    return images


def read_karpathy(path: Path) -> dict[str, list[int]]:
    """Split -> image ids in the file's order, from dataset_coco.json; InputError for any other file."""

    def slim(item: dict[str, Any]) -> Any:
        return (item["cocoid"], item.get("split")) if "cocoid" in item else item if "images" in item else None

    data = _read_json(path, "--karpathy", slim)
    if not (isinstance(data, dict) and isinstance(data.get("images"), list)):
        raise InputError(f"--karpathy {path}: not Karpathy's dataset_coco.json; it needs a list 'images'")
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    seen: set[int] = set()
    for row, item in enumerate(data["images"]):
        if not (isinstance(item, tuple) and isinstance(item[0], int) and item[1] in tuple(KARPATHY)):
            raise InputError(
                f"--karpathy {path}: image {row} needs a cocoid, and a split of {', '.join(KARPATHY)}; "
                "dataset_flickr8k.json and dataset_flickr30k.json are other data sets"
            )
        if item[0] in seen:
            raise InputError(f"--karpathy {path}: image {item[0]} is listed twice")
        seen.add(item[0])
        splits[KARPATHY[item[1]]].append(item[0])
    return splits


def _read_json(path: Path, flag: str, slim: Callable[[dict[str, Any]], Any]) -> Any:
    """The file's content; each object is replaced by what ``slim`` keeps of it as soon as it has been parsed."""
    try:
        return read_json(path, MAX_ANNOTATION, object_hook=slim)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{flag} {path}: not valid JSON: {str(error)[:100]}") from error
