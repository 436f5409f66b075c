"""Experiments as JSON files: a table of rows (flag sets, seeds, data set), and the data sets by name."""

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
from modules.runtime.input_files import read_json

DEFAULT_SEEDS = [7580, 9233, 1234]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # of a row or fold: it names a folder


@dataclass(frozen=True)
class Row:
    """A flag set, trained once per seed; in a table with folds there is one Row per fold, named row/fold.

    With ``starts_from``, training starts from another row's best models; with ``trained_as``, the row only tests what
    another row has trained. In both cases ``flags`` begin with the other row's.
    """

    name: str
    label: str
    flags: tuple[str, ...]
    dataset: str
    baseline: str = ""  # name of the row that it is compared with
    published: Mapping[str, float] | None = None  # the paper's figures by key
    published_on: str = ""  # data set of those figures
    trained_as: str = ""
    starts_from: str = ""

    @property
    def whole(self) -> str:
        """The name without the fold."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Table:
    """The content of a table file; ``columns`` maps the keys of scores to headings."""

    name: str
    title: str
    note: str
    columns: Mapping[str, str]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    text_encoder: str  # for mining; "" leaves it to the data set


@dataclass(frozen=True)
class Step:
    """A file that must exist before the first run, and the script that makes it."""

    makes: str
    script: str  # below the project's folder
    arguments: tuple[str, ...]
    model: str  # the backbone that needs it; "" for all


@dataclass(frozen=True, eq=False)
class DataSet:
    """Flags that a data set adds to every row, and what has to be made before the first run."""

    name: str
    title: str
    flags: tuple[str, ...]
    model_flags: Mapping[str, tuple[str, ...]]  # by --model_name
    text_encoder: str
    prepare: tuple[Step, ...]


def read_table(path: str | Path) -> Table:
    """Read a table; InputError names the file, the row and what would be right."""
    where, empty = str(path), {"title": Path(path).stem, "note": "", "text_encoder": "", "dataset": "iu_xray"}
    empty |= {
        "flags": "",
        "baseline": "",
        "columns": list(METRIC_NAMES),
        "seeds": DEFAULT_SEEDS,
        "folds": [],
        "rows": [],
    }
    content = _read_json(Path(path))
    found = _entries(where, content, **empty)
    if not found["rows"]:
        raise InputError(f'{where}: "rows" must list one row or more, each with a name and flags')
    rows = [_row(f"{where}, row {number}", item, found) for number, item in enumerate(found["rows"], 1)]
    names = [row.name for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{where}: two rows are named {min(twice)!r}")
    for row in rows:
        if row.baseline and row.baseline not in names:
            raise InputError(f"{where}, row {row.name}: baseline {row.baseline!r} is not one of {', '.join(names)}")
    for key in ("starts_from", "trained_as"):  # a row that is only tested may test one that starts from a third
        rows = [_with_flags_of_its_model(where, row, rows, key) for row in rows]
    if "folds" in content:
        rows = [_fold(row, fold) for row in rows for fold in _folds(where, content)]
    columns = dict(_column(where, item) for item in found["columns"])
    texts = [found[key] for key in ("title", "note")]
    return Table(Path(path).stem, *texts, columns, _seeds(where, found["seeds"]), tuple(rows), found["text_encoder"])


def choose(table: Table, *, dataset: str = "", seeds: Iterable[int] = ()) -> Table:
    """The table with every row on ``dataset`` and with ``seeds``, if given.

    InputError where the table names its data sets itself.
    """
    if dataset and any(row.name != row.whole for row in table.rows):
        raise InputError(f'--dataset {dataset}: the table {table.name} names its data sets itself, under "folds"')
    seeds = _seeds("--seeds", list(seeds) or list(table.seeds))
    rows = tuple(replace(row, dataset=dataset or row.dataset) for row in table.rows)
    # The encoder that a table names is meant for its own data set.
    return replace(table, rows=rows, seeds=seeds, text_encoder="" if dataset else table.text_encoder)


def read_datasets(path: str | Path) -> dict[str, DataSet]:
    """The data sets of ``path`` by name."""
    found = {}
    for name, item in _entries(str(path), _read_json(Path(path))).items():
        where = f"{path}, data set {name!r}"
        own = _entries(where, item, title=name, flags="", model_flags={}, text_encoder="tfidf", prepare=[])
        model_flags = {model: _flags(where, flags) for model, flags in own["model_flags"].items()}
        steps = tuple(_step(where, step) for step in own["prepare"])
        found[name] = DataSet(name, own["title"], _flags(where, own["flags"]), model_flags, own["text_encoder"], steps)
    return found


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{path}: cannot be read ({reason})") from error


def _entries(where: str, item: Any, **defaults: Any) -> dict[str, Any]:
    """The entries of a JSON object, each of the type of its default; without defaults any are accepted."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: must be an object in braces, found {type(item).__name__}")
    for key, value in item.items() if defaults else ():
        if key not in defaults:
            raise InputError(f"{where}: {key!r} is not one of {', '.join(defaults)}")
        if not isinstance(value, type(defaults[key])):
            kinds = {str: "text", list: "a list", dict: "an object in braces"}
            raise InputError(f"{where}: {key} must be {kinds[type(defaults[key])]}, found {type(value).__name__}")
    return {**defaults, **item}


def _flags(where: str, text: Any) -> tuple[str, ...]:
    try:
        words = shlex.split(text)
    except (ValueError, AttributeError) as error:
        raise InputError(f'{where}: flags must be text such as "--ithn on --alpha 0.1" ({error})') from error
    if words and not words[0].startswith("--"):
        raise InputError(f"{where}: flags start with --, found {words[0]!r}")
    return tuple(words)


def _seeds(where: str, seeds: list) -> tuple[int, ...]:
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"{where}: seeds must be different whole numbers of at least 0; found {seeds!r}")
    return tuple(seeds)


def _column(where: str, item: Any) -> tuple[str, str]:
    if isinstance(item, str):
        return item, _heading(item)
    found = _entries(f"{where}, columns", item, key="", label="")
    if not found["key"]:
        raise InputError(f'{where}, columns: {item} has no key, such as "BLEU_4"')
    return found["key"], found["label"] or found["key"]


def _heading(key: str) -> str:
    """A score's heading in a paper's table: B-4 of BLEU_4, B-4_full of BLEU_4_full."""
    fitting = [score for score in SENTENCE_SCORES if key.startswith(score.name)]
    score = max(fitting, key=lambda score: len(score.name), default=None)
    return key if score is None else (score.heading or score.label) + key.removeprefix(score.name)


def _step(where: str, item: Any) -> Step:
    found = _entries(f"{where}, prepare", item, makes="", run="", model="")
    try:
        script, *arguments = shlex.split(found["run"]) or [""]
    except ValueError as error:
        raise InputError(f"{where}, prepare: run must be a command ({error})") from error
    # A table from elsewhere may run the project's own commands only.
    if not re.fullmatch(r"scripts/(\w+/)?\w+\.py", script) or not (ROOT / script).is_file():
        raise InputError(f"{where}, prepare: run {script!r} is not a command of this project, scripts/NAME.py")
    return Step(found["makes"], script, tuple(arguments), found["model"])


def _row(where: str, item: Any, table: Mapping[str, Any]) -> Row:
    texts = dict.fromkeys(("name", "label", "flags", "trained_as", "starts_from"), "")
    found = _entries(where, item, **texts, dataset=table["dataset"], baseline=table["baseline"], published={})
    name, trained_as = found["name"], found["trained_as"]
    if not NAME.fullmatch(name):
        raise InputError(f"{where}: name {name!r} must consist of letters, digits and . _ + - (it names a folder)")
    where = f"{where} ({name})"
    if not all(isinstance(value, (int, float)) for value in found["published"].values()):
        raise InputError(f"{where}: published figures must be numbers")
    flags = _flags(where, found["flags"])
    if trained_as and (idle := flags_of_training(flags)):
        raise InputError(
            f"{where}: {idle[0]} acts in training, and this row tests what row {trained_as} has trained; remove it, or "
            "let the row start from that one (starts_from)"
        )
    if not (trained_as or found["starts_from"]):  # else they come with the other row's, which may override them
        flags = _flags(where, table["flags"]) + flags
    return Row(
        name=name,
        label=found["label"] or name,
        flags=flags,
        dataset=found["dataset"],
        baseline=found["baseline"],
        published=found["published"],
        published_on=found["dataset"],
        trained_as=trained_as,
        starts_from=found["starts_from"],
    )


def _with_flags_of_its_model(where: str, row: Row, rows: list[Row], key: str) -> Row:
    """``row`` with the flags of the row that ``key`` names before its own."""
    if not (name := getattr(row, key)):
        return row
    fit = {other.name: other for other in rows if not other.trained_as}
    if key == "starts_from":
        fit = {name: other for name, other in fit.items() if not other.starts_from}
    if name not in fit or (row.trained_as and row.starts_from):
        kind = "trained" if key == "trained_as" else "trained from the beginning"
        raise InputError(
            f"{where}, row {row.name}: {key} must name a row that is {kind} ({', '.join(fit)}), and excludes "
            f"{'starts_from' if key == 'trained_as' else 'trained_as'}; found {name!r}"
        )
    return replace(row, flags=fit[name].flags + row.flags, dataset=fit[name].dataset)


def _folds(where: str, table: Mapping[str, Any]) -> list[str]:
    folds = table["folds"]
    named = all(isinstance(fold, str) and NAME.fullmatch(fold) for fold in folds)
    if not named or len(folds) < 2 or len(set(folds)) < len(folds):
        raise InputError(f"{where}: folds must list the names of two or more different data sets; found {folds!r}")
    for key in ("dataset", "published"):
        if key in table or any(key in row for row in table["rows"]):
            raise InputError(f"{where}: folds and {key} exclude each other: every row is run on every fold")
    return folds


def _fold(row: Row, fold: str) -> Row:
    names = {key: getattr(row, key) for key in ("name", "baseline", "trained_as", "starts_from")}
    names = {key: name and f"{name}/{fold}" for key, name in names.items()}
    return replace(row, **names, dataset=fold, published_on=fold)
