"""CSV files of reports, as other programs and people write them: with or without a header, ids, a byte order mark.

What can be read in one way only is read, with a line on stderr where that is not plain; anything else is refused with
its cause. Reports themselves are never quoted.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from modules.runtime.errors import InputError, Problem, raise_problem
from modules.runtime.input_files import read_bytes

REPORT_COLUMNS = ("report", "reports", "findings", "report impression")  # the last is CheXbert's
ID_COLUMNS = ("id", "dicom_id", "image_id", "image_path", "study_id")  # the finest first
# What a column or a JSON field of texts is called, by what it holds; the first that is there is read.
FIELDS = {
    "gts": ("reference", "references", "reference_report", "ground_truth", "gt", "gt_report", "target"),
    "res": (
        *("model_prediction", "generated", "generated_report", "generated_text", "generation", "prediction"),
        *("predictions", "predicted_report", "predicted", "pred", "preds", "pred_report", "candidate", "hypothesis"),
        *("hyp", "response", "model_output", "output", "result"),
    ),
}
FIELDS_OF_BOTH = (*REPORT_COLUMNS, "section_findings", "caption", "captions", "text")
TEXT_NAMES = frozenset({*FIELDS["gts"], *FIELDS["res"], *FIELDS_OF_BOTH})
MAX_BYTES = 2**30
# What pandas, R and spreadsheets write for a cell without a value, in small letters.
MISSING = frozenset({"nan", "none", "null", "na", "n/a", "<na>", "nat"})
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_JSON = re.compile(r'\s*(?:\{\s*"|\[\s*[{"])')
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[^\S\n]*\n', re.IGNORECASE)  # Excel's first line, which is no row
_MAX_NAME = 40  # letters of a column's name
_SEPARATORS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file as text; ``path`` is for error messages."""

    path: str
    columns: list[str]
    rows: list[list[str]]

    def find(self, *names: str) -> int | None:
        """The index of the first of ``names`` that is a column, whatever its case and the spaces around it."""
        columns = [plain(column) for column in self.columns]
        return next((columns.index(name) for name in names if name in columns), None)


def read_table(
    path: str | Path, names: Collection[str] = (), on_problem: Callable[[Problem], None] = raise_problem
) -> Table:
    """Read a CSV file whose rows all have as many cells.

    A first row with one of REPORT_COLUMNS, of ID_COLUMNS or of ``names`` (in small letters) is its header; without
    one, a single column is called report, and two are id and report where they look so. In a single column, a blank
    line is an empty report. InputError for a file that cannot be read; given another ``on_problem``, rows of another
    length are passed to it and left out.
    """
    path, text = str(path), read_text(path)
    if Path(path).suffix.lower() in JSON_SUFFIXES or _JSON.match(text):
        raise InputError(
            f"{path}: is JSON, and a CSV file is read here; scripts/score.py reads reports in JSON, "
            "scripts/label_reports.py an annotation.json"
        )
    known = {*REPORT_COLUMNS, *ID_COLUMNS, *names}
    if said := _SEPARATOR_LINE.match(text):
        text, separator = text[said.end() :], said[1]
    else:
        separator = _separator(path, text, known)
    rows = list(_parse(path, text, separator))
    if not any(rows):
        raise InputError(f"{path}: the file is empty; a CSV file of reports is needed")
    columns = next(row for row in rows if row)
    first = rows.index(columns) + 1
    if known.isdisjoint(map(plain, columns)):
        columns, first = _columns_without_header(path, rows)
    rows = [row or [""] for row in rows[first:]] if len(columns) == 1 else [row for row in rows[first:] if row]
    if len(columns) == 1 and (blank := rows.count([""])):
        _say(f"{path}: {blank} blank line(s) or empty cell(s) count as empty reports")
    return Table(path, columns, list(_of_equal_length(path, columns, rows, on_problem)))


def read_rows(path: str | Path) -> list[list[str]]:
    """The rows of a CSV file without a header that may differ in length, such as captions; InputError as above."""
    return list(_parse(str(path), read_text(path), ","))


def read_text(path: str | Path) -> str:
    """The text of a file, whatever its encoding; InputError where it cannot be read."""
    return _decode(str(path), _read(str(path)))


def _columns_without_header(path: str, rows: list[list[str]]) -> tuple[list[str], int]:
    """The names of the columns of a file whose first row has no known name, and how many rows that takes."""
    filled = [row for row in rows if row]
    widths = {len(row) for row in filled}
    if widths == {1}:
        return ["report"], 0
    named = len(widths) == 1 and _look_like_names(filled[0])
    # "CXR7,normal" is a study, "case,gold" is none.
    if widths == {2} and _look_like_ids([row[0] for row in filled]) and (not named or re.search(r"\d", filled[0][0])):
        _say(f"{path}: has no header; its columns are taken for id and report")
        return ["id", "report"], 0
    if named:
        return filled[0], rows.index(filled[0]) + 1  # names that this reader does not know
    counts = f"{min(widths)} to {max(widths)}" if len(widths) > 1 else f"{min(widths)}"
    raise InputError(
        f"{path}: its first row names no column such as 'report' or 'id', and its rows have {counts} cells; give it a "
        "header, and quotation marks around reports with commas"
    )


def _look_like_names(row: list[str]) -> bool:
    return not any(len(cell) > _MAX_NAME or cell.rstrip().endswith(".") for cell in row)


def _look_like_ids(cells: list[str]) -> bool:
    return len(set(cells)) == len(cells) and not any(" " in cell.strip() or not cell.strip() for cell in cells)


def _of_equal_length(path: str, columns: list[str], rows: list[list[str]], on_problem) -> Iterator[list[str]]:
    for number, row in enumerate(rows, start=1):
        if len(row) == len(columns):
            yield row
        else:
            cells = f"row {number} has {len(row)} cells where the header has {len(columns)}"
            on_problem(Problem("row of another length", f"{path}: {cells}", path))


def _read(path: str) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(path: str, content: bytes) -> str:
    """The text in UTF-8 or UTF-16, with a byte order mark or without; Windows-1252 where it can be nothing else."""
    encoding = "utf-8-sig"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in content:
        places = {place % 2 for place, byte in enumerate(content[:200]) if byte == 0}
        if len(places) != 1 or content[:200].count(0) < min(len(content), 200) // 3:
            raise InputError(f"{path}: holds NUL bytes, which no text has; it is damaged, or not a CSV file")
        encoding = "utf-16-be" if places == {0} else "utf-16-le"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise InputError(f"{path}: damaged UTF-16 text (byte {error.start})") from None
        where = error.start
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text (byte {where}); save it as UTF-8") from None
    _say(f"{path}: not UTF-8 text (byte {where}); read as Windows-1252. Save it as UTF-8 where letters come out wrong")
    return text


def _separator(path: str, text: str, known: Collection[str]) -> str:
    """What separates cells: a comma, unless known names, or ids and reports, come apart with another sign only."""
    start = text.lstrip("\r\n")
    for separator, sign in _SEPARATORS.items():
        first = next(_parse(path, start, separator, strict=False), [])
        if not set(known).isdisjoint(map(plain, first)):
            if separator != "," and not path.lower().endswith(".tsv"):
                _say(f"{path}: its columns are separated by {sign}, not by commas, and are read so")
            return separator
    for separator in (";", "\t"):
        rows = [row for row in _parse(path, start, separator, strict=False) if row]
        widths = {len(row) for row in rows}
        alike = len(rows) > 1 and len(widths) == 1
        pairs = alike and widths == {2} and _look_like_ids([row[0] for row in rows])
        if pairs or (alike and min(widths) > 2 and _look_like_names(rows[0])):
            _say(f"{path}: its columns are separated by {_SEPARATORS[separator]}, not by commas, and are read so")
            return separator
    return ","


def _parse(path: str, text: str, separator: str, strict: bool = True) -> Iterator[list[str]]:
    number = 0
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=strict):
            number += 1
            yield row
    except csv.Error as error:
        cause = str(error)
        if "unexpected end" in cause:
            cause = "a quotation mark is never closed"
        elif "expected after" in cause:
            cause = "a quotation mark inside a quoted cell must be doubled"
        raise InputError(f"{path}: cannot be read as CSV, in row {number + 1} or after it: {cause}") from None


def plain(name: str) -> str:
    """A column's name without regard to case and the spaces around it."""
    return name.strip().lower()


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
