"""Files that a command is to write: refused, before the work, where something that it did not make would be lost.

A file that the same program wrote before may be replaced, so that a command can be run again.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modules.runtime.errors import InputError
from modules.runtime.records import write_private

Recognises = Callable[[Path], bool]
_HEAD = 4096  # bytes


class Output(NamedTuple):
    """A file to be written: the flag that names it, its path (None: not asked for), and what may be there already."""

    flag: str
    path: str | Path | None
    kind: str  # as "is there and is no ..." goes on
    recognises: Recognises


def check_outputs(outputs: Iterable[Output], inputs: Iterable[tuple[str, str | Path | None]] = ()) -> None:
    """InputError where an output is one of the ``inputs`` (name, path), another output, or a file of another kind."""
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
            raise InputError(
                f"{flag} {path}: is {taken[identity]} of the same command, which would be lost; name another file"
            )
        taken[identity] = flag
        if not path.exists():
            continue
        if not path.is_file():
            raise InputError(f"{flag} {path}: is no regular file; name another one")
        if path.stat().st_size and not _recognised(recognises, path):  # an empty one holds nothing to be lost
            raise InputError(f"{flag} {path}: is there and is no {kind}; name another file, or move that one away")


def _identity(path: Path) -> Any:
    """The same for all names and links of a file."""
    try:
        found = path.stat()
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _recognised(recognises: Recognises, path: Path) -> bool:
    try:
        return recognises(path)
    except (OSError, ValueError, RecursionError):
        return False


def is_safetensors(form: str) -> Recognises:
    """Recognises safetensors files whose header names a format that begins with ``form``: of any version, damaged
    tensors too. The header is read by hand, as torch and numpy take seconds to come."""

    def recognises(path: Path) -> bool:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return False
            header = json.loads(file.read(length))
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        return isinstance(metadata, dict) and str(metadata.get("format", "")).startswith(form)

    return recognises


def is_json(*keys: str) -> Recognises:
    """Recognises JSON objects that have all of ``keys``."""

    def recognises(path: Path) -> bool:
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and all(key in content for key in keys)

    return recognises


def begins_with(line: str) -> Recognises:
    """Recognises text whose first line is ``line``: a table by its header."""
    start = f"{line}\n".encode()

    def recognises(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(start)) == start

    return recognises


def has_near_its_start(mark: bytes) -> Recognises:
    """Recognises files with ``mark`` in their first 4 KiB, where pages have their title and pictures their maker."""

    def recognises(path: Path) -> bool:
        with open(path, "rb") as file:
            return mark in file.read(_HEAD)

    return recognises


def check_outside(out: Path, inputs: Iterable[tuple[str, str | Path | None]]) -> None:
    """InputError where one of the ``inputs`` (flag, path) lies in ``out``, a folder whose files are written anew."""
    for flag, path in inputs:
        if path and Path(path).resolve().is_relative_to(out.resolve()):
            raise InputError(
                f"{flag} {path}: lies in --out {out}, whose files are drawn over; copy it elsewhere, or "
                "name another --out"
            )


# ---- annotations: somebody's split may be there, which no program can make again

Annotation = Mapping[str, list[dict[str, Any]]]


def check_annotation(path: Path, possible: Annotation, hint: str = "") -> None:
    """InputError where ``path`` has records that are none of the ``possible`` ones, of which images may be missing.

    For a look before the images are placed: records are told by split, id and text.
    """
    there = _read(path)
    if there is not None and not _keeps(there, possible, ("id", "report", "captions")):
        raise _other_content(path, hint)


def write_annotation(path: Path, annotation: Annotation, *, may_grow: bool = False, hint: str = "") -> str:
    """Write ``annotation``; returns "written", or "unchanged" where the file says the same already.

    InputError where it says something else. With ``may_grow`` it may lack records and images that were missing when it
    was made.
    """
    there, new = _read(path), json.loads(json.dumps(annotation))
    if there == new:
        return "unchanged"
    if there is not None and not (may_grow and _keeps(there, new)):
        raise _other_content(path, hint)
    write_private(path, json.dumps(annotation, ensure_ascii=False))
    return "written"


def _other_content(path: Path, hint: str) -> InputError:
    return InputError(
        f"{path}: is there with other content than would be written, and is left as it is; name another "
        f"--out, or move it away{hint}"
    )


def _read(path: Path) -> Any:
    """The JSON in ``path``; None where there is no file or an empty one, "" where it is no JSON."""
    try:
        text = path.read_bytes()
        return json.loads(text) if text else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return ""


def _keeps(old: Any, new: Annotation, fields: tuple[str, ...] = ()) -> bool:
    """Whether ``new`` has every record of ``old`` in its split, with the same ``fields`` (none given: all of them)."""
    try:
        for split, records in old.items():
            known = {str(record["id"]): record for record in new.get(split, ())}
            for record in records:
                other = known[str(record["id"])]
                if not all(_same_or_longer(record[name], other[name]) for name in fields or record if name in record):
                    return False
    except (AttributeError, KeyError, TypeError):  # no annotation, or of other records
        return False
    return True


def _same_or_longer(old: Any, new: Any) -> bool:
    # A study's images: one that was missing may have come.
    longer = isinstance(old, list) and isinstance(new, list) and len(old) < len(new)
    return old == new or (longer and all(entry in new for entry in old))
