"""Rows of anybody's table of images and reports: CSV, TSV, JSON, JSON lines, Parquet, pairs of text files."""

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.data.annotations import split_of, unique_keys
from modules.data.report_tables import read_table, read_text
from modules.runtime.errors import InputError
from modules.runtime.input_files import open_regular, read_bytes

MAX_BYTES = 2**32
_TOKEN = re.compile(r"(.+?)#\d+\t(.*)")  # Flickr's: image#number, a tab, the caption
FILE_SPLIT = "file_split"  # a column that every row has: the word for a split in its table's name

Row = dict[str, Any]


def read_user_table(path: Path, rows_at: str = "", names: Collection[str] = ()) -> list[Row]:
    """The rows of one table, each a mapping from column to cell; InputError where it cannot be read.

    ``rows_at`` is the key of a JSON object under which its rows lie; a first line of a CSV file with one of ``names``
    is its header. Every row has the column ``file_split`` ("valid" for valid_captions.csv) too.
    """
    suffix = path.suffix.lower()
    if remedy := _NOT_READ.get(suffix):
        raise InputError(f"{path}: files of this kind are not read; {remedy}")
    if suffix == ".parquet":
        rows = _parquet(path)
    elif suffix in (".json", ".jsonl", ".ndjson"):
        rows = _json(path, rows_at, lines=suffix != ".json")
    elif _TOKEN.fullmatch((text := read_text(path)).split("\n", 1)[0].rstrip("\r")):
        rows = _tokens(path, text)
    else:
        table = read_table(path, names={*_HEADER_NAMES, *(name.strip().lower() for name in names)})
        rows = [dict(zip(_distinct(path, table.columns), row, strict=True)) for row in table.rows]
    if not rows:
        raise InputError(f"{path}: has no rows")
    words = re.split(r"[^A-Za-z]+", path.name.lower())
    about = {FILE_SPLIT: next((word for word in words if split_of(word)), "")}
    return [about | row for row in rows]


def _distinct(path: Path, columns: Sequence[str]) -> list[str]:
    stripped = [name.strip() for name in columns]
    if twice := next((name for name in stripped if name and stripped.count(name) > 1), None):
        raise InputError(f"{path}: two columns are called {twice!r}; rename one of them")
    return stripped


_NOT_READ = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV (UTF-8)"),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz"), "unpack it first"),
}
# A first row with one of these is a header.
_HEADER_NAMES = (
    "image", "images", "image_path", "path", "path_to_image", "filename", "file_name", "imageid", "text", "caption",
    "impression", "indication", "patient_id", "patientid", "subject_id", "studyinstanceuid", "split",
)  # fmt: skip


def read_pairs(paths: Iterable[Path]) -> list[Row]:
    """The rows of files called <split>.<column>.tok, whose lines belong together: one row for each line of a split.

    InputError for other names, or where the files of a split differ in length.
    """
    columns: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        word, _, column = path.name.removesuffix(".tok").partition(".")
        if split_of(word) is None or not column:
            raise InputError(f"{path}: expected a name such as train.report.tok or validate.image.tok")
        columns.setdefault(word, {})[column] = _lines(read_text(path))
    rows: list[Row] = []
    for word, found in columns.items():
        counts = {column: len(lines) for column, lines in found.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{word}.{column}.tok has {count}" for column, count in counts.items())
            raise InputError(f"lines of one split belong together, but {told} lines")
        names = list(found)
        for cells in zip(*found.values(), strict=True):
            row = dict(zip(names, cells, strict=True))
            rows.append({FILE_SPLIT: word} | row)
    return rows


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The cell of a column, or what a dotted path leads to in it; of a list, that of each entry. None without it."""
    if column in row:
        return row[column]
    found: Any = row
    for name in column.split("."):
        if isinstance(found, list):
            found = [entry.get(name) for entry in found if isinstance(entry, Mapping)]
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _lines(text: str) -> list[str]:
    """Lines as an editor counts them: other separators, such as U+2028, may stand inside a text."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _tokens(path: Path, text: str) -> list[Row]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(text), start=1):
        match = _TOKEN.fullmatch(line)
        if line.strip() and match is None:
            raise InputError(f"{path}: line {number} is not image#number, a tab and a caption")
        if match:
            captions.setdefault(match[1], []).append(match[2].strip())
    return [{"image": image, "caption": texts} for image, texts in captions.items()]


def _json(path: Path, rows_at: str, *, lines: bool) -> list[Row]:
    found: list[Any] = []
    try:
        content = _json_text(path)
        if lines:
            found += (json.loads(line, object_pairs_hook=unique_keys) for line in content.split("\n") if line.strip())
        data: Any = found if lines else json.loads(content, object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        at = f"object {len(found) + 1}: " if lines else ""
        raise InputError(f"{path}: cannot be read as JSON: {at}{' '.join(str(error).split())[:200]}") from error
    if rows_at:
        data = data.get(rows_at) if isinstance(data, dict) else None
    if isinstance(data, dict) and all(isinstance(value, list) and split_of(key) for key, value in data.items()):
        data = [_of_split(path, key, row) for key, rows in data.items() for row in rows]
    elif isinstance(data, dict):
        data = [{"key": key} | row if isinstance(row, dict) else row for key, row in data.items()]
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        at = f" under {rows_at!r}" if rows_at else ""
        raise InputError(f"{path}: expected a list of objects, or an object of them by id{at}")
    return data


def _json_text(path: Path) -> str:
    content = read_bytes(path, MAX_BYTES)
    with contextlib.suppress(UnicodeDecodeError):
        if b"\0" not in content:
            return content.decode("utf-8-sig")
    return read_text(path)  # of other encodings


def _of_split(path: Path, key: str, row: Any) -> Any:
    """A row from the list under ``key``, which may say its split as well; InputError where that is another one."""
    own = row.get("split") if isinstance(row, dict) else None
    if own and split_of(str(own)) != split_of(key):
        raise InputError(f"{path}: a row under {key!r} says split {str(own)[:40]!r}; write the one or the other")
    return row | {"split": own or key} if isinstance(row, dict) else row


def _with_texts(table: Any) -> Any:
    """The Arrow table with its binary columns as texts, as far as they hold such: some writers know no other kind."""
    from pyarrow import ArrowInvalid, string, types

    for place, column in enumerate(table.schema):
        if types.is_binary(column.type) or types.is_large_binary(column.type):
            with contextlib.suppress(ArrowInvalid):  # pictures are no UTF-8
                table = table.set_column(place, column.name, table.column(place).cast(string()))
    return table


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs one more package: pip install -r requirements/parquet.txt") from error
    try:
        with open_regular(path, MAX_BYTES) as file:
            return _with_texts(parquet.read_table(file)).to_pylist()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError, OverflowError, ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error
