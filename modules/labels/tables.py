"""CSV files of reports and of CheXpert labels, as people of this field have them.

Reports stand in a column ``report``, ``reports``, ``findings`` or ``Report Impression``, or in the headerless
one-column files that R2Gen writes (res.csv, gts.csv).
Labels stand in columns of the class names, in any order, as the CheXpert labeler and CheXbert write them: 1, 0, -1,
and nothing (or "-") for not mentioned.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError, Problem, raise_problem
from modules.runtime.records import write_private

REPORT_COLUMNS = ("report", "reports", "findings", "report impression")  # the last is CheXbert's
_CLASS_NAMES = {name.lower(): name for name in CLASSES} | {
    # What the CheXpert labeler's own columns are called in some of its versions.
    "enlarged cardiom.": "Enlarged Cardiomediastinum",
    "airspace opacity": "Lung Opacity",
}
_LABELS = {"": None, "-": None, "nan": None, "1": 1, "0": 0, "-1": -1, "1.0": 1, "0.0": 0, "-1.0": -1}


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file as text; ``path`` is for error messages."""

    path: str
    columns: list[str]
    rows: list[list[str]]


def read_table(
    path: str | Path, headerless: bool = False, on_problem: Callable[[Problem], None] = raise_problem
) -> Table:
    """Read a CSV file (UTF-8, with or without a byte order mark); every row must have as many cells as the first.

    With ``headerless``, a one-column file that begins with a sentence, or with an empty report, has no header. Given
    another ``on_problem``, rows of another length are noted and left out.
    """
    path = str(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from None
    if not lines:
        raise InputError(f"{path}: the file is empty; a CSV with a header line is needed")
    columns = lines[0]
    _refuse_other_separators(path, columns)
    if headerless and len(columns) == 1 and (" " in columns[0].strip() or not columns[0]):
        columns, lines = ["report"], [["report"], *lines]
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        if len(line) == len(columns):
            rows.append(line)
        else:
            on_problem(
                Problem(
                    "row of another length",
                    f"{path}: row {number} has {len(line)} cells where the header has {len(columns)}",
                    path,
                )
            )
    return Table(path, columns, rows)


def _refuse_other_separators(path: str, columns: Sequence[str]) -> None:
    for separator, sign in (("\t", "tabs"), (";", "';'"), ("|", "'|'")):
        names = columns[0].lower().split(separator)
        if len(names) > 1 and not {name.strip(' "') for name in names}.isdisjoint((*REPORT_COLUMNS, *_CLASS_NAMES)):
            raise InputError(f"{path}: its columns are separated by {sign}; save it with commas between them")


def report_column(table: Table, name: str | None = None) -> int:
    """Return the index of the column with the reports: ``name``, or the first of REPORT_COLUMNS that is there."""
    columns = [column.strip().lower() for column in table.columns]
    for candidate in (name.strip().lower(),) if name else REPORT_COLUMNS:
        if candidate in columns:
            return columns.index(candidate)
    wanted = repr(name) if name else " or ".join(map(repr, REPORT_COLUMNS))
    if len(table.columns) == 1 and len(table.columns[0].split()) > 3:  # reports do not belong in messages
        raise InputError(f"{table.path}: no column {wanted}; its only column begins with a text, not with a name")
    raise InputError(f"{table.path}: no column {wanted}; the columns are {', '.join(table.columns)[:300]}")


def class_columns(table: Table) -> dict[str, int]:
    """Return class name -> column index of the label columns that the table has, by name."""
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

    Given another ``on_problem``, cells that are no labels are noted and count as not mentioned.
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
                        "cell is no label",
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
