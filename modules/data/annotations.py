"""Reads annotation.json in R2Gen's layout, with ITHN's negative fields, and names the first mistake in it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from modules.runtime.errors import InputError, Problem, raise_problem
from modules.runtime.input_files import MAX_ANNOTATION, read_bytes

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": ("train", "training", "trn", "restval"),
    "val": ("val", "valid", "validate", "validation", "dev", "development"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}


def split_of(word: str) -> str | None:
    """train, val or test for the ways in which tables write them; None for another word."""
    return _SPLIT_OF.get(word.strip().lower())


@dataclass(frozen=True, slots=True)
class Study:
    """One record: a report and the images it describes."""

    id: str
    report: str  # COCO: the first caption
    image_paths: tuple[str, ...]  # relative to image_dir
    split: str
    study_id: str  # equal for the records of one study (MIMIC-CXR: one record per image)
    views: tuple[str, ...]  # projection of each image ("PA", "lateral", ...), "" where the file does not say
    negative_report: str | None = None  # released ITHN: neg_report
    negative_image_paths: tuple[str, ...] = ()  # released ITHN: neg_image_path
    subject_id: str = ""  # MIMIC-CXR: the patient
    captions: tuple[str, ...] = ()  # COCO: all captions of the image
    sections: Mapping[str, str] = field(default_factory=dict)  # indication, findings, ...: other texts of the study
    prior: str = ""  # the id of the patient's previous record
    record_id: str = ""  # of one caption of a record: the record's id


@dataclass(frozen=True)
class Annotation:
    """A checked annotation file; ``splits`` keeps the file's order."""

    path: str
    splits: dict[str, tuple[Study, ...]]
    sha256: str  # of the file's bytes
    train_sha256: str  # of [[id, report], ...] of train as JSON: what a hard-negative index must match
    synthetic: bool = False  # some record says "synthetic": true, as scripts/make_demo_data.py writes it


_ALONE = "; reports for a test split alone: scripts/predict.py --ann_path (docs/EVALUATION.md)"


def read_annotation(
    path: str | Path, required_splits: tuple[str, ...] = SPLITS, on_problem: Callable[[Problem], None] = raise_problem
) -> Annotation:
    """Read and check annotation.json: {"train": [...], "val": [...], "test": [...]} of records with id, report (or
    captions) and image_path. InputError names file, split, record and field of the first mistake. Another
    ``on_problem`` is called with every mistake in splits and records; the result lacks those records.
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
        splits[split] = _read_split(path, data, split, first_seen, on_problem)
        if not splits[split] and split in required_splits and data.get(split) == []:
            on_problem(
                Problem(
                    "split is empty",
                    f"{path}: split '{split}' is empty, it needs at least one record{_ALONE}",
                    str(path),
                    split,
                )
            )
    return Annotation(
        path=str(path),
        splits=splits,
        sha256=hashlib.sha256(content).hexdigest(),
        train_sha256=train_sha256(splits.get("train", ())),
        synthetic=any(
            item.get("synthetic") is True
            for split in splits
            for item in data.get(split) or ()
            if isinstance(item, dict)
        ),
    )


def read_unreported(path: str | Path, split: str, rows: list | None = None) -> Annotation:
    """``split`` of an annotation, or of a JSON list of its records, or else ``rows`` of the file at ``path``: records
    that need no report. InputError as in read_annotation, and where there is no record.
    """
    content, data = (b"", rows) if rows is not None else _read_json(path)
    if isinstance(data, list):
        data = {split: [{**row, "split": split} if isinstance(row, dict) else row for row in data]}
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {_kind(data)}, expected an annotation, or a list of its records")
    studies = _read_split(path, data, split, {}, raise_problem, needs_report=False)
    if not studies:
        raise InputError(f"{path}: split '{split}' is empty, it needs at least one record")
    return Annotation(str(path), {split: studies}, hashlib.sha256(content).hexdigest(), "")


def frontal_first(annotation: Annotation) -> Annotation:
    """The annotation with every study's frontal images before its others, as far as ``view`` tells; else in order."""

    def ordered(study: Study) -> Study:
        order = sorted(range(len(study.views)), key=lambda index: not _is_frontal(study.views[index]))
        if order == list(range(len(order))):
            return study
        return replace(
            study,
            image_paths=tuple(study.image_paths[index] for index in order),
            views=tuple(study.views[index] for index in order),
        )

    splits = {split: tuple(map(ordered, studies)) for split, studies in annotation.splits.items()}
    return replace(annotation, splits=splits)


def _is_frontal(view: str) -> bool:
    return view.strip().upper().startswith(("PA", "AP", "FRONTAL", "POSTEROANTERIOR", "ANTEROPOSTERIOR"))


def train_sha256(studies: Iterable[Study]) -> str:
    """Hash of ids and reports in their order."""
    return hashlib.sha256(json.dumps([[study.id, study.report] for study in studies]).encode()).hexdigest()


def _read_json(path: str | Path) -> tuple[bytes, object]:
    try:
        content = read_bytes(path, MAX_ANNOTATION)
    except FileNotFoundError:
        how = "data/README.md says how to make an annotation for --ann_path (bash run_demo.sh needs none)"
        raise InputError(f"{path}: no such file; {how}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the annotation: {error.strerror}") from error
    try:
        # utf-8-sig: a byte order mark, which Windows editors put in front, is not a mistake.
        return content, json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the annotation as UTF-8") from error
    except RecursionError as error:
        raise InputError(f"{path}: not an annotation: the JSON is nested too deeply") from error
    except ValueError as error:
        how = "" if str(path).endswith(".json") else "; scripts/prepare_table.py makes an annotation of a table"
        raise InputError(f"{path}: not valid JSON: {error}{how}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of ``pairs``, for object_pairs_hook; ValueError where a key occurs twice."""
    # JSON readers keep the last of two equal keys: a second "train" would quietly replace the first.
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {_shown(twice)} occurs twice in one object")
    return found


def _read_split(
    path, data: dict, split: str, first_seen: dict[str, str], on_problem, *, needs_report: bool = True
) -> tuple[Study, ...]:
    rows = data.get(split)
    if not isinstance(rows, list):
        problem = (
            f"is {_kind(rows)}, expected a list of records"
            if split in data
            else f"is missing; expected the keys {', '.join(SPLITS)}{_ALONE}"
        )
        on_problem(Problem("split is not a list", f"{path}: split '{split}' {problem}", str(path), split))
        return ()
    studies = []
    for row, item in enumerate(rows):
        record = _Record(str(path), split, row, item, on_problem, needs_report=needs_report)
        study = _read_study(record) if isinstance(item, dict) else None
        if not isinstance(item, dict):
            record.refuse(
                "", "record is not an object", f"is {_kind(item)}, expected an object with id, report and image_path"
            )
        if record.id and record.id in first_seen:
            other = first_seen[record.id]
            problem = "appears twice" if other == split else f"is in split '{other}' too"
            kind = "id appears twice" if other == split else "id is in two splits"
            on_problem(
                Problem(
                    kind,
                    f"{path}: split '{split}', id {_shown(record.id)} {problem}; ids must be unique",
                    str(path),
                    split,
                    record.id,
                    "id",
                )
            )
            continue
        first_seen[record.id] = split
        if study is not None:
            studies.append(study)
    return tuple(studies)


@dataclass
class _Record:
    """A record's place in the file, and whether it is sound so far."""

    path: str
    split: str
    row: int
    item: object
    on_problem: Callable[[Problem], None]
    id: str = ""
    sound: bool = True
    needs_report: bool = True

    def refuse(self, field: str, kind: str, problem: str) -> None:
        self.sound = False
        where = f"{self.path}: split '{self.split}', record {self.row}" + (f", id {_shown(self.id)}" if self.id else "")
        self.on_problem(Problem(kind, f"{where}: {problem}", self.path, self.split, self.id, field))


def _read_study(record: _Record) -> Study | None:
    item, split = record.item, record.split
    record.id = _identifier(record, "id")
    # A record's own split is not needed, but one that contradicts its list would leak test data into training.
    own = item.get("split")
    if isinstance(own, str) and split_of(own) not in (None, split):
        record.refuse(
            "split", "split contradicts its list", f"field 'split' says {_shown(own)}, but the record is in '{split}'"
        )
    negative_images = _strings(record, "neg_image_path")
    images = _images(record, negative_images)
    views = _strings(record, "view")
    if len(views) > len(images) > 0:
        record.refuse(
            "view", "more views than images", f"field 'view' has {len(views)} entries for {len(images)} image(s)"
        )
    negative_reports = _strings(record, "neg_report")
    if bool(negative_reports) != bool(negative_images):
        record.refuse(
            "neg_report",
            "half a negative",
            "has only one of the fields neg_report and neg_image_path; a negative needs both",
        )
    if negative_reports and not negative_reports[0].strip():
        record.refuse("neg_report", "neg_report is empty", "field 'neg_report' is empty, expected a text")
    captions, sections = _captions(record), _sections(record)
    report = captions[0] if captions and item.get("report") is None else _report(record)
    study_id = _identifier(record, "study_id") if "study_id" in item else record.id
    subject_id, prior = (
        _identifier(record, name) if item.get(name) is not None else "" for name in ("subject_id", "prior")
    )
    if prior and prior == record.id:
        record.refuse("prior", "record is its own prior", "field 'prior' names the record itself, not an earlier one")
    if not record.sound:
        return None
    return Study(
        id=record.id,
        report=report,
        image_paths=images,
        split=split,
        study_id=study_id,
        views=views + ("",) * (len(images) - len(views)),
        negative_report=negative_reports[0] if negative_reports else None,
        negative_image_paths=negative_images,
        subject_id=subject_id,
        captions=captions,
        sections=sections,
        prior=prior,
    )


def _images(record: _Record, negative_images: tuple[str, ...]) -> tuple[str, ...]:
    images = _strings(record, "image_path")
    if negative_images and record.id and "image_path" not in record.item:
        images = (record.id,)  # released ITHN names the image by the id alone
    if not images and not record.item.get("image_path"):
        absence = _absence(record.item, "image_path")
        record.refuse("image_path", f"image_path is {absence}", f"field 'image_path' is {absence}, expected paths")
    for name, paths in (("image_path", images), ("neg_image_path", negative_images)):
        for path in paths:
            if not path.strip() or "\0" in path or path.startswith("/") or ".." in PurePosixPath(path).parts:
                record.refuse(
                    name, "image path leaves image_dir", f"image path {_shown(path)} must name a file inside image_dir"
                )
    return images


def _identifier(record: _Record, field: str) -> str:
    value = record.item.get(field)
    if isinstance(value, int) and not isinstance(value, bool):  # MIMIC-CXR's study_id is a number
        return str(value)
    if not isinstance(value, str) or not value:
        absence = _absence(record.item, field)
        record.refuse(field, f"{field} is {absence}", f"field '{field}' is {absence}, expected a non-empty string")
        return ""
    return _encodable(record, field, value)


def _report(record: _Record) -> str:
    value = record.item.get("report")
    if not record.needs_report and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    if not isinstance(value, str) or not value.strip():
        absence = _absence(record.item, "report")
        record.refuse("report", f"report is {absence}", f"field 'report' is {absence}, expected a text")
        return ""
    return _encodable(record, "report", value)


def _captions(record: _Record) -> tuple[str, ...]:
    captions, value = _strings(record, "captions"), record.item.get("captions")
    if value is not None and not (isinstance(value, list) and value):
        record.refuse(
            "captions", "captions is not a list", f"field 'captions' is {_kind(value)}, expected a list of texts"
        )
    for number, caption in enumerate(captions):
        if not caption.strip():
            record.refuse(
                "captions", "a caption is empty", f"caption {number} of field 'captions' is empty, expected a text"
            )
    return captions


def _sections(record: _Record) -> dict[str, str]:
    """A field that may be absent: an object of texts by name."""
    value = record.item.get("sections") or {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        record.refuse(
            "sections", "sections is not an object", "field 'sections' must be an object of texts, such as findings"
        )
        return {}
    return {name: _encodable(record, "sections", text) for name, text in value.items()}


def _strings(record: _Record, field: str) -> tuple[str, ...]:
    """A field that may be absent, null, a string or a list of strings."""
    value = record.item.get(field)
    if value is None:
        return ()
    found = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str):
            found.append(_encodable(record, field, entry))
        else:
            record.refuse(
                field, f"{field} holds {_kind(entry)}", f"field '{field}' holds {_kind(entry)}, expected strings"
            )
    return tuple(found)


def _encodable(record: _Record, field: str, value: str) -> str:
    # JSON can spell half a surrogate pair, which no file or table written later could hold.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        record.refuse(field, f"{field} has a lone surrogate", f"field '{field}' has a lone surrogate at {error.start}")
        return ""
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
    """``text`` quoted, on one line, cut to 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
