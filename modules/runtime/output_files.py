"""Files that a command will write: before the work, refuse whatever would destroy something it did not write itself.

A file written by an earlier run of the same program may be replaced, so that a command can be repeated.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, open_regular, read_bytes
from modules.runtime.records import write_private

Recognises = Callable[[Path], bool]


class Output(NamedTuple):
    """A file to write: the flag that names it, its path (None: not requested), and what an existing file must be."""

    flag: str
    path: str | Path | None
    kind: str  # completes "already exists and is not ..."
    recognises: Recognises


def contains(*marks: str) -> Recognises:
    """Recognises a file by text that the program writes into it, such as the name of its format or its keys."""

    def recognises(path: Path) -> bool:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(mark.encode()) >= 0 for mark in marks)

    return recognises


def check_outputs(outputs: Iterable[Output], inputs: Iterable[tuple[str, str | Path | None]] = ()) -> None:
    """Raise InputError for an output that is one of the ``inputs`` (name, path), another output, or a foreign file."""
    taken: dict[Any, str] = {}
    for name, path in inputs:
        if path:
            taken.setdefault(_identity(Path(path)), name)
    for flag, given, kind, recognises in outputs:
        if not given:
            continue
        path = Path(given)
        if path.is_dir():
            raise InputError(f"{flag} {path}: is a folder; name a file")
        identity = _identity(path)
        if identity in taken:
            raise InputError(f"{flag} {path}: is also {taken[identity]} of this command; name another file")
        taken[identity] = flag
        if not path.exists():
            continue
        if not path.is_file():
            raise InputError(f"{flag} {path}: is not a regular file; name another one")
        if path.stat().st_size and not _recognised(recognises, path):  # an empty one holds nothing
            raise InputError(f"{flag} {path}: already exists and is not {kind}; name another file, or move it away")


def _identity(path: Path) -> Any:
    """The same value for every name and link of a file."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _recognised(recognises: Recognises, path: Path) -> bool:
    try:
        return recognises(path)
    except (OSError, ValueError, LookupError, TypeError):  # JSON of another shape, too
        return False


def check_outside(out: Path, inputs: Iterable[tuple[str, str | Path | None]]) -> None:
    """Raise InputError if one of the ``inputs`` (flag, path) is inside ``out``, a folder that will be overwritten."""
    for flag, path in inputs:
        if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise InputError(
                f"{flag} {path}: is inside --out {out}, which will be overwritten; copy it elsewhere, or name "
                "another --out"
            )


# ---- annotations, which may hold somebody's own split

Annotation = Mapping[str, list[dict[str, Any]]]
_IMAGES = ("image_path", "view")  # grow when an image that was missing has been found
_DERIVED = ("prior",)  # depends on which other records are there


def check_annotation(path: Path, annotation: Annotation, hint: str = "") -> None:
    """Raise InputError if ``path`` exists and ``annotation`` lacks or changes one of its records.

    Image paths are not compared: this is for a check before the images are placed.
    """
    _check_kept(path, _read(path), annotation, (*_IMAGES, *_DERIVED), hint)


def write_annotation(path: Path, annotation: Annotation, hint: str = "") -> str:
    """Write ``annotation`` and return "written", or "unchanged" if the file already says the same.

    Raises InputError if an existing file has records that ``annotation`` lacks or changes.
    """
    existing, new = _read(path), json.loads(json.dumps(annotation))
    if existing == new:
        return "unchanged"
    _check_kept(path, existing, new, _DERIVED, hint)
    write_private(path, json.dumps(annotation, ensure_ascii=False))
    return "written"


def _read(path: Path) -> Any:
    """The JSON in ``path``; None if there is no file or an empty one, "" if it is not JSON."""
    try:
        text = read_bytes(path, MAX_ANNOTATION)
        return json.loads(text) if text else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return ""


def _check_kept(path: Path, old: Any, new: Annotation, ignored: tuple[str, ...], hint: str) -> None:
    if old is not None and not _keeps(old, new, ignored):
        raise InputError(
            f"{path}: already exists with other content, and is left unchanged; name another --out, or move it "
            f"away{hint}"
        )


def _begins_alike(old: Any, new: Any) -> bool:
    """Whether the images of the record ``old`` are those of ``new``, of which there may be more, in the same order and
    with the same views.
    """
    pairs = [
        list(zip_longest(record["image_path"], record.get("view", ()))) if "view" in old else record["image_path"]
        for record in (old, new)
    ]
    later = iter(pairs[1])
    return all(pair in later for pair in pairs[0])


def _keeps(old: Any, new: Annotation, ignored: tuple[str, ...]) -> bool:
    """Whether ``new`` has every record of ``old`` in its split: unchanged, or with more images."""
    try:
        for split, records in old.items():
            known = {record["id"]: record for record in new.get(split, ())}
            for record in records:
                other = known[record["id"]]
                for name in record.keys() - set(ignored):
                    more = name in _IMAGES and _begins_alike(record, other)
                    if record[name] != other[name] and not more:
                        return False
    except (AttributeError, KeyError, TypeError):  # not an annotation, or one with other records
        return False
    return True
