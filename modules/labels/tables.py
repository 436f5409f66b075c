"""CSV files of reports and of CheXpert labels, as people of this field have them.

Labels are in columns of the class names, in any order, as the CheXpert labeler and CheXbert write them: 1, 0, -1,
and nothing (or "-") for not mentioned.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.data import report_tables
from modules.data.report_tables import REPORT_COLUMNS, TEXT_NAMES, Table, plain
from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError, Problem, raise_problem
from modules.runtime.records import write_private

_CLASS_NAMES = {name.lower(): name for name in CLASSES} | {
    # What the CheXpert labeler's own columns are called in some of its versions.
    "enlarged cardiom.": "Enlarged Cardiomediastinum",
    "airspace opacity": "Lung Opacity",
}
_LABELS = {"": None, "-": None, "nan": None, "1": 1, "0": 0, "-1": -1, "1.0": 1, "0.0": 0, "-1.0": -1}


def read_table(
    path: str | Path, column: str | None = None, on_problem: Callable[[Problem], None] = raise_problem
) -> Table:
    """Read a CSV file of reports or labels; a first row with ``column``, a text's or a class's name is a header too."""
    names = (*_CLASS_NAMES, *TEXT_NAMES, *([plain(column)] if column else []))
    return report_tables.read_table(path, names=names, on_problem=on_problem)


def report_column(table: Table, name: str | None = None) -> int:
    """Index of the column of reports: ``name``, or the first of REPORT_COLUMNS; InputError where there is none."""
    column = table.find(*((name.strip().lower(),) if name else REPORT_COLUMNS))
    if column is not None:
        return column
    wanted = repr(name) if name else " or ".join(map(repr, REPORT_COLUMNS))
    raise InputError(f"{table.path}: no column {wanted}; the columns are {', '.join(table.columns)[:300]}")


def class_columns(table: Table) -> dict[str, int]:
    """Class name -> index of its label column; InputError where a class has two."""
    found: dict[str, int] = {}
    for index, column in enumerate(table.columns):
        name = _CLASS_NAMES.get(column.strip().lower())
        if name in found:
            raise InputError(f"{table.path}: two columns hold the labels of {name}")
        if name:
            found[name] = index
    return found


def parse_labels(table: Table, on_problem: Callable[[Problem], None] = raise_problem) -> list[list[int | None]]:
    """Return N rows of 14 labels in CLASSES order; all classes must be there and every cell 1, 0, -1 or empty.

    Given another ``on_problem``, cells that are not labels are noted and count as not mentioned.
    InputError where a class is missing.
    """
    columns = class_columns(table)
    missing = [name for name in CLASSES if name not in columns]
    if missing:
        raise InputError(f"{table.path}: no label column {', '.join(missing)}")
    labels = []
    for number, row in enumerate(table.rows, start=1):
        cells = [row[columns[name]].strip().lower() for name in CLASSES]
        for name, cell in zip(CLASSES, cells, strict=True):
            if cell not in _LABELS:
                on_problem(
                    Problem(
                        "cell is not a label",
                        f"{table.path}: row {number}: {name} is {cell!r}; 1, 0, -1 or nothing is a label",
                        table.path,
                        field=name,
                    )
                )
        labels.append([_LABELS.get(cell) for cell in cells])
    return labels


def write_table(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file for its owner's eyes (mode 0600), whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_private(path, text.getvalue())
