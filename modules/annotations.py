"""Reads annotation.json in R2Gen's layout, with ITHN's negative fields, and names the first mistake in it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modules.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Study:
    """One record: a report and the images it describes."""

    id: str
    report: str
    image_paths: tuple[str, ...]  # relative to image_dir
    split: str
    study_id: str  # records that share it show the same study (MIMIC-CXR: one record per image)
    views: tuple[str, ...]  # projection of each image ("PA", "lateral", ...), "" where the file does not say
    negative_report: str | None = None  # released ITHN: neg_report
    negative_image_paths: tuple[str, ...] = ()  # released ITHN: neg_image_path


@dataclass(frozen=True)
class Annotation:
    """A checked annotation file; ``splits`` keeps the file's order."""

    path: str
    splits: dict[str, tuple[Study, ...]]
    sha256: str  # of the file's bytes
    train_sha256: str  # of [[id, report], ...] of train as JSON: what a hard-negative index must match
    synthetic: bool = False  # some record says "synthetic": true, as scripts/make_demo_data.py writes it


def read_annotation(path: str | Path, required_splits: tuple[str, ...] = SPLITS) -> Annotation:
    """Read and check annotation.json: {"train": [...], "val": [...], "test": [...]} of records with id, report and
    image_path. InputError names file, split, record and field of the first mistake.
    """
    content, data = _read_json(path)
    if not isinstance(data, dict):
        kind = _kind(data) if data else "nothing"
        raise InputError(f"{path}: holds {kind}, expected an object with the keys {', '.join(SPLITS)}")
    splits: dict[str, tuple[Study, ...]] = {}
    first_seen: dict[str, str] = {}
    for split in SPLITS:
        if split not in data and split not in required_splits:
            continue
        splits[split] = _read_split(path, data, split, first_seen)
        if not splits[split] and split in required_splits:
            raise InputError(f"{path}: split '{split}' is empty, it needs at least one record")
    train = [[study.id, study.report] for study in splits.get("train", ())]
    return Annotation(
        path=str(path),
        splits=splits,
        sha256=hashlib.sha256(content).hexdigest(),
        train_sha256=hashlib.sha256(json.dumps(train).encode()).hexdigest(),
        synthetic=any(item.get("synthetic") is True for split in splits for item in data[split]),
    )


def _read_json(path: str | Path) -> tuple[bytes, object]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the annotation: {error.strerror}") from error
    try:
        # utf-8-sig: a byte order mark, which Windows editors put in front, is no mistake.
        return content, json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the annotation as UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{path}: not an annotation: the JSON is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error


def _read_split(path, data: dict, split: str, first_seen: dict[str, str]) -> tuple[Study, ...]:
    if split not in data:
        raise InputError(f"{path}: split '{split}' is missing; expected the keys {', '.join(SPLITS)}")
    if not isinstance(data[split], list):
        raise InputError(f"{path}: split '{split}' is {_kind(data[split])}, expected a list of records")
    studies = []
    for row, item in enumerate(data[split]):
        study = _read_study(item, split, f"{path}: split '{split}', record {row}")
        if study.id in first_seen:
            other = first_seen[study.id]
            problem = "appears twice" if other == split else f"is in split '{other}' too"
            raise InputError(f"{path}: split '{split}', id {_shown(study.id)} {problem}; ids must be unique")
        first_seen[study.id] = split
        studies.append(study)
    return tuple(studies)


def _read_study(item: object, split: str, where: str) -> Study:
    if not isinstance(item, dict):
        raise InputError(f"{where}: is {_kind(item)}, expected an object with id, report and image_path")
    identity = _identifier(item, "id", where)
    where = f"{where}, id {_shown(identity)}"
    # A record's own split is not needed, but one that contradicts its list would leak test data into training.
    if item.get("split", split) in SPLITS and item.get("split", split) != split:
        raise InputError(f"{where}: field 'split' says '{item['split']}', but the record stands in '{split}'")
    negative_images = _strings(item, "neg_image_path", where)
    images = _strings(item, "image_path", where)
    if negative_images and "image_path" not in item:
        images = (identity,)  # released ITHN names the image by the id alone
    if not images:
        raise InputError(f"{where}: field 'image_path' is {_absence(item, 'image_path')}, expected paths")
    for image in images + negative_images:
        if not image.strip() or "\0" in image or image.startswith("/") or ".." in PurePosixPath(image).parts:
            raise InputError(f"{where}: image path {_shown(image)} must name a file inside image_dir")
    views = _strings(item, "view", where)
    if len(views) > len(images):
        raise InputError(f"{where}: field 'view' has {len(views)} entries for {len(images)} image(s)")
    negative_reports = _strings(item, "neg_report", where)
    if bool(negative_reports) != bool(negative_images):
        raise InputError(f"{where}: has only one of the fields neg_report and neg_image_path; a negative needs both")
    if negative_reports and not negative_reports[0].strip():
        raise InputError(f"{where}: field 'neg_report' is empty, expected a text")
    return Study(
        id=identity,
        report=_report(item, where),
        image_paths=images,
        split=split,
        study_id=_identifier(item, "study_id", where) if "study_id" in item else identity,
        views=views + ("",) * (len(images) - len(views)),
        negative_report=negative_reports[0] if negative_reports else None,
        negative_image_paths=negative_images,
    )


def _identifier(item: dict, field: str, where: str) -> str:
    value = item.get(field)
    if isinstance(value, int) and not isinstance(value, bool):  # MIMIC-CXR's study_id is a number
        return str(value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field '{field}' is {_absence(item, field)}, expected a non-empty string")
    return _encodable(value, field, where)


def _report(item: dict, where: str) -> str:
    value = item.get("report")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: field 'report' is {_absence(item, 'report')}, expected a text")
    return _encodable(value, "report", where)


def _strings(item: dict, field: str, where: str) -> tuple[str, ...]:
    """A field that may be absent, null, a string or a list of strings."""
    value = item.get(field)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    for entry in values:
        if not isinstance(entry, str):
            raise InputError(f"{where}: field '{field}' holds {_kind(entry)}, expected strings")
        _encodable(entry, field, where)
    return tuple(values)


def _encodable(value: str, field: str, where: str) -> str:
    # JSON can spell half a surrogate pair, which no file or table written later could hold.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field '{field}' has a lone surrogate at {error.start}") from error
    return value


def _absence(item: dict, field: str) -> str:
    if field not in item:
        return "missing"
    return _kind(item[field])


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str | list) and not (value.strip() if isinstance(value, str) else value):
        return "empty"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _shown(text: str) -> str:
    """``text`` on one line and not longer than a line."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
