"""Training, validation and test split: a published one by study id, or a seeded one that keeps patients together."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from modules.data.annotations import SPLITS, split_of, unique_keys
from modules.data.report_tables import ID_COLUMNS, Table, read_table, read_text
from modules.runtime.errors import InputError

_IDS = (*ID_COLUMNS, "study", "uid")
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
    """Study id -> split, in the file's order, from an annotation.json, a JSON object of id lists, or a table with the
    columns id (or study_id, ...) and split: .csv, .tsv or .txt.

    Only ids are read from an annotation. InputError, which calls the file ``flag``, for any other file, and for one
    that names an id twice.
    """
    try:
        is_table = path.suffix.lower() in (".csv", ".tsv", ".txt")
        pairs = _table_pairs(read_table(path, names=(*_IDS, "split"))) if is_table else _json_pairs(path)
    except InputError as error:
        raise InputError(f"{flag} {error}") from error
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


def _json_pairs(path: Path) -> list[tuple[object, str]]:
    try:
        data = json.loads(read_text(path), object_pairs_hook=unique_keys)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(data.get(split), list) for split in SPLITS):
        raise InputError(f"{path}: expected an object with lists under {', '.join(SPLITS)}")
    return [(item.get("id") if isinstance(item, dict) else item, split) for split in SPLITS for item in data[split]]


def _table_pairs(table: Table) -> list[tuple[object, str]]:
    identity, split = table.find(*_IDS), table.find("split")
    expected = f"{table.path}: expected the columns id and split, and {', '.join(SPLITS)} in the latter"
    if identity is None or split is None:
        raise InputError(f"{expected}; its columns are {', '.join(repr(name[:40]) for name in table.columns[:8])}")
    if wrong := next((row[split] for row in table.rows if split_of(row[split]) is None), None):
        raise InputError(f"{expected}, not {wrong[:40]!r}")
    return [(row[identity].strip(), split_of(row[split]) or "") for row in table.rows]
