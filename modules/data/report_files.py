"""Reports of anybody's systems: CSV, JSON lists and objects, JSON lines, this project's and ReXrank's exports.

A file becomes a table of ids (modules.data.report_tables) and the texts of each row: one, or several captions.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules.data.annotations import split_of
from modules.data.report_tables import (
    FIELDS,
    FIELDS_OF_BOTH,
    ID_COLUMNS,
    JSON_SUFFIXES,
    MISSING,
    TEXT_NAMES,
    Table,
    plain,
    read_rows,
    read_table,
    read_text,
)
from modules.data.row_matching import matching_rows
from modules.runtime.errors import InputError

# Of a folder that main_test.py or R2Gen wrote.
_IN_FOLDER = {"gts": "gts.csv", "res": "res.csv"}
_STUDY, _SUBJECT, _PRIOR = ("study_id",), ("subject_id", "patient_id"), ("prior",)


@dataclass(frozen=True)
class ReportFile:
    """N rows: their ids and other cells, and the texts of each, of which there are several only for captions."""

    table: Table
    texts: list[list[str]]
    is_named: bool = False  # whether a user named the column of the texts

    @property
    def path(self) -> str:
        """The file's name."""
        return self.table.path

    def column(self, names: Sequence[str]) -> list[str]:
        """The cells (N,) of the first column of these names, "" where there is none and where a word says so."""
        place = self.table.find(*names)
        if place is None:
            return [""] * len(self.texts)
        cells = (row[place].strip() for row in self.table.rows)
        return ["" if cell.lower() in MISSING else cell for cell in cells]

    @property
    def ids(self) -> list[str]:
        """The rows' ids, or their numbers from 1 where the file has none."""
        place = self.table.find(*ID_COLUMNS)
        if place is None:
            return [str(number) for number, _ in enumerate(self.texts, start=1)]
        return [row[place].strip() for row in self.table.rows]

    @property
    def studies(self) -> list[str]:
        """The rows' studies: their column, else the ids; empty where the file has neither."""
        if self.table.find(*_STUDY, *ID_COLUMNS) is None:
            return []
        return [study or row for study, row in zip(self.column(_STUDY), self.ids, strict=True)]

    @property
    def subjects(self) -> list[str]:
        """The rows' patients, "" where not known."""
        return self.column(_SUBJECT)

    @property
    def with_prior(self) -> list[bool] | None:
        """Which rows name the patient's previous record; None where no row does."""
        found = [bool(prior) for prior in self.column(_PRIOR)]
        return found if any(found) else None


def file_in(path: str | Path, side: str) -> Path:
    """The file of reports that ``path`` is, or that is in it where it is a run's folder."""
    path = Path(path)
    return path / _IN_FOLDER[side] if path.is_dir() else path


def read_reports(
    path: str | Path, side: str, *, column: str = "", split: str = "test", captions: bool = False
) -> ReportFile:
    """Read the reports in ``path``; ``side`` is "gts" (references) or "res" (generated): which field is theirs.

    ``column`` names the field instead. Of an annotation.json ``split`` is read; with ``captions`` a row may have
    several texts, and rows of one id are joined. InputError for a file that cannot be read, or whose field of texts
    cannot be told.
    """
    path = file_in(path, side)
    names = _names(side, column)
    if _is_json(path):
        found = _Records(str(path), names, split).read(read_text(path))
    elif captions and side == "gts" and not column and (rows := _bare_captions(path)):
        return ReportFile(Table(str(path), [], [[] for _ in rows]), rows)
    else:
        table = _of_split(read_table(path, names=(*names, *_SUBJECT)), split)
        place = text_column(table, side, column)
        found = ReportFile(table, [[row[place]] for row in table.rows])
    if captions and side == "gts":
        return _joined(found)
    found = replace(_without_pandas_words(found), is_named=bool(column))
    several = [key for key, texts in zip(found.ids, found.texts, strict=True) if len(texts) != 1]
    if several:
        raise InputError(
            f"{path}: id {several[0]} has several texts ({len(several)} have); that is for "
            "--cleaner coco; an id and its text are written {id: text}"
        )
    return found


def align(references: ReportFile, generated: ReportFile) -> ReportFile:
    """``generated`` in the order of the references: by ids where both have some, else row by row.

    InputError where rows cannot be joined, or where the generated reports may be copies of the references.
    """
    rows = matching_rows(references.table, generated.table)
    table = Table(generated.path, generated.table.columns, [generated.table.rows[row] for row in rows])
    found = replace(generated, table=table, texts=[generated.texts[row] for row in rows])
    if not found.is_named:
        refuse_copies(*([texts[0] for texts in file.texts if texts] for file in (references, found)), table)
    return found


def refuse_copies(references: Sequence[str], texts: Sequence[str], table: Table) -> None:
    """InputError where ``texts``, read from ``table``, are the references and another column has other texts."""
    if list(texts) != list(references):
        return
    for place, title in enumerate(table.columns):
        cells = [row[place] for row in table.rows]
        several = sum(len(cell.split()) > 2 for cell in cells)
        if cells != list(references) and (plain(title) in TEXT_NAMES or 2 * several >= len(cells)):
            raise InputError(
                f"{table.path}: the texts that are read as generated are the references in every row, and its column "
                f"{title.strip()!r} has other texts: name the column of the generated reports with --res_column"
            )


def _is_json(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return True
    return suffix not in (".csv", ".tsv") and read_text(path).lstrip()[:1] in ("[", "{")


def _names(side: str, column: str) -> tuple[str, ...]:
    return (plain(column),) if column else (*FIELDS[side], *FIELDS_OF_BOTH)


def text_column(table: Table, side: str, column: str = "") -> int:
    """Index of the column of the reports of ``side`` ("gts" or "res"), or of the one called ``column``.

    Which one is said where there are several, of which numbers are none. InputError where there is none, or two of
    the same name.
    """
    names = _names(side, column)
    places = [place for name in names if (place := table.find(name)) is not None]
    place = next((place for place in places if not _are_numbers(table, place)), places[0] if places else None)
    if place is None:
        wanted = repr(column) if column else "such as 'report'"
        raise InputError(
            f"{table.path}: no column {wanted}; its columns are {', '.join(table.columns)[:200]}: name the one of "
            "reports with --gts_column or --res_column"
        )
    columns = [plain(title) for title in table.columns]
    if columns.count(columns[place]) > 1:
        raise InputError(f"{table.path}: two columns are called {table.columns[place].strip()!r}; rename one of them")
    if others := [name for name in columns if name in names and name != columns[place]]:
        chosen = table.columns[place]
        print(f"note: {table.path}: {chosen!r} is read as the reports; it has {', '.join(others)} too", file=sys.stderr)
    return place


def _of_split(table: Table, split: str) -> Table:
    """The rows of one split, where a column tells several."""
    place = table.find("split")
    if place is None:
        return table
    kept = _rows_of_split(table.path, [row[place] for row in table.rows], split)
    return Table(table.path, table.columns, [table.rows[row] for row in kept])


def _rows_of_split(path: str, words: Sequence[str], split: str) -> Sequence[int]:
    """The rows whose word is of ``split``; all where the words tell no splits, or one that is to be scored."""
    splits = [split_of(word) for word in words]
    found = dict.fromkeys(filter(None, splits))
    if not found or (len(set(splits)) == 1 and split != "train"):
        return range(len(words))
    kept = [row for row, own in enumerate(splits) if own == split]
    if not kept:
        raise InputError(f"{path}: has no rows of split {split!r}; it has {', '.join(found)}")
    if len(kept) < len(words):
        print(f"note: {path}: {len(kept)} of {len(words)} records are of split {split}", file=sys.stderr)
    return kept


def _are_numbers(table: Table, place: int) -> bool:
    cells = [cell for row in table.rows if (cell := row[place].strip())]
    return bool(cells) and all(re.fullmatch(r"[-+]?\d+(?:\.\d*)?", cell) for cell in cells)


def _without_pandas_words(found: ReportFile) -> ReportFile:
    """Texts that pandas, R or a spreadsheet writes for a missing one become empty reports, with a note."""
    rows = [row for row, texts in enumerate(found.texts) if texts and texts[0].strip().lower() in MISSING]
    if not rows:
        return found
    shown = f"the report of {found.ids[rows[0]]} is {found.texts[rows[0]][0].strip()!r}"
    print(f"note: {found.path}: {shown}; {len(rows)} such count as empty reports", file=sys.stderr)
    texts = [[""] if row in set(rows) else own for row, own in enumerate(found.texts)]
    return ReportFile(found.table, texts)


def _bare_captions(path: Path) -> list[list[str]]:
    """The captions of a gts.csv of a run on captions: a row each, no header; empty where there is a header."""
    rows = [[cell for cell in row if cell] for row in read_rows(path)]
    known = {*FIELDS["gts"], *FIELDS_OF_BOTH, *ID_COLUMNS}
    return [] if rows and known & {cell.strip().lower() for cell in rows[0]} else rows


def _joined(found: ReportFile) -> ReportFile:
    """Rows of one id as one row with all their texts, in the order of the first of each."""
    if found.table.find(*ID_COLUMNS) is None:
        return found
    first: dict[str, int] = {}
    texts: list[list[str]] = []
    rows = []
    for key, row, own in zip(found.ids, found.table.rows, found.texts, strict=True):
        if key not in first:
            first[key] = len(texts)
            texts.append([])
            rows.append(row)
        texts[first[key]] += own
    return ReportFile(Table(found.path, found.table.columns, rows), texts)


class _Records:
    """Reads the shapes of JSON in which reports are kept."""

    def __init__(self, path: str, names: Sequence[str], split: str):
        self.path, self.names, self.split = path, names, split

    def read(self, text: str) -> ReportFile:
        records = list(self._records(self._parse(text)))
        if not records:
            raise InputError(f"{self.path}: holds no reports")
        columns = list(dict.fromkeys(name for cells, _ in records for name in cells))
        rows = [[cells.get(name, "") for name in columns] for cells, _ in records]
        return ReportFile(Table(self.path, columns, rows), [texts for _, texts in records])

    def _parse(self, text: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=self._unique)
        except RecursionError:
            raise InputError(f"{self.path}: the JSON is nested too deeply") from None
        except ValueError as error:
            lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]  # U+2028 may stand inside a text
            if len(lines) < 2 or not _is_value(lines[0]):
                raise InputError(f"{self.path}: not valid JSON: {error}") from None
        found = []
        for number, line in enumerate(lines, start=1):  # JSON lines
            try:
                found.append(json.loads(line, object_pairs_hook=self._unique))
            except ValueError as error:
                raise InputError(f"{self.path}: line {number} is not valid JSON: {error}") from None
        return found

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # JSON readers keep the last of two equal keys
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{self.path}: id or key {twice} is there twice")
        return found

    def _records(self, data: Any) -> Iterable[tuple[dict[str, str], list[str]]]:
        """(cells by column, texts) of each record."""
        if isinstance(data, Mapping):
            if any(isinstance(value, str) for name, value in data.items() if plain(name) in self.names):
                data = [data]  # a record, as JSON lines of one line have it
            elif data and all(map(split_of, data)):
                key = next((key for key in data if split_of(key) == self.split), "")
                if not isinstance(data.get(key), list):
                    raise InputError(f"{self.path}: has no split {self.split!r}; it has {', '.join(data)}")
                data = data[key]
            elif isinstance(data.get("annotations"), list):  # COCO's references
                data = [_without_number(item) for item in data["annotations"]]
            elif len(data) == 1 and isinstance(inner := next(iter(data.values())), list) and _are_objects(inner):
                data = inner
        if isinstance(data, Mapping):
            self._check_shape(data)
            entries = [(f"id {key}", key, item) for key, item in data.items()]
        elif isinstance(data, list):
            entries = [(f"record {number}", None, item) for number, item in enumerate(data, start=1)]
        else:
            raise InputError(f"{self.path}: holds neither a list nor an object of reports")
        if entries and _are_objects([item for _, _, item in entries]):
            words = [str(item.get("split") or "") for _, _, item in entries]
            entries = [entries[row] for row in _rows_of_split(self.path, words, self.split)]
        for where, key, item in entries:
            yield self._record(item, where, key)

    def _check_shape(self, data: Mapping[str, Any]) -> None:
        """InputError for an object whose keys are no ids: of pandas, or with several lists."""
        lists = [value for value in data.values() if isinstance(value, list)]
        of_pandas = {"columns", "data"} <= data.keys() or any(
            plain(name) in self.names and isinstance(value, Mapping) for name, value in data.items()
        )
        if of_pandas or any(isinstance(entry, (Mapping, list)) for value in lists for entry in value):
            raise InputError(
                f"{self.path}: is an object with {', '.join(map(str, data))[:120]}, where ids of reports are expected; "
                "an object of texts by id is read, a list of records (of pandas: orient='records'), such a list under "
                "one key, and an annotation.json"
            )

    def _record(self, item: Any, where: str, key: str | None) -> tuple[dict[str, str], list[str]]:
        cells = {} if key is None else {"id": key}
        if isinstance(item, Mapping):
            item = {plain(str(name)): value for name, value in item.items()}
            fields = [name for name in self.names if name in item and not isinstance(item[name], (int, float))]
            fields = fields or [name for name in self.names if name in item]
            own = {name: cell for name in item if name not in fields[:1] and (cell := _cell(item[name]))}
            if key is not None and "id" in own:  # the key may be a row number, as pandas writes it
                cells = {"index": key}
            cells |= own
            if "id" in own:
                where = f"id {own['id']}"
            if not fields:
                raise InputError(
                    f"{self.path}: {where} has none of the fields {', '.join(self.names)[:120]}; it has "
                    f"{', '.join(map(str, item))[:200]}: name the one of reports with --gts_column or --res_column"
                )
            item = item[fields[0]]
        texts = item if isinstance(item, list) else [item]
        if not texts or not all(isinstance(text, str) for text in texts):
            kind = "null" if None in texts else "not a text"
            raise InputError(f'{self.path}: {where}: its report is {kind}; an empty report is written ""')
        return cells, list(texts)


def _without_number(item: Any) -> Any:
    """A caption of COCO's file without the caption's own number; its image's is what counts."""
    return {name: item[name] for name in item if name != "id"} if isinstance(item, Mapping) else item


def _cell(value: Any) -> str:
    """A field of a record as a cell of a table, a list of texts as lines; "" for what is no id, such as an object."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of ids in a column with gaps
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return "\n".join(value)
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def _is_value(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _are_objects(values: list) -> bool:
    return all(isinstance(value, Mapping) for value in values)
