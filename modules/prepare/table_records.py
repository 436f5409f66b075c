"""Rows of a user's table as the records of an annotation: studies, splits that keep patients whole, priors."""

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import tokenize
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from modules.data.annotations import SPLIT_WORDS, SPLITS, split_of
from modules.prepare.priors import add_priors, moments
from modules.prepare.splits import SHARES, seeded_split
from modules.prepare.table_columns import Columns, texts
from modules.prepare.user_tables import FILE_SPLIT, Row
from modules.runtime.errors import InputError

VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
PICTURES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".webp", ".gif")


_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|[A-Za-z]:/")  # https://..., C:/...


@dataclass
class Record:
    """One study, or one image of it."""

    id: str
    study: str
    patient: str
    split: str
    report: str = ""
    captions: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    views: list[str] = field(default_factory=list)
    date: str = ""
    sections: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """Whose records must stay in one split: the patient's, or else the study's."""
        return self.patient or self.study or self.id

    def as_json(self) -> dict[str, Any]:
        """The record of an annotation, without what is not known."""
        known: dict[str, Any] = {"id": self.id}
        known |= {"study_id": self.study} if self.study and self.study != self.id else {}
        known |= {"subject_id": self.patient} if self.patient else {}
        known |= {"captions": self.captions} if self.captions else {"report": self.report}
        known |= {"split": self.split, "image_path": self.images}
        known |= {"view": self.views} if any(self.views) else {}
        known |= {"sections": self.sections} if self.sections else {}
        return known | self.extra


def read_records(
    rows: Sequence[Row], columns: Columns, *, by_image: bool, images: Path | None, reports: bool = True
) -> "Read":
    """The records of ``rows``: rows of one study are one record, or with ``by_image`` each image is one.

    ``images`` is the folder that paths start from; without ``reports`` records need none. InputError for a volume, a
    path outside the folder, and rows of one id that are two records.
    """
    found: dict[str, Record] = {}
    counts: Counter[str] = Counter()
    taken: dict[str, Record] = {}  # with ``by_image``, by image
    patients: dict[str, dict[str, None]] = {}  # by study
    for number, row in enumerate(rows, start=1):
        record = _record(row, columns, images)
        if record.study and record.patient:
            patients.setdefault(record.study, {})[record.patient] = None
        if not record.id and record.images:
            record.id = _id_of_image(record.images[0], found)
        if by_image:
            if _is_whole(record, counts, "rows", reports):
                _add_images(found, taken, record, counts)
        elif not (key := record.study or record.id):
            counts["rows without an id or an image"] += 1
        elif (known := found.setdefault(key, record)) is not record:
            _join(known, record, number, counts)
    if not by_image:
        for key, record in found.items():
            record.id = key
    for record in found.values():
        if not record.patient and record.study in patients:
            record.patient = _only_patient(record.study, list(patients[record.study]))
    kept = [record for record in found.values() if by_image or _is_whole(record, counts, "studies", reports)]
    return Read(kept, counts)


def _only_patient(study: str, patients: Sequence[str]) -> str:
    if len(patients) > 1:
        raise InputError(
            f"study {study!r}: its rows name the patients {patients[0]!r} and {patients[1]!r}, and one row names none; "
            "name the patient in each of them"
        )
    return patients[0]


def _is_whole(record: Record, counts: Counter[str], what: str, reports: bool) -> bool:
    """Whether there are images and, with ``reports``, a report; counts what there is not, of ``what``."""
    if not record.images:
        counts[f"{what} without an image"] += 1
    elif reports and not (record.report or record.captions):
        counts[f"{what} without a report"] += 1
    else:
        return True
    return False


@dataclass
class Read:
    """Records, and what was left out or doubtful, by kind."""

    records: list[Record]
    counts: Counter[str]


def _record(row: Row, columns: Columns, images: Path | None) -> Record:
    def joined(role: str, sign: str = "_") -> str:
        parts = [next(iter(texts(row, [name])), "") for name in columns.roles.get(role, ())]
        return sign.join(parts) if any(parts) else ""

    cells, views = (_listed(texts(row, columns.roles.get(role, ()), keep_empty=True)) for role in ("image", "view"))
    if len(views) == len(cells):  # a view without an image goes with it, and an image without a view keeps its place
        views = [view for cell, view in zip(cells, views, strict=True) if cell]
    else:
        views = list(filter(None, views))
    paths = [_path(cell, images) for cell in cells if cell]
    sections = {name: " ".join(_sentences(row, own)) for name, own in columns.sections.items()}
    return Record(
        id=joined("id") or joined("study"),
        study=joined("study"),
        patient=joined("patient"),
        split=joined("split") or ("" if "split" in columns.roles else str(row.get(FILE_SPLIT, ""))),
        report=" ".join(" ".join(text.split()) for text in _sentences(row, columns.roles.get("report", ()))),
        captions=_sentences(row, columns.roles.get("captions", ())),
        images=paths,
        views=_fitting(views, len(paths)),
        date=joined("date", " "),
        sections={name: " ".join(text.split()) for name, text in sections.items() if text},
        extra={name: _as_json(row[name]) for name in columns.extra if name in row},
    )


def _as_json(value: Any) -> Any:
    """A cell as JSON can hold it: dates, which Parquet has, as texts."""
    return json.loads(json.dumps(value, default=str))


def _sentences(row: Row, columns: Sequence[str]) -> list[str]:
    """The texts in the cells of ``columns``, of which each may be a list as Python, numpy or JSON write it."""
    cells = texts(row, columns)
    listed = [_as_list(cell) for cell in cells]
    return [
        text
        for cell, entries in zip(cells, listed, strict=True)
        for text in ([cell] if entries is None else texts({"cell": entries}, ["cell"]))
    ]


def _id_of_image(image: str, found: Mapping[str, Record]) -> str:
    """The id of a record that has none: its first image's path without the suffix, or whole where another image has
    the same."""
    plain = str(PurePosixPath(image).with_suffix(""))
    return image if plain in found and image not in found[plain].images else plain


def _fitting(views: list[str], count: int) -> list[str]:
    """A view for each of ``count`` images, "" where it is not known."""
    if len(views) == 1 and len(parts := [part.strip() for part in views[0].split(",")]) == count:
        views = parts
    return (views + [""] * count)[:count]


def _listed(values: Sequence[str]) -> list[str]:
    """The entries of cells that may hold lists: as Python or JSON write them, or separated by ; or |, or by commas
    where every part is a picture; empty ones are kept.
    """
    found: list[str] = []
    for value in values:
        if (listed := _as_list(value)) is not None:
            found += ["" if entry is None else str(entry).strip() for entry in listed]
            continue
        parts = [part.strip() for part in value.replace("|", ";").replace("\n", ";").split(";")]
        if len(parts) == 1 and all(part.strip().lower().endswith(PICTURES) for part in value.split(",")):
            parts = [part.strip() for part in value.split(",")]
        found += parts
    return found


def _as_list(value: str) -> list[Any] | None:
    """The list that JSON or Python writes as ``value``, or the tuple, or numpy's array; None for other text."""
    if value[:1] + value[-1:] not in ("[]", "()"):
        return None
    for read in (json.loads, _literal):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError, tokenize.TokenError):
            listed = read(value)
            return list(listed) if isinstance(listed, (list, tuple)) else None
    return None


def _literal(value: str) -> Any:
    """A literal of Python; strings side by side, as numpy prints arrays, are several, where Python would join them."""
    parts: list[str] = []
    before = None
    for token in tokenize.generate_tokens(io.StringIO(value).readline):
        if token.string.strip():
            parts += [",", token.string] if before == token.type == tokenize.STRING else [token.string]
            before = token.type
    return ast.literal_eval(" ".join(parts))


def _path(path: str, images: Path | None) -> str:
    plain = path.replace("\\", "/")
    if plain.lower().endswith(VOLUMES):
        raise InputError(f"image {path[:120]!r}: volumes are not supported; give a picture (PNG, JPEG, DICOM)")
    if images is not None and plain.startswith("/"):
        for root in (str(images.absolute()), os.path.realpath(images)):
            plain = plain.removeprefix(root.rstrip("/") + "/")
    parts = PurePosixPath(plain).parts
    if plain.startswith("/") or ".." in parts or _ELSEWHERE.match(plain):
        fetch = "; fetch the images of these addresses into it first" if "://" in plain else ""
        raise InputError(f"image {path[:120]!r}: must be a path inside --images {images or 'DIR'}{fetch}")
    return str(PurePosixPath(plain))


def _join(known: Record, other: Record, row: int, counts: Counter[str]) -> None:
    """Another row of the same study; InputError where it has another report and image, and only an id in common."""
    if not known.study and _is_another(known, other):
        raise InputError(
            f"row {row} (image {other.images[0]!r}): id {known.id!r} is an earlier row's too, with another image and "
            "another report; ids must be unique in all tables together (where rows of one id are one study, name that "
            "column with --study)"
        )
    if not (known.report or known.captions):
        known.report, known.captions, known.sections = other.report, other.captions, known.sections | other.sections
    elif (other.report or other.captions) and (other.report, other.captions) != (known.report, known.captions):
        counts["rows of a study whose report differs from its first row's, which is taken"] += 1
    for name in ("split", "patient", "date"):
        mine, theirs = getattr(known, name), getattr(other, name)
        setattr(known, name, mine or theirs)
        if mine and theirs and mine != theirs and name != "date":
            raise InputError(f"study {known.study or known.id!r}: its rows differ in {name}: {mine!r} and {theirs!r}")
    for image, view in zip(other.images, other.views, strict=True):
        if image in known.images:
            counts["images listed twice in a study, taken once"] += 1
        else:
            known.images.append(image)
            known.views.append(view)


def _is_another(known: Record, other: Record) -> bool:
    """Whether ``other`` has another report, and images of which ``known`` has none."""
    mine, theirs = ((record.report, record.captions) for record in (known, other))
    return (
        (mine != theirs and any(mine) and any(theirs))
        and bool(other.images)
        and set(other.images).isdisjoint(known.images)
    )


def _add_images(found: dict[str, Record], taken: dict[str, Record], record: Record, counts: Counter[str]) -> None:
    """Add a record for each image of ``record`` that is in no other row."""
    for image, view in zip(record.images, record.views, strict=True):
        if (other := taken.get(image)) is not None:
            same = (other.report, other.captions) == (record.report, record.captions)
            report = "" if same else " with the first row's report, which differs"
            counts[f"images listed twice, taken once{report}"] += 1
            continue
        identity = record.id if len(record.images) == 1 else PurePosixPath(image).stem
        if identity in found:
            identity = image
        known = {**vars(record), "id": identity, "images": [image], "views": [view]}
        found[identity] = taken[image] = Record(**known)


def settle_splits(read: Read, *, seed: int, named: Mapping[str, str] | None, new: bool) -> tuple[list[Record], str]:
    """Give every record a split, and say how: as ``named`` by id, the table's unless ``new``, or 7:1:2 by seed.

    Splits that a table lacks are taken from its training patients. Records that ``named`` leaves out are left out, and
    counted. InputError for an unknown word, for a patient in two splits, and where ``named`` names no record.
    """
    how, records = "as named by --split_file", list(read.records)
    if named is not None:
        records = _named(read, named)
    elif new or not any(record.split for record in records):
        drawn = seeded_split([record.owner for record in records], seed)
        for record, split in zip(records, drawn, strict=True):
            record.split = split
        whole = "patient" if any(record.patient for record in records) else "study, no patients being named"
        how = f"7:1:2 by {whole}, --seed {seed}{_fill_splits(records, seed)}"
    else:
        how = "the table's"
        for record in records:
            word, record.split = record.split, split_of(record.split) or ""
            if not record.split:
                known = ", ".join(word for words in SPLIT_WORDS.values() for word in words)
                raise InputError(f"record {record.id!r}: split {word!r} is none of {known}; --new_split draws a split")
        how += _fill_splits(records, seed)
    homes: dict[str, str] = {}
    shown: dict[str, set[str]] = {}
    for record in records:
        for image in record.images:
            shown.setdefault(image, set()).add(record.split)
        if homes.setdefault(record.owner, record.split) != record.split:
            raise InputError(
                f"patient {record.owner!r} is in the splits {homes[record.owner]} and {record.split}; "
                "--new_split draws a split that keeps patients whole"
            )
    if twice := next((name for name in homes if name.isdigit() and f"{name}.0" in homes), None):
        raise InputError(f"ids {twice!r} and '{twice}.0' are one number, written in two ways; export ids as text")
    if missing := [split for split in SPLITS if split not in homes.values()]:
        raise InputError(
            f"no record is in split {missing[0]}: {len(homes)} patients are too few, or none is in train (--new_split "
            "draws a split)"
        )
    if any(record.patient for record in records):
        read.counts["records that name no patient, of which each study counts as a patient of its own"] = sum(
            not record.patient for record in records
        )
    read.counts["images that are in two splits (name a column of patients or studies)"] = sum(
        len(splits) > 1 for splits in shown.values()
    )
    return records, how


def _named(read: Read, named: Mapping[str, str]) -> list[Record]:
    """The records whose id ``named`` has, or else whose study, in its splits; counts the others on both sides.

    It is of ids or of studies, whichever more of its names are: a number may be the id of one record and the study of
    another. InputError where that cannot be told.
    """
    by_id, by_study = ({getattr(record, name) for record in read.records} & named.keys() for name in ("id", "study"))
    key = "study" if len(by_study) > len(by_id) else "id"
    records = [record for record in read.records if getattr(record, key) in named]
    for record in records:
        if len(by_id) == len(by_study) and named.get(record.id) != named.get(record.study):
            raise InputError(
                f"--split_file: has {getattr(record, key)!r}, which is the id of one record and the study of another; "
                "name studies and records differently"
            )
        record.split = named[getattr(record, key)]
    unused = named.keys() - (by_study if key == "study" else by_id)
    example = min(unused, default="")[:60]
    if not records:
        raise InputError(f"--split_file: none of its ids, e.g. {example!r}, is an id or a study of the table")
    read.counts["records that --split_file does not name, left out"] = len(read.records) - len(records)
    read.counts[f"ids of --split_file that the table lacks, e.g. {example!r}"] = len(unused)
    return records


def _fill_splits(records: Sequence[Record], seed: int) -> str:
    """Take the splits that no record is in from train, by patients; says which."""
    present = {record.split for record in records}
    missing = [split for split in SPLITS if split not in present]
    if not missing or "train" in missing:
        return ""
    owners = sorted(
        {record.owner for record in records if record.split == "train"},
        key=lambda owner: hashlib.sha256(f"{seed} {owner}".encode()).digest(),
    )
    chosen: dict[str, str] = {}
    for split in missing:
        count = max(1, round(SHARES[split] * len(owners)))
        for owner in owners[len(chosen) : len(chosen) + count]:
            chosen[owner] = split
    for record in records:
        if record.split == "train":
            record.split = chosen.get(record.owner, "train")
    return f"; {' and '.join(missing)} drawn from its training patients, --seed {seed}"


def as_annotation(records: Sequence[Record]) -> tuple[dict[str, list[dict[str, Any]]], int, int]:
    """The annotation of the records, with priors where dates are known; how many have one, and how many a date that is
    not understood.
    """
    listed = [record.as_json() for record in records]
    times = moments([record.date for record in records])
    priors = add_priors(listed, {record.id: time for record, time in zip(records, times, strict=True)})
    unread = sum(bool(record.date) and time is None for record, time in zip(records, times, strict=True))
    return {split: [record for record in listed if record["split"] == split] for split in SPLITS}, priors, unread
