"""Experiments as files: a table of rows (flag sets, seeds, data set) in JSON or CSV, and the data sets by name."""

import csv
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules.evaluation.metric_table import METRIC_NAMES, SENTENCE_SCORES
from modules.flags import flags_of_training
from modules.runtime.environment import ROOT
from modules.runtime.errors import InputError

DEFAULT_SEEDS = (7580, 9233, 1234)
TABLE_KEYS = ("title", "note", "dataset", "folds", "text_encoder", "seeds", "columns", "baseline", "flags", "rows")
ROW_KEYS = ("name", "label", "flags", "dataset", "seeds", "baseline", "trained_as", "starts_from", "published")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # of a row or fold: it names a folder
DATASET_KEYS = ("title", "flags", "model_flags", "text_encoder", "prepare")


@dataclass(frozen=True)
class Column:
    """A score of the table: its key in results.json and its heading."""

    key: str
    label: str


@dataclass(frozen=True)
class Row:
    """A flag set that is trained once per seed, with ``starts_from`` onwards from another row's best models; or with
    ``trained_as`` tested on what another row has trained.

    In a table with folds there is one Row per fold.
    """

    name: str  # names the row's folder too; of a fold it is row/fold
    label: str
    flags: tuple[str, ...]  # of the table, then of the row
    dataset: str
    seeds: tuple[int, ...]
    baseline: str  # name of the row that it is compared with, or ""
    published: Mapping[str, float]  # the paper's own figures by key
    published_on: str  # data set that those figures belong to
    trained_as: str = ""  # name of the row whose best models it is tested on; ``flags`` begin with that row's
    starts_from: str = ""  # name of the row whose best models training starts from; ``flags`` begin with that row's

    @property
    def whole(self) -> str:
        """The name that the table gives, of all folds together."""
        return whole(self.name)


@dataclass(frozen=True)
class Table:
    """What one table file says."""

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    text_encoder: str  # for mining; "" leaves it to the data set


@dataclass(frozen=True)
class Step:
    """A file that has to be there before the first run, and the script that makes it."""

    makes: str
    script: str  # in scripts/
    arguments: tuple[str, ...]
    model: str  # the backbone that needs it; "" for all


@dataclass(frozen=True, eq=False)
class DataSet:
    """Flags that a data set brings to every row, and what has to be made before the first run."""

    name: str
    title: str
    flags: tuple[str, ...]
    model_flags: Mapping[str, tuple[str, ...]]  # by --model_name
    text_encoder: str
    prepare: tuple[Step, ...]


def read_table(path: str | Path) -> Table:
    """Read a table from ``path`` (.json or .csv); InputError names the file, the row and what would be right.

    A CSV has the columns name and flags, may have label, dataset, seeds and baseline, and every other column is a
    score of that name with the paper's own figures, or empty.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() == ".csv":
        content = _from_csv(path, text)
    else:
        content = _mapping(_json(path, text), str(path), TABLE_KEYS)
    where = str(path)
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        raise InputError(f'{where}: "rows" must be a list of one row or more, each with a name and flags')
    columns = tuple(_column(where, item) for item in content.get("columns", METRIC_NAMES))
    rows = tuple(_row(f"{where}, row {number}", item, content) for number, item in enumerate(rows, 1))
    _check_rows(where, rows)
    for key in ("starts_from", "trained_as"):  # what is tested may have been trained onwards
        rows = tuple(_with_flags_of_its_model(where, row, rows, key) for row in rows)
    if folds := _folds(where, content):
        rows = tuple(_fold(row, fold) for row in rows for fold in folds)
    return Table(
        name=path.stem,
        title=_string(where, content, "title", path.stem),
        columns=columns,
        rows=rows,
        note=_string(where, content, "note", ""),
        text_encoder=_string(where, content, "text_encoder", ""),
    )


def choose(table: Table, *, dataset: str, seeds: Iterable[int]) -> Table:
    """The table with every row on ``dataset`` and ``seeds``, where these are given."""
    if dataset and any(row.name != row.whole for row in table.rows):
        raise InputError(f'--dataset {dataset}: the table {table.name} names its data sets itself, under "folds"')
    seeds = _seeds("--seeds", list(seeds)) if seeds else ()
    rows = [replace(row, dataset=dataset or row.dataset, seeds=seeds or row.seeds) for row in table.rows]
    # The encoder that a table names is meant for its own data set.
    return replace(table, rows=tuple(rows), text_encoder="" if dataset else table.text_encoder)


def read_datasets(path: str | Path) -> dict[str, DataSet]:
    """The data sets of ``path`` (JSON) by name."""
    content = _mapping(_json(Path(path), _text(Path(path))), str(path))
    found = {}
    for name, item in content.items():
        where = f"{path}, data set {name!r}"
        item = _mapping(item, where, DATASET_KEYS)
        model_flags = {model: _flags(where, flags) for model, flags in item.get("model_flags", {}).items()}
        found[name] = DataSet(
            name,
            _string(where, item, "title", name),
            _flags(where, item.get("flags", "")),
            model_flags,
            _string(where, item, "text_encoder", "tfidf"),
            tuple(_step(where, step) for step in item.get("prepare", [])),
        )
    return found


def _step(where: str, item: Any) -> Step:
    item = _mapping(item, f"{where}, prepare", ("makes", "run", "model"))
    script, *arguments = shlex.split(_string(where, item, "run", "")) or [""]
    # A table from elsewhere may run the project's own commands only.
    if not re.fullmatch(r"scripts/(\w+/)?\w+\.py", script) or not (ROOT / script).is_file():
        raise InputError(f"{where}, prepare: run {script!r} is not a command of this project, scripts/NAME.py")
    return Step(_string(where, item, "makes", ""), script, tuple(arguments), _string(where, item, "model", ""))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'}); expected "
            "a table such as experiments/table3_components.json"
        ) from error


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error


def _from_csv(path: Path, text: str) -> dict[str, Any]:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    header = [name or "" for name in reader.fieldnames or []]
    if "name" not in header or "flags" not in header:
        raise InputError(f"{path}, line 1: a CSV table has the columns name and flags; found {', '.join(header)}")
    scores = [name for name in header if name not in ROW_KEYS]
    rows = []
    for line in reader:
        if None in line or None in line.values():
            raise InputError(
                f"{path}, line {reader.line_num}: has not the {len(header)} fields that line 1 has (flags "
                "with a comma need double quotes)"
            )
        row: dict[str, Any] = {key: line[key] for key in header if key in ROW_KEYS and line[key].strip()}
        row["published"] = {name: line[name] for name in scores if line[name].strip()}
        rows.append(row)
    return {"rows": rows} | ({"columns": scores} if scores else {})


def _mapping(item: Any, where: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(f"{where}: must be an object in braces, found {type(item).__name__}")
    unknown = [key for key in item if keys and key not in keys]
    if unknown:
        raise InputError(f"{where}: {unknown[0]!r} is none of {', '.join(keys)}")
    return item


def _string(where: str, item: Mapping[str, Any], key: str, default: str) -> str:
    value = item.get(key, default)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} must be text, found {type(value).__name__}")
    return value


def _flags(where: str, value: Any) -> tuple[str, ...]:
    """Flags as they stand in a shell, or as a list of words."""
    try:
        words = shlex.split(value) if isinstance(value, str) else [str(word) for word in value]
    except (ValueError, TypeError) as error:
        raise InputError(f'{where}: flags must be text such as "--ithn on --alpha 0.1" ({error})') from error
    if words and not words[0].startswith("--"):
        raise InputError(f"{where}: flags start with --, found {words[0]!r}")
    return tuple(words)


def _seeds(where: str, value: Any) -> tuple[int, ...]:
    try:
        items = value.split() if isinstance(value, str) else [value] if isinstance(value, int) else value
        seeds = tuple(int(item) for item in items)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: seeds must be whole numbers, such as [1, 2, 3]; found {value!r}") from error
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"{where}: seeds must be one or more different numbers of at least 0; found {value!r}")
    return seeds


def _column(where: str, item: Any) -> Column:
    if isinstance(item, str):
        return Column(item, _heading(item))
    item = _mapping(item, f"{where}, columns", ("key", "label"))
    if "key" not in item:
        raise InputError(f'{where}, columns: {item} has no key, such as "BLEU_4"')
    return Column(item["key"], _string(where, item, "label", item["key"]))


def _heading(key: str) -> str:
    """A score's heading in a paper's table: B-4 of BLEU_4, B-4_full of BLEU_4_full."""
    found = max(
        (score for score in SENTENCE_SCORES if key.startswith(score.name)), key=lambda s: len(s.name), default=None
    )
    return key if found is None else (found.heading or found.label) + key.removeprefix(found.name)


def _row(where: str, item: Any, table: Mapping[str, Any]) -> Row:
    item = _mapping(item, where, ROW_KEYS)
    name = _string(where, item, "name", "")
    if not NAME.fullmatch(name):
        raise InputError(f"{where}: name {name!r} must be of letters, digits and . _ + - (it names a folder)")
    where = f"{where} ({name})"
    try:
        published = {key: float(value) for key, value in _mapping(item.get("published", {}), where).items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: published figures must be numbers ({error})") from error
    trained_as, starts_from = (_string(where, item, key, "") for key in ("trained_as", "starts_from"))
    flags = _flags(where, item.get("flags", ""))
    if trained_as and (idle := flags_of_training(flags)):
        raise InputError(
            f"{where}: {idle[0]} acts in training, and this row tests what row {trained_as} has trained; "
            "take it out, or let the row start from that one (starts_from)"
        )
    if not (trained_as or starts_from):  # else they come with the other row's, which may override them
        flags = _flags(where, table.get("flags", "")) + flags
    own_dataset = _string(where, item, "dataset", _string(where, table, "dataset", "iu_xray"))
    return Row(
        name=name,
        label=_string(where, item, "label", name),
        flags=flags,
        dataset=own_dataset,
        published_on=own_dataset,
        seeds=_seeds(where, item.get("seeds", table.get("seeds", DEFAULT_SEEDS))),
        published=published,
        trained_as=trained_as,
        starts_from=starts_from,
        baseline=_string(where, item, "baseline", _string(where, table, "baseline", "")),
    )


def whole(name: str) -> str:
    """The row that ``name``, of a row or of one fold of it, belongs to."""
    return name.partition("/")[0]


def _folds(where: str, table: Mapping[str, Any]) -> list[str]:
    if "folds" not in table:
        return []
    folds = table["folds"]
    if (
        not isinstance(folds, list)
        or not all(isinstance(fold, str) and NAME.fullmatch(fold) for fold in folds)
        or len(folds) < 2
        or len(set(folds)) < len(folds)
    ):
        raise InputError(
            f"{where}: folds must be a list of the names of two or more different data sets, of letters, "
            f"digits and . _ + -; found {folds!r}"
        )
    for key in ("dataset", "published"):
        if key in table or any(key in row for row in table["rows"]):
            raise InputError(f"{where}: folds and {key} exclude each other: every row is run on every fold")
    return folds


def _fold(row: Row, fold: str) -> Row:
    names = {key: getattr(row, key) for key in ("name", "baseline", "trained_as", "starts_from")}
    return replace(
        row, **{key: name and f"{name}/{fold}" for key, name in names.items()}, dataset=fold, published_on=fold
    )


def _with_flags_of_its_model(where: str, row: Row, rows: tuple[Row, ...], key: str) -> Row:
    """``row`` with the flags of the row that ``key`` names before its own."""
    if not (name := getattr(row, key)):
        return row
    fit = {
        other.name: other for other in rows if not other.trained_as and not (key == "starts_from" and other.starts_from)
    }
    if name not in fit or (row.trained_as and row.starts_from):
        kind = "trained" if key == "trained_as" else "trained from the beginning"
        raise InputError(
            f"{where}, row {row.name}: {key} must name one of the rows that are {kind}, {', '.join(fit)}, "
            f"and excludes {'starts_from' if key == 'trained_as' else 'trained_as'}; found {name!r}"
        )
    return replace(row, flags=fit[name].flags + row.flags, dataset=fit[name].dataset)


def _check_rows(where: str, rows: tuple[Row, ...]) -> None:
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: two rows are named {twice[0]!r}; each needs a name of its own")
    for row in rows:
        if row.baseline and row.baseline not in names:
            raise InputError(
                f"{where}, row {row.name}: baseline {row.baseline!r} is none of the rows {', '.join(names)}"
            )
