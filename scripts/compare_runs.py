"""Put two results folders side by side: scores, differences, their significance, and the reports that differ most.

This prints report text, because that is what was asked for: to the terminal, and with --html or --markdown into the
folder of B (files that you alone can read). --show 0 prints numbers only.

  python scripts/compare_runs.py results/iu_xray_base results/iu_xray_ithn --html

A folder needs res.csv and gts.csv (R2Gen's files work too); statistics.npz and results.json, which main_train.py
writes next to them, add METEOR, clinical scores and the settings.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.dataset_specs import DATASETS, OTHER
from modules.data.report_tables import REPORT_COLUMNS, Table, read_rows, read_table
from modules.data.row_matching import match_rows
from modules.evaluation.metric_table import FULL, is_main, smaller_is_better, tagged, untagged
from modules.flags import Parser
from modules.runtime.errors import InputError, run_entry_point
from scripts.experiments.plan import NO_EFFECT_ON_RESULTS, read_json

if TYPE_CHECKING:
    from modules.evaluation.report_statistics import ReportStatistics
    from modules.pages.comparison import Comparison


@dataclass(frozen=True)
class Folder:
    """What a results folder holds."""

    path: Path
    references: list[str]  # several captions of an image in one text
    generated: list[str]
    results: Mapping[str, Any]  # empty where there is no results.json


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="results folder, the baseline")
    add("second", type=Path, metavar="B", help="results folder of the other run on the same test reports")
    add(
        "--by",
        default="ROUGE_L",
        metavar="SCORE",
        help="score of single reports that ranks them, such as CIDEr or BLEU_4; default %(default)s",
    )
    add(
        "--show",
        type=int,
        default=3,
        metavar="K",
        help="reports shown where B gains most, and where it loses most; default %(default)s",
    )
    add("--all_scores", action="store_true", help="every score, not only the main ones")
    add("--html", action="store_true", help="write B/comparison_with_<A>.html too")
    add("--markdown", action="store_true", help="write B/comparison_with_<A>.md too")
    return parser


def read_folder(path: Path) -> Folder:
    """Read res.csv, gts.csv and, where it is there, results.json. InputError where they do not belong together."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the --save_dir of a tested run")
    results = read_json(path / "results.json") if (path / "results.json").is_file() else {}
    config = results.get("config", {}) if isinstance(results, dict) else None
    if not isinstance(config, dict):
        raise InputError(f"{path / 'results.json'}: not the results of main_test.py: its config is no object")
    several = config.get("captions")  # a column each
    if several is None:
        several = DATASETS.get(str(config.get("dataset_name")), OTHER).captions
    references = _reports(path / "gts.csv", several)
    generated = _reports(path / "res.csv")
    if several and not (path / "statistics.npz").is_file():
        raise InputError(
            f"{path}: statistics.npz is not there, by which captions are compared; test the run again with main_test.py"
        )
    if len(generated.rows) != len(references.rows):
        raise InputError(
            f"{path}: res.csv has {len(generated.rows)} reports and gts.csv {len(references.rows)}; test the run "
            "again with main_test.py"
        )
    if len(generated.columns) > 1:  # else the two are the lists that a test writes, in one order
        generated = match_rows(references, generated)
    return Folder(path, _texts(references), _texts(generated), results)


def _reports(path: Path, several: bool = False) -> Table:
    """Its reports, with a header or without; with ``several``, the captions of an image in one text."""
    hint = "; main_train.py and main_test.py write it"
    try:
        if several:
            return Table(str(path), ["report"], [[" / ".join(filter(None, row))] for row in read_rows(path)])
        table = read_table(path)
    except InputError as error:
        raise InputError(f"{error}{hint}") from error
    if table.find(*REPORT_COLUMNS) is None:
        raise InputError(f"{path}: has {len(table.columns)} columns and none called report{hint}")
    return table


def _texts(table: Table) -> list[str]:
    column = table.find(*REPORT_COLUMNS)
    return [row[column] for row in table.rows]


def statistics_of(folders: tuple[Folder, Folder]) -> "tuple[list[ReportStatistics], list[str]]":
    """Both runs' per-report statistics, computed from the reports where a folder lacks them; and notes to print.

    InputError where a folder's statistics are of other reports.
    """
    from modules.evaluation.report_statistics import load_statistics

    paths = [folder.path / "statistics.npz" for folder in folders]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        return [_computed(folder) for folder in folders], [
            f"{missing[0]} is not there: BLEU, ROUGE-L and CIDEr were computed from res.csv and gts.csv."
        ]
    found = []
    for folder, path in zip(folders, paths, strict=True):
        statistics = load_statistics(path).get("model")
        if statistics is None or len(statistics) != len(folder.generated):
            raise InputError(
                f"{path}: is not about the {len(folder.generated)} reports of the res.csv next to it; test the "
                "run again with main_test.py"
            )
        found.append(statistics)
    return found, []


def _computed(folder: Folder) -> "ReportStatistics":
    from modules.evaluation.metrics import Metrics
    from modules.evaluation.report_statistics import ReportStatistics, digest

    with Metrics() as metrics:
        _, tables = metrics.measure(folder.references, folder.generated, with_meteor=False)
    same = digest([], folder.references)
    return ReportStatistics(tables, same, same)


def check_same_reports(folders: tuple[Folder, Folder], statistics: "list[ReportStatistics]") -> None:
    """InputError, in one line without report text, where the two runs were not tested on the same reports."""
    first, second = folders
    if statistics[0].full_references == statistics[1].full_references:
        return
    counts = [len(folder.references) for folder in folders]
    if counts[0] != counts[1]:
        how = f"{counts[0]} and {counts[1]} reports"
    else:
        rows = [
            number
            for number, pair in enumerate(zip(first.references, second.references, strict=True), 1)
            if pair[0] != pair[1]
        ]
        how = f"their references differ first in row {rows[0]}" if rows else "other ids, or another order"
    raise InputError(
        f"{first.path} and {second.path} were not tested on the same reports ({how}): they cannot be "
        "compared; give two runs on one annotation with the same --views"
    )


def left_out(values: Sequence[Mapping[str, float | None]], compared: set[str], tag: str, cut_alike: bool) -> list[str]:
    """Which of the scores that both runs have are not ``compared``, a line for each reason."""
    lines, both = [], {untagged(name, tag) for name in values[0].keys() & values[1].keys() - compared}
    if not cut_alike:
        lines.append(
            "The runs cut references differently (--max_seq_length or vocabulary): only scores against whole "
            "references are compared."
        )
    elif "nll" in both:
        lines.append("nll is left out: it is of other tokens in each run (vocabulary or --max_seq_length).")
    if unlike := sorted(name for name in both - {"nll"} if cut_alike or name.endswith(FULL)):
        lines.append(
            f"Left out are {len(unlike)} scores, such as {unlike[0]}: the runs labelled or counted the references in "
            "other ways, as other versions of a labeler do; test both with one version."
        )
    return lines


def compare_folders(folders: tuple[Folder, Folder], *, by: str, show: int, all_scores: bool) -> "Comparison":
    """Everything that is shown. InputError for a score --by that is not there."""
    from modules.evaluation.bootstrap import compare, holm
    from modules.pages.comparison import Comparison, ReportPair, ScoreLine, rank, report_scores, settings_that_differ

    statistics, notes = statistics_of(folders)
    check_same_reports(folders, statistics)
    changes = compare(statistics[1:], statistics[:1])
    values, tag = [run.scores() for run in statistics], statistics[0].tag
    cut_alike = statistics[0].references == statistics[1].references
    notes += left_out(values, set(changes), tag, cut_alike)
    if not cut_alike:
        by = f"{by.removesuffix(FULL)}{FULL}"
    shown = [name for name in changes if all_scores or is_main(untagged(name, tag), cut_alike)]
    corrected = holm({name: changes[name].p for name in shown})
    lines = [ScoreLine(name, values[0][name], values[1][name], changes[name], corrected[name]) for name in shown]
    if not {by, tagged(by, tag)} & changes.keys():
        plain = [name for name in changes if not name.startswith("ce_")]
        clinical = ", or a ce_* score that --all_scores lists" if len(plain) < len(changes) else ""
        raise InputError(f"--by {by}: must be one of {', '.join(plain)}{clinical}")
    each = [report_scores(run, by) for run in statistics]
    first, second = folders

    def pairs(rows: list[int]) -> list[ReportPair]:
        return [
            ReportPair(
                row + 1,
                first.references[row],
                first.generated[row],
                second.generated[row],
                float(each[0][row]),
                float(each[1][row]),
            )
            for row in rows
        ]

    gains, losses = rank((each[1] - each[0]) * (-1 if smaller_is_better(by) else 1), show)
    configs = [folder.results.get("config", {}) for folder in folders]
    return Comparison(
        names=(str(first.path), str(second.path)),
        notes=notes,
        scores=lines,
        by=by,
        count=len(first.generated),
        synthetic=any(folder.results.get("synthetic") for folder in folders),
        settings=settings_that_differ(*configs, NO_EFFECT_ON_RESULTS | {"negative_index"}) if all(configs) else [],
        same=sum(a == b for a, b in zip(first.generated, second.generated, strict=True)),
        better=pairs(gains),
        worse=pairs(losses),
    )


def main() -> None:
    """Compare, print, write what was asked for."""
    arguments = build_parser().parse_args()
    if arguments.show < 0:
        raise InputError(f"--show {arguments.show}: must be 0 or more")
    folders = (read_folder(arguments.first), read_folder(arguments.second))

    from modules.pages.comparison import to_html, to_markdown, to_text
    from modules.runtime.records import write_private

    comparison = compare_folders(folders, by=arguments.by, show=arguments.show, all_scores=arguments.all_scores)
    print(to_text(comparison), end="")
    stem = "_".join(("comparison_with", *arguments.first.resolve().parts[-2:]))
    for wanted, suffix, form in ((arguments.html, ".html", to_html), (arguments.markdown, ".md", to_markdown)):
        if wanted:
            write_private(arguments.second / f"{stem}{suffix}", form(comparison))
            print(f"written: {arguments.second / stem}{suffix}")


if __name__ == "__main__":
    run_entry_point(main)
