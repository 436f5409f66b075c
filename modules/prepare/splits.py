"""Training, validation and test split: a published one by study id, or a seeded one that keeps patients together."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from modules.data.annotations import SPLITS
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_text

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # R2Gen's, on IU X-Ray


def seeded_split(patients: Sequence[str], seed: int) -> list[str]:
    """The split of each record, given its patient: 7:1:2 of the records, all records of a patient in the same split.

    Patients are ordered by a hash of seed and patient, so the result depends neither on the records' order nor on
    Python's version.
    """
    counts: dict[str, int] = {}
    for patient in patients:
        counts[patient] = counts.get(patient, 0) + 1
    order = sorted(counts, key=lambda patient: hashlib.sha256(f"{seed} {patient}".encode()).digest())
    chosen, placed = {}, 0
    for patient in order:
        # The middle of a patient's records decides, so that the shares hold to half a patient.
        share = (placed + counts[patient] / 2) / len(patients)
        placed += counts[patient]
        if share < SHARES["train"]:
            chosen[patient] = "train"
        else:
            chosen[patient] = "val" if share < SHARES["train"] + SHARES["val"] else "test"
    return [chosen[patient] for patient in patients]


def read_split(path: Path, flag: str = "--split") -> dict[str, str]:
    """Study id -> split, in the file's order, from an annotation.json, a JSON object of id lists, or a CSV (id, split).

    Only ids are read from an annotation. InputError, which calls the file ``flag``, for any other file, and for one
    that names an id twice.
    """
    try:
        text = read_text(path, MAX_ANNOTATION)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read: {error}") from error
    pairs = _csv_pairs(path, text, flag) if path.suffix.lower() == ".csv" else _json_pairs(path, text, flag)
    found: dict[str, str] = {}
    for given, split in pairs:
        identity = str(given) if type(given) is int else given
        if not isinstance(identity, str) or not identity:
            raise InputError(f"{flag} {path}: split '{split}' has an entry without an id")
        if identity in found:
            raise InputError(f"{flag} {path}: id {identity[:80]!r} is listed twice")
        found[identity] = split
    if not found:
        raise InputError(f"{flag} {path}: names no study")
    return found


def _json_pairs(path: Path, text: str, flag: str) -> list[tuple[object, str]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path}: not valid JSON: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(split), list) for split in SPLITS):
        raise InputError(f"{flag} {path}: expected an object with lists under {', '.join(SPLITS)}")
    return [(item.get("id") if isinstance(item, dict) else item, split) for split in SPLITS for item in data[split]]


def _csv_pairs(path: Path, text: str, flag: str) -> list[tuple[object, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(f"{flag} {path}: cannot be read as CSV: {error}") from error
    pairs = [(row.get("id"), row.get("split")) for row in rows]
    wrong = next((split for _, split in pairs if split not in SPLITS), None)
    if not rows or wrong is not None or any(split is None for _, split in pairs):
        raise InputError(
            f"{flag} {path}: expected the columns id and split, and {', '.join(SPLITS)} in the latter"
            + (f", not {wrong[:40]!r}" if wrong is not None else "")
        )
    return pairs
