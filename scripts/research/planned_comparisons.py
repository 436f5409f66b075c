"""The comparisons that a plan names before its runs, from the numbers that run_experiments.py --keep left.

  python scripts/research/planned_comparisons.py experiments/evidence/flickr8k.json \\
      --kept experiments/evidence/flickr8k --compare ithn:plain ithn:mochi rival:plain --margin 0.03

Each pair is compared over all seeds that both have, in a table with folds over all folds' test sets as one: the
difference, its interval (--level) and p value, which know both other test images and other seeds, and Holm's correction
over the pairs given. Runs that differ in more than their seeds and their rows' flags are refused, and scores that have
no interval elsewhere (macro averages over rare classes) have none here. A pair is decided once all seeds of the table
are there: a gain (or loss) where p after the correction is below 0.05 and the difference is at least the margin (of a
score that should fall, a fall is a gain), no gain where the interval lies within the margin on both sides, else
undecided.

  python scripts/research/planned_comparisons.py experiments/evidence/flickr8k_tuning.json \\
      --kept experiments/evidence/flickr8k_tuning --validation

lists the score of every run on the validation split instead, by which settings are chosen.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.evaluation.metric_table import smaller_is_better
from modules.flags import Parser, flags_in_effect, parse_flags, resolve_config
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from scripts.experiments.files import Table, read_table
from scripts.experiments.plan import SCORING, comparable_settings, differences, idle_settings, settings_of, shown

if TYPE_CHECKING:
    from modules.evaluation.report_statistics import ReportStatistics

Kept = Mapping[Path, Mapping[str, Any]]  # what read_kept found, by file: one for each fold
Runs = Mapping[str, Mapping[int, Kept]]  # by row and seed
HEAD = ("comparison", "seeds", "first", "second", "difference", "interval", "p", "p, Holm", "outcome")
SIGNIFICANT = 0.05
ANNOTATION = "annotation_sha256"
MACHINES = {"negative_index", "feature_cache"}  # paths, which differ from machine to machine


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="JSON file of rows, as for run_experiments.py")
    add("--kept", type=Path, required=True, metavar="DIR", help="folder of run_experiments.py --keep")
    add("--compare", nargs="+", default=[], metavar="A:B", help="rows to compare, A minus B")
    add("--validation", action="store_true", help="list the score on the validation split, after the last epoch")
    add("--score", default="CIDEr", help="default %(default)s")
    add("--margin", type=float, default=0.03, help="the smallest difference that matters; default %(default)s")
    add("--figure", type=Path, metavar="PNG", help="also draw all runs and the differences")
    add("--level", type=float, default=0.9, help="of the intervals; default %(default)s")
    return parser


@dataclass(frozen=True)
class Comparison:
    """Two rows over the ``seeds`` that both have, of ``planned``."""

    pair: str
    seeds: int
    planned: int
    first: float
    second: float
    interval: tuple[float, float]
    p: float | None
    falls: bool = False  # a smaller score is better

    @property
    def difference(self) -> float:
        """First minus second."""
        return self.first - self.second

    def outcome(self, p_holm: float | None, margin: float) -> str:
        """What the plan calls it."""
        if self.seeds < self.planned:
            return f"open: {self.seeds} of {self.planned} seeds"
        if p_holm is None:
            return "open: of one seed there is no test" if self.seeds == 1 else "open: nothing that can be tested"
        if p_holm < SIGNIFICANT and abs(self.difference) >= margin:
            return "gain" if (self.difference > 0) is not self.falls else "loss"
        return "no difference of that size" if -margin < self.interval[0] and self.interval[1] < margin else "undecided"


def kept_runs(table: Table, kept: Path) -> Runs:
    """The table's finished runs, by row and seed, one for each fold; a seed that lacks a fold is left out.

    InputError for one made with other flags than its row's.
    """
    from scripts.experiments.kept import kept_file, read_kept

    folds, found = Counter(row.whole for row in table.rows), {}
    for row in table.rows:
        given, _ = parse_flags(row.flags, "main_train.py", "")
        resolved = {"resolved": comparable_settings(dataclasses.asdict(config := resolve_config(given)))}
        given = json.loads(json.dumps(flags_in_effect(given, config)[0]))  # tuples become lists
        by_seed = found.setdefault(row.whole, {seed: {} for seed in table.seeds})
        for seed in table.seeds:
            if (path := kept_file(kept, row.name, seed)).is_file():
                by_seed[seed][path] = read_kept(path) | {"dataset": row.dataset, "given": given} | resolved
                require_settings(path, by_seed[seed][path]["settings"], given | {"seed": seed})
    return {
        row: {seed: files for seed, files in by_seed.items() if len(files) == folds[row]}
        for row, by_seed in found.items()
    }


def require_settings(path: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError unless the run of ``path`` was made with these settings, as far as it knows them."""
    for name in (wanted.keys() & settings.keys()) - MACHINES:
        if settings[name] != wanted[name]:
            raise InputError(f"{path}: made with --{name} {settings[name]}, where the table has {wanted[name]}")


def require_alike(runs: Sequence[Kept]) -> None:
    """Raise InputError where runs that are compared differ in more than their seeds and their rows' flags.

    They are looked at fold by fold. What a data set's flags set is alike in all its runs of one model.
    """
    for (path, first), *others in zip(*(files.items() for files in runs), strict=True):
        wanted = settings_of(first["settings"], first["provenance"])
        for other, content in others:
            found = settings_of(content["settings"], content["provenance"])
            rows = [run["resolved"] for run in (first, content)]
            free = {"seed", "precision", *MACHINES, *SCORING, *first["given"], *content["given"]}
            free |= {name for name in rows[0] if rows[0][name] != rows[1][name]}
            free |= set().union(*(idle_settings(comparable_settings(run["settings"])) for run in (first, content)))
            if not found[ANNOTATION]:  # an older file does not say
                free.add(ANNOTATION)
            differing = [name for name in differences(found, wanted) if name not in free]
            if found["model_name"] != wanted["model_name"] or content["dataset"] != first["dataset"]:
                differing = [name for name in differing if name == ANNOTATION]
            if differing:
                how = shown(differing, found, wanted).replace(", now ", " and ")
                raise InputError(f"{other} cannot be compared with {path}: {how}")


def statistics_of(files: Kept) -> "ReportStatistics":
    """The model's statistics of a run, of all folds together; InputError where folds have scores of other names."""
    from modules.evaluation.report_statistics import join
    from scripts.experiments.tables import MODEL

    parts = [content["statistics"][MODEL] for content in files.values()]
    return join(parts) if len(parts) > 1 else parts[0]


def validated(runs: Runs, score: str) -> list[str]:
    """A Markdown table of the score of each run on the validation split."""
    lines = [f"| run | {score}, validation |", "|---|---:|"]
    for path, content in (item for by_seed in runs.values() for files in by_seed.values() for item in files.items()):
        if not content["history"] or (value := content["history"][-1].get(f"val_{score}")) is None:
            raise InputError(f"{path}: no val_{score} after the last epoch")
        lines.append(f"| {path.stem} | {value:.4f} |")
    return lines


def compared(pair: str, runs: Runs, planned: int, score: str, level: float) -> Comparison:
    """One comparison; InputError for a row that the table lacks or a score that the runs lack."""
    from modules.evaluation.bootstrap import compare

    names = pair.split(":")
    if len(names) != 2 or not set(names) <= set(runs):
        raise InputError(f"--compare {pair}: must be two of {', '.join(runs)} with a colon between them")
    seeds = [seed for seed in runs[names[0]] if seed in runs[names[1]]]
    if not seeds:
        return Comparison(pair, 0, planned, float("nan"), float("nan"), (float("nan"),) * 2, None)
    require_alike([runs[name][seed] for name in names for seed in seeds])
    sides = [[statistics_of(runs[name][seed]) for seed in seeds] for name in names]
    for name, side in zip(names, sides, strict=True):
        for seed, run in zip(seeds, side, strict=True):
            value = run.scores().get(score, 0.0)  # what no run has is named below
            if value is None or not math.isfinite(value):
                raise InputError(f"--score {score}: {name} seed {seed} has none that is a finite number")
    changes = compare(*sides)
    if score not in changes:
        raise InputError(f"--score {score}: {pair} can be compared by {', '.join(changes)}")
    first, second = (sum(run.scores()[score] for run in side) / len(seeds) for side in sides)
    found = changes[score]
    # As in every table, a score without a trustworthy interval has none.
    interval = (math.nan, math.nan) if found.low is None else found.over_seeds(level)
    falls = smaller_is_better(score)
    return Comparison(pair, len(seeds), planned, first, second, interval, found.p_seeds, falls)


def table_of(comparisons: Sequence[Comparison], margin: float) -> list[str]:
    """The table in Markdown."""
    from modules.evaluation.bootstrap import holm, p_text

    # A comparison that is not finished counts as one that finds nothing: it can only be decided against later.
    done = {one.pair for one in comparisons if one.seeds == one.planned and one.p is not None}
    corrected = holm({one.pair: one.p if one.pair in done else 1.0 for one in comparisons})
    rows = [HEAD, ("---",) * len(HEAD)]
    for one in comparisons:
        p_holm = corrected[one.pair] if one.pair in done else None
        numbers = (f"{one.first:.3f}", f"{one.second:.3f}", f"{one.difference:+.3f}")
        texts = [p_text(value) for value in (one.p, p_holm)]
        interval = "–" if math.isnan(one.interval[0]) else f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}"
        if not one.seeds:
            numbers = ("–",) * 3
        label = one.pair.replace(":", " - ")
        rows.append((label, f"{one.seeds} of {one.planned}", *numbers, interval, *texts, one.outcome(p_holm, margin)))
    return ["| " + " | ".join(row) + " |" for row in rows]


def draw(
    path: Path, runs: Runs, found: Sequence[Comparison], score: str, margin: float, labels: Mapping[str, str]
) -> None:
    """Every run's score by row on the left; the differences with their intervals and the margin on the right."""
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=130, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    scores = {name: [statistics_of(files).scores().get(score) for files in own.values()] for name, own in runs.items()}
    names = [name for name, values in scores.items() if values and None not in values]
    for place, name in enumerate(names):
        values = scores[name]
        left.plot(values, [place] * len(values), "o", color="#4c78a8", alpha=0.6)
        left.plot(sum(values) / len(values), place, "|", color="black", markersize=18)
    left.set_yticks(range(len(names)), [f"{labels[name]} ({len(runs[name])})" for name in names])
    left.set_xlabel(f"{score} of each seed; bars: means")
    right.axvspan(-margin, margin, color="#dddddd")
    right.axvline(0, color="black", linewidth=0.8)
    there = [one for one in found if one.seeds > 1 and not math.isnan(one.interval[0])]
    for place, one in enumerate(there):
        right.plot(one.interval, [place, place], color="#e45756", linewidth=2)
        right.plot(one.difference, place, "o", color="#e45756")
    pairs = ["\n− ".join(labels[name] for name in one.pair.split(":")) for one in there]
    seeds = [f" ({one.seeds} of {one.planned})" for one in there]
    right.set_yticks(range(len(there)), [pair + number for pair, number in zip(pairs, seeds, strict=True)])
    right.set_xlabel(f"difference in {score}; grey: smaller than {margin:g}")
    for axes in (left, right):
        axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Read, compare, print."""
    arguments = build_parser().parse_args()
    if not (arguments.compare or arguments.validation):
        raise InputError("--compare A:B, or --validation: nothing is asked for")
    if not 0 < arguments.level < 1:
        raise InputError(f"--level {arguments.level}: must lie between 0 and 1")
    if not arguments.margin > 0:
        raise InputError(f"--margin {arguments.margin}: must be above 0")
    if arguments.figure and arguments.figure.suffix != ".png":
        raise InputError(f"--figure {arguments.figure}: must end in .png")
    check_outputs([Output("--figure", arguments.figure, "a PNG file", contains("PNG\r\n\x1a\n", "IHDR"))])
    table = read_table(arguments.table)
    if not arguments.kept.is_dir():
        raise InputError(f"--kept {arguments.kept}: no such folder; run_experiments.py --keep writes it")
    runs = kept_runs(table, arguments.kept)
    if arguments.validation:
        print("\n".join(validated(runs, arguments.score)))
    if not arguments.compare:
        return
    found = [compared(pair, runs, len(table.seeds), arguments.score, arguments.level) for pair in arguments.compare]
    print("\n".join(table_of(found, arguments.margin)))
    if arguments.figure:
        labels = {row.whole: row.label for row in table.rows}
        draw(arguments.figure, runs, found, arguments.score, arguments.margin, labels)


if __name__ == "__main__":
    run_entry_point(main)
