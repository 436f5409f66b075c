"""Finished runs as JSON files of numbers, small enough to be committed: every table can be made from them again.

A file holds a run's settings, scores and per-report statistics; no text and no id. Unpacked into the folder of the
run, it counts as done there, and tables read it as they would read the run.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modules.evaluation.report_statistics import ReportStatistics, load_statistics, numbered, save_statistics
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_bytes, read_json
from modules.runtime.records import private_folder, write_results
from scripts.experiments.plan import (
    CHANGED,
    DONE,
    FILES,
    MISSING,
    RESULTS,
    Run,
    comparable_settings,
    differences,
    settings_of,
    shown,
)
from scripts.experiments.tables import MODEL, STATISTICS

HISTORY, GENERATED = "history.json", "res.csv"
DIGITS = 6  # of a score of one report
UNITS = ("studies", "patients")
PROVENANCE = ("annotation_sha256", FILES, "checkpoint_sha256", "git", "device_name")


def kept_file(keep: Path, row: str, seed: int) -> Path:
    """Where the numbers of a row's run are kept."""
    return keep / f"{row.replace('/', '_')}_{seed}.json"


def restore(runs: Sequence[Run], keep: Path) -> None:
    """Unpack what is kept of runs that have not begun here; InputError for a file of another kind."""
    for run in runs:
        if run.state == MISSING and (path := kept_file(keep, run.row.name, run.seed)).is_file():
            unpack(path, run.folder)


def counted(runs: Sequence[Run], keep: Path) -> list[Run]:
    """``runs``, of which those whose numbers are kept are done, or changed if they were made with other settings."""
    return [_as_kept(run, keep) for run in runs]


def _as_kept(run: Run, keep: Path) -> Run:
    path = kept_file(keep, run.row.name, run.seed)
    if run.state != MISSING or not path.is_file():
        return run
    content = read_kept(path)
    found = settings_of(content["settings"], content["provenance"])
    if differing := differences(found, run.settings):
        return replace(run, state=CHANGED, reason=f"{path}: {shown(differing, found, run.settings)}")
    return replace(run, state=DONE, reason="kept")


def pack_finished(runs: Sequence[Run], keep: Path) -> None:
    """Keep the numbers of finished runs that are not kept yet, or only of other settings."""
    for run in runs:
        if run.state == DONE and _as_kept(replace(run, state=MISSING), keep).state != DONE:
            pack(run, keep)


def pack(run: Run, keep: Path) -> Path:
    """Write the numbers of a finished run below ``keep``; InputError where its folder lacks a file."""
    try:
        content = read_json(run.folder / RESULTS)
        # A row that tests another row's models has no history of its own.
        history = [] if run.weights else read_json(run.folder / HISTORY)
        texts = csv.reader(io.StringIO(read_bytes(run.folder / GENERATED, MAX_ANNOTATION).decode()))
    except (OSError, ValueError) as error:
        raise InputError(f"{run.name}: its numbers cannot be kept ({error})") from error
    systems = load_statistics(run.folder / STATISTICS)
    first = next(iter(systems.values()))
    packed = {
        "row": run.row.name,
        "seed": run.seed,
        "settings": comparable_settings(content["config"]),
        "provenance": {name: content["provenance"][name] for name in PROVENANCE if name in content["provenance"]},
        "synthetic": bool(content.get("synthetic")),
        "history": [_numbers(epoch) for epoch in history],
        "scores": {system: _numbers(content["test"][system]) for system in systems},
        "variety": {system: _numbers(content.get("variety", {}).get(system, {})) for system in systems},
        "texts": numbered([row[0] if row else "" for row in texts]).tolist(),  # equal numbers: equal texts
        "references": [first.references, first.full_references],
        "targets": first.targets,
        "tag": first.tag,
        "units": {name: None if (rows := getattr(first, name)) is None else rows.tolist() for name in UNITS},
        "statistics": {system: _columns(statistics) for system, statistics in systems.items()},
    }
    keep.mkdir(parents=True, exist_ok=True)
    path = kept_file(keep, run.row.name, run.seed)
    lines = (f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in packed.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def read_kept(path: Path) -> dict[str, Any]:
    """A kept run, with ``statistics`` as ReportStatistics by system; InputError for a damaged file or one of
    another kind.
    """
    try:
        content = read_json(path)
        units = {name: None if rows is None else np.array(rows) for name, rows in content["units"].items()}
        statistics = {
            system: ReportStatistics(
                {name: _table(name, columns) for name, columns in tables.items()},
                *content["references"],
                content["tag"],
                **units,
                targets=content.get("targets", ""),
            )
            for system, tables in content["statistics"].items()
        }
        _require_whole(content, statistics)
        return {name: content[name] for name in ("settings", "provenance", "history", "scores", "variety", "texts")} | {
            "statistics": statistics,
            "synthetic": content.get("synthetic", False),  # older files do not say
        }
    except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: does not hold a run's numbers ({type(error).__name__}: {error})") from error


def _table(name: str, columns: Any) -> np.ndarray:
    """The table (N, k) of k columns; ValueError where they are not equally long or hold something else than numbers."""
    table = np.array(columns).T
    if table.ndim != 2 or table.dtype.kind not in "if":
        raise ValueError(f"{name} is not a table of numbers")
    return table


def _require_whole(content: Mapping[str, Any], statistics: Mapping[str, ReportStatistics]) -> None:
    """ValueError, KeyError or IndexError where a file that was edited or cut lacks something that is read later."""
    for name, kind in {"settings": dict, "provenance": dict, "history": list, "tag": str}.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name} is {type(content[name]).__name__}")
    for values in (*content["scores"].values(), *content["variety"].values(), *content["history"]):
        if _numbers(values) != values:
            raise ValueError("a score is not a number")
    found = statistics[MODEL]
    counts = {len(table) for system in statistics.values() for table in system.tables.values()}
    counts |= {len(numbers) for numbers in (found.studies, found.patients) if numbers is not None}
    if not all(system.tables for system in statistics.values()):
        raise ValueError("it has no tables")
    if len(counts) != 1:
        raise ValueError(f"its tables have {', '.join(map(str, sorted(counts)))} rows")
    found.scores()  # of a table that lacks a column there are none


def unpack(path: Path, folder: Path) -> None:
    """Make ``folder`` a finished run's again, as far as tables read it."""
    content = read_kept(path)
    private_folder(folder)
    save_statistics(folder / STATISTICS, content["statistics"])
    results = {
        "config": content["settings"],
        "provenance": content["provenance"],
        "test": content["scores"],
        "variety": content["variety"],
        "synthetic": content["synthetic"],
    }
    write_results(folder / RESULTS, results)


def _columns(statistics: ReportStatistics) -> dict[str, list[list[float]]]:
    """Each table's columns, as whole numbers where they are."""
    return {
        name: [
            column.astype(int).tolist() if np.array_equal(column, np.floor(column)) else column.round(DIGITS).tolist()
            for column in table.T.astype(np.float64)
        ]
        for name, table in statistics.tables.items()
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if value is None or isinstance(value, (int, float))}
