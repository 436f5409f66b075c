"""Collects the results of a table's runs: mean and spread over seeds, intervals, significance, the paper's figures."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.evaluation.metric_table import (
    FULL,
    METRIC_NAMES,
    RADEVAL,
    REFERENCE_LABELS,
    REPORT_ERRORS,
    TRUNCATED,
    with_aliases,
)
from modules.runtime.errors import InputError
from modules.runtime.records import write_private
from scripts.experiments.files import DataSet, Row, Table
from scripts.experiments.plan import DONE, RESULTS, Run, read_json
from scripts.experiments.score_table import Cell, ScoreTable, TableRow, to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from modules.evaluation.report_statistics import ReportStatistics

MODEL = "model"
STATISTICS = "statistics.npz"
FORMS = {"table.md": to_markdown, "table.csv": to_csv, "table.tex": to_latex}


class Results:
    """Scores and per-report statistics of a row's finished runs, by seed, for the model and the baselines.

    The ``folds`` runs of a seed, each with its own test set, count as one run; a seed that lacks a fold is left out.
    """

    def __init__(self, runs: Sequence[Run], folds: int):
        finished = [run for run in runs if run.state == DONE]
        by_seed = {seed: [run.folder for run in finished if run.seed == seed] for seed in {run.seed for run in runs}}
        self._folders = {seed: by_seed[seed] for seed in sorted(by_seed) if len(by_seed[seed]) == folds}
        contents = {seed: [read_json(folder / RESULTS) for folder in own] for seed, own in self._folders.items()}
        self.synthetic = any(content.get("synthetic") for own in contents.values() for content in own)
        self.problems: list[str] = []
        self.scores: dict[int, dict[str, dict[str, float | None]]] = {}
        for seed, own in contents.items():
            try:
                first = self._folders[seed][0]
                self.scores[seed] = _scores(own[0], first) if folds == 1 else self._joined_scores(seed, own)
            except InputError as error:
                if folds == 1:
                    raise
                self.problems.append(f"seed {seed} is left out: {error}")
        self.systems = list(next(iter(self.scores.values()), {}))

    def _joined_scores(self, seed: int, contents: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        """Scores of the folds' reports as one set, measures of variety as means of the folds; InputError if the folds
        cannot be joined.
        """
        from modules.evaluation.report_statistics import join, load_statistics

        folds = [load_statistics(folder / STATISTICS) for folder in self._folders[seed]]
        variety = [content.get("variety", {}) for content in contents]
        systems = [system for system in folds[0] if all(system in fold for fold in folds)]
        return {
            system: _means([measures.get(system, {}) for measures in variety])
            | with_aliases(join([fold[system] for fold in folds]).scores())
            for system in systems
        }

    def cells(self, system: str) -> dict[str, Cell]:
        """Mean, standard deviation and interval of each score of a system; no p values."""
        from modules.evaluation.bootstrap import intervals, over_seeds

        if not self.scores:
            return {}
        spreads = over_seeds([scores[system] for scores in self.scores.values() if system in scores])
        statistics = self.statistics(system, list(self.scores))
        limits = intervals(*statistics) if statistics else {}
        return {key: Cell(spread.mean, spread.sd, *limits.get(key, (None, None))) for key, spread in spreads.items()}

    def statistics(self, system: str, seeds: Sequence[int]) -> "list[ReportStatistics]":
        """Statistics of the runs with ``seeds``; none if a run has not kept them."""
        from modules.evaluation.report_statistics import join, load_statistics

        paths = [[folder / STATISTICS for folder in self._folders[seed]] for seed in seeds]
        if not all(path.is_file() for own in paths for path in own):
            return []
        found = [[load_statistics(path).get(system) for path in own] for own in paths]
        return [] if any(None in own for own in found) else [join(own) if len(own) > 1 else own[0] for own in found]


def _scores(content: Mapping[str, Any], folder: Path) -> dict[str, dict[str, float | None]]:
    """Scores and measures of variety by system."""
    try:
        variety = content.get("variety", {})
        return {system: variety.get(system, {}) | scores for system, scores in content["test"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / RESULTS}: has no scores of the test split; delete it to run this again") from error


def _means(parts: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Means of the measures that all parts have."""
    shared = [key for key in parts[0] if all(part.get(key) is not None for part in parts)]
    return {key: sum(part[key] for part in parts) / len(parts) for key in shared}


def check_columns(table: Table, runs: Sequence[Run]) -> None:
    """InputError for a column that no run could fill: no score is called so, nor does a finished run have it."""
    from modules.evaluation.diversity import collapse_statistics

    radeval = [score.name for scores in RADEVAL.values() for score in scores.values()]
    known = [*METRIC_NAMES, "nll", *collapse_statistics(["a report"]), *radeval]
    errors = [score.name for score in REPORT_ERRORS]  # against whole references alone
    pattern = re.compile(
        f"({'|'.join(known)}|(ce|BERTScore|RadGraph_F1)_.+)(_{REFERENCE_LABELS})?({FULL}|{TRUNCATED})?"
        f"|({'|'.join(errors)})(_{REFERENCE_LABELS})?{FULL}"
    )
    known += [f"{name}{FULL}" for name in errors]
    unknown = [key for key in table.columns if not pattern.fullmatch(key)]
    done = [run.folder for run in runs if unknown and run.state == DONE]
    found = {key for folder in done for key in _scores(read_json(folder / RESULTS), folder).get(MODEL, ())}
    for key in unknown:
        if key not in found:
            near = difflib.get_close_matches(key, [*known, *found], n=1)
            hint = f"did you mean {near[0]}?" if near else "use a name of results.json, such as BLEU_4"
            raise InputError(f"{table.name}: no score is called {key!r}, the name of a column; {hint}")


def gather(table: Table, datasets: Mapping[str, DataSet], runs: Sequence[Run], failed: Mapping[str, str]) -> ScoreTable:
    """The score table of what is done so far; rows without results say so."""
    heads = _heads(table)
    folds = len(table.rows) // len(heads)
    runs_of = {row.name: [run for run in runs if run.row.whole == row.name] for row in heads}
    results = {name: Results(own, folds) for name, own in runs_of.items()}
    notes, rows = _notes(table, datasets, results), []
    for dataset in dict.fromkeys(row.dataset for row in heads):
        own_rows = [row for row in heads if row.dataset == dataset]
        titles = dict.fromkeys(_title(row.dataset, datasets) for row in table.rows)
        group = _title(dataset, datasets) if folds == 1 else f"test reports of all together: {', '.join(titles)}"
        for row in own_rows:
            found = results[row.name]
            cells = found.cells(MODEL)
            if cells and row.baseline not in ("", row.name):
                cells = _with_significance(row, cells, found, results[row.baseline], notes)
            source = _source(table, runs_of[row.name], len(found.scores), failed)
            rows.append(TableRow(row.label, group, source, cells, row.published, _title(row.published_on, datasets)))
        rows += _training_free(own_rows, results, group)
    rows = _with_holm(rows, table.columns)
    if folds > 1:
        notes += _fold_notes(table, heads, results, rows)
    notes += _explanations(table, heads, rows)
    reasons = {run.name: failed.get(run.name, run.reason) for run in runs}
    notes += [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    elsewhere = dict.fromkeys(datasets[row.dataset].title for row in table.rows if row.dataset != row.published_on)
    title = f"{table.title}; here on {', '.join(elsewhere)}" if elsewhere else table.title
    return ScoreTable(title, table.columns, rows, notes)


def write(table: ScoreTable, out: Path) -> list[Path]:
    """Write table.md, table.csv and table.tex into ``out``."""
    for name, form in FORMS.items():
        write_private(out / name, form(table))
    return [out / name for name in FORMS]


def _heads(table: Table) -> list[Row]:
    """One row for all folds, under the names that the table gives."""
    heads: dict[str, Row] = {}
    for row in table.rows:
        heads.setdefault(row.whole, replace(row, name=row.whole, baseline=row.baseline.partition("/")[0]))
    return list(heads.values())


def _with_significance(
    row: Row, cells: dict[str, Cell], own: Results, baseline: Results, notes: list[str]
) -> dict[str, Cell]:
    from modules.evaluation.bootstrap import compare

    shared = [seed for seed in own.scores if seed in baseline.scores]
    sides = [side.statistics(MODEL, shared) for side in (own, baseline)]
    if not all(sides):
        return cells
    try:
        found = compare(*sides)
    except InputError as error:
        notes.append(f"{row.label}: not compared with {row.baseline}: {error}")
        return cells
    return {key: replace(cell, p=found[key].p if key in found else None) for key, cell in cells.items()}


def _with_holm(rows: Sequence[TableRow], shown: Collection[str]) -> list[TableRow]:
    """The rows with p values corrected for all tests in the ``shown`` columns of all rows."""
    from modules.evaluation.bootstrap import holm

    tests = {(i, key): row.cells[key].p for i, row in enumerate(rows) for key in shown if key in row.cells}
    corrected = holm(tests)
    return [
        replace(row, cells={key: replace(cell, p_holm=corrected.get((i, key))) for key, cell in row.cells.items()})
        for i, row in enumerate(rows)
    ]


def _training_free(rows: Sequence[Row], results: Mapping[str, Results], group: str) -> list[TableRow]:
    """The baselines that need no training, as the runs of the first finished row have scored them."""
    for row in rows:
        found = results[row.name]
        names = [system for system in found.systems if system != MODEL]
        if names:
            return [
                TableRow(f"Baseline: {name}", group, f"of {row.label}", found.cells(name), is_baseline=True)
                for name in names
            ]
    return []


def _source(table: Table, runs: Sequence[Run], done: int, failed: Mapping[str, str]) -> str:
    """How many seeds the cells cover."""
    seeds = len(table.seeds)
    if done == seeds:
        return f"{done} seed" + ("s" if done > 1 else "")
    bad = sum(run.name in failed for run in runs)
    of_runs = "" if len(runs) == seeds else f" ({sum(run.state == DONE for run in runs)} of {len(runs)} runs)"
    return f"{done} of {seeds} seeds{of_runs}" + (f", {bad} failed" if bad else "")


def _title(dataset: str, datasets: Mapping[str, DataSet]) -> str:
    return datasets[dataset].title if dataset in datasets else dataset


def _notes(table: Table, datasets: Mapping[str, DataSet], results: Mapping[str, Results]) -> list[str]:
    notes = [table.note] if table.note else []
    if any(found.synthetic for found in results.values()):
        notes.append(
            "The data is SYNTHETIC (the radiographs are drawings): these scores say nothing about patients and cannot "
            "be compared with the paper's figures."
        )
    elsewhere = {row.published_on for row in table.rows if row.published and row.published_on != row.dataset}
    if elsewhere:
        named = sorted(_title(name, datasets) for name in elsewhere)
        notes.append(f"The paper's figures are those on {' and '.join(named)}, for orientation only.")
    return notes


def _fold_notes(
    table: Table, heads: Sequence[Row], results: Mapping[str, Results], rows: Sequence[TableRow]
) -> list[str]:
    notes = [
        "The test sets of all folds are taken as one; CIDEr's document frequencies are those of each fold, and "
        "measures of variety are means of the folds."
    ]
    notes += [f"{row.label}: {problem}" for row in heads for problem in results[row.name].problems]
    filled = {key for row in rows for key in row.cells}
    empty = [label for key, label in table.columns.items() if filled and key not in filled]
    return notes + ([f"Not known for the folds together: {', '.join(empty)}."] if empty else [])


def _explanations(table: Table, heads: Sequence[Row], rows: Sequence[TableRow]) -> list[str]:
    """What the marks in the table mean."""
    cells = [cell for row in rows for cell in row.cells.values()]
    notes = []
    if any(cell.sd is not None for cell in cells):
        notes.append("Mean ± standard deviation over seeds (n - 1).")
    if any(cell.low is not None for cell in cells):
        notes.append(
            "The interval covers the choice of the test patients or studies: percentile bootstrap, 2,000 resamples, "
            "the seeds' scores averaged within each; none for macro averages over rare classes."
        )
    labels = {row.name: row.label for row in heads}
    pairs = [f"{row.label} with {labels[row.baseline]}" for row in heads if row.baseline not in ("", row.name)]
    if tests := sum(cell.p_holm is not None for cell in cells):
        notes.append(
            f"* p < 0.05, ** p < 0.01 after Holm's correction for the {tests} tests of this table, two-sided: better "
            "or worse by a bootstrap over the test studies together with the variance over seeds; with one seed by "
            "approximate randomisation over the test studies, which says nothing of other seeds. "
            f"{'; '.join(pairs)}."
        )
    return [*notes, f"Seeds of the training: {' '.join(map(str, table.seeds))}."]
