"""The 14 labels of every study, from a CSV file with named columns or from XProNet's pickles, which have no names.

A label is positive where the file says 1 or, as for XProNet, -1 (uncertain); 0 and nothing are negative.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modules.data.annotations import Study
from modules.labels.array_pickle import read_pickled_arrays
from modules.labels.labeler import label_reports
from modules.labels.rules import CLASSES
from modules.labels.tables import parse_labels, read_table
from modules.runtime.errors import InputError, Problem, raise_problem
from modules.runtime.input_files import open_regular

NO_FINDING = "No Finding"
ID_COLUMNS = ("id", "dicom_id", "study_id")
# XProNet's two files differ: CheXbert's order for IU X-Ray, the alphabet's for MIMIC-CXR, each with No Finding last.
ORDERS = {
    "chexpert": CLASSES,
    "chexbert": (
        "Enlarged Cardiomediastinum",
        "Cardiomegaly",
        "Lung Opacity",
        "Lung Lesion",
        "Edema",
        "Consolidation",
        "Pneumonia",
        "Atelectasis",
        "Pneumothorax",
        "Pleural Effusion",
        "Pleural Other",
        "Fracture",
        "Support Devices",
        NO_FINDING,
    ),
    "mimic_cxr": (*sorted(name for name in CLASSES if name != NO_FINDING), NO_FINDING),
}


@dataclass(frozen=True)
class LabelTable:
    """Multi-hot labels by id; ``path`` is for error messages."""

    path: str
    labels: Mapping[str, np.ndarray]  # (14,) float32 each, in the order of the classes that was asked for
    column: str  # of ID_COLUMNS, whose ids these are; "" for a pickle, where ids have no name
    sha256: str = ""  # of the file's bytes

    def of(self, studies: Sequence[Study]) -> np.ndarray:
        """(N, 14) float32, looked up as in ``find``; InputError for the first study that has no labels."""
        found = [self.find(study) for study in studies]
        missing = [study for study, row in zip(studies, found, strict=True) if row is None]
        if missing:
            by = f", found by the column {self.column}" if self.column else ""
            raise InputError(
                f"{self.path}: no labels for study {missing[0].id!r} of split '{missing[0].split}' (nor "
                f"for {len(missing) - 1} others of it); every study needs a row{by}"
            )
        return np.stack(found) if found else np.zeros((0, len(CLASSES)), np.float32)

    def find(self, study: Study) -> np.ndarray | None:
        """(14,) float32, or None where the file has no labels for ``study``.

        Column study_id has the record's study_id, the others and XProNet's pickles have the record's id, of which its
        IU X-Ray file has the first two "-"-separated pieces.
        """
        key = study.study_id if self.column == "study_id" else study.record_id or study.id
        if not self.column and key not in self.labels:
            key = "-".join(key.split("-")[:2])
        return self.labels.get(key)


def labels_by_rules(reports: Sequence[str], progress: bool = False) -> np.ndarray:
    """(N, 14) float32 in the order of CLASSES: what a LabelTable would hold if the rules had labelled it."""
    return np.isin(label_reports(reports, progress), (1, -1)).astype(np.float32)


def class_order(text: str, flag: str) -> tuple[str, ...]:
    """The 14 classes in the order called ``text``, the value of ``flag``: a name of ORDERS, or all 14 with commas.

    InputError for anything else.
    """
    if text in ORDERS:
        return ORDERS[text]
    given = [name.strip().lower() for name in text.split(",")]
    known = {name.lower(): name for name in CLASSES}
    if sorted(given) != sorted(known):
        wrong = next((name for name in given if name not in known), None)
        reason = f"no class is called {wrong!r}" if wrong else f"{len(set(given))} of the 14 classes are named"
        raise InputError(
            f"--{flag}: {reason}; give {', '.join(ORDERS)}, or the 14 classes separated by commas: {', '.join(CLASSES)}"
        )
    return tuple(known[name] for name in given)


def read_labels(
    path: str | Path,
    classes: Sequence[str] = CLASSES,
    columns: str = "",
    on_problem: Callable[[Problem], None] = raise_problem,
) -> LabelTable:
    """Read a CSV file (an id column and the 14 classes by name) or a pickled dictionary of id -> 14 numbers.

    The labels come in the order of ``classes``, whatever the file's. A pickle's columns have no names: ``columns``
    (see ``class_order``) must say what they are. InputError for a file that does not fit; another ``on_problem`` is
    called with every row that does not fit, and the result lacks those rows.
    """
    try:
        with open_regular(path) as file:
            is_pickle = file.read(1) == b"\x80"
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"--label_path {path}: cannot be read: {error.strerror}; a CSV file with the columns id and "
            "the 14 classes is needed (scripts/label_reports.py makes one)"
        ) from error
    if is_pickle and not columns:
        raise InputError(
            f"{path}: the columns of a pickle have no names; say them with --label_columns chexbert "
            "(XProNet's IU X-Ray file), mimic_cxr (its MIMIC-CXR file) or 14 names"
        )
    own = class_order(columns, "label_columns") if is_pickle else CLASSES
    by_name = [own.index(name) for name in classes]
    column, found = ("", _pickled_labels(path, on_problem)) if is_pickle else _csv_labels(path, on_problem)
    return LabelTable(str(path), {key: values[by_name] for key, values in found.items()}, column, sha256)


def _csv_labels(path: str | Path, on_problem: Callable[[Problem], None]) -> tuple[str, dict[str, np.ndarray]]:
    """The name of the column of ids, and the labels by it in the order of CLASSES."""
    table = read_table(path, on_problem=on_problem)
    columns = [column.strip().lower() for column in table.columns]
    id_column = next((columns.index(name) for name in ID_COLUMNS if name in columns), None)
    if id_column is None:
        raise InputError(
            f"{path}: no column {', '.join(ID_COLUMNS)} with the ids of the studies; the columns are "
            f"{', '.join(table.columns)}"
        )
    values = np.array([[label in (1, -1) for label in row] for row in parse_labels(table, on_problem)], np.float32)
    labels: dict[str, np.ndarray] = {}
    for number, (row, value) in enumerate(zip(table.rows, values, strict=True), start=1):
        key = row[id_column]
        if key in labels:
            on_problem(
                Problem("id appears twice", f"{path}: row {number}: id {key!r} appears twice", str(path), id=key)
            )
        labels[key] = value
    return columns[id_column], labels


def _pickled_labels(path: str | Path, on_problem: Callable[[Problem], None]) -> dict[str, np.ndarray]:
    """In the order of the file."""
    labels = {}
    for key, values in read_pickled_arrays(path).items():
        if values.shape != (len(CLASSES),):
            on_problem(
                Problem(
                    "labels of another shape",
                    f"{path}: {key!r:.80} has an array of shape {values.shape}, expected {len(CLASSES)} labels",
                    str(path),
                    id=key,
                )
            )
        elif not np.isin(values[~np.isnan(values)], (0, 1, -1)).all():
            on_problem(
                Problem(
                    "cell is not a label",
                    f"{path}: {key!r:.80} has a label other than 1, 0, -1 or nan",
                    str(path),
                    id=key,
                )
            )
        else:
            labels[key] = np.isin(values, (1, -1)).astype(np.float32)
    return labels
