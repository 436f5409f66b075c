"""Score files of anybody's reports: every score, interval, baseline and warning that main_test.py gives.

CSV with or without a header and ids, JSON lists and objects, JSON lines, R2Gen's res.csv and gts.csv, this project's
exports/*.json and ReXrank's predictions are read; files with ids are joined by them, in any order. Several systems are
tested against the first one; NAME=FILE names a system, and files of one name are its seeds.

  python scripts/score.py --gts gts.csv --res res.csv
  python scripts/score.py --gts annotation.json --res base=a.csv ours=b.json --cleaner mimic_cxr --out results/scores

This prints numbers. With --out reports are written too, into a folder that you alone can read.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.tokenizers import CLEANERS
from modules.evaluation.metric_table import is_main, smaller_is_better
from modules.evaluation.published_scores import PUBLISHED
from modules.evaluation.settings import ScoringSettings
from modules.flags import Parser, add_flags
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs
from modules.runtime.settings import check_value, part_of

if TYPE_CHECKING:
    from modules.evaluation.scored import Scored
    from modules.evaluation.system_tests import SystemTest
    from modules.run.file_scores import FileScores, Inputs


OF_RUNS = ("model_best.pth", "history.json", "train.log", "test.log")  # what main_train.py and main_test.py leave


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--gts", required=True, metavar="FILE", help="the references; of an annotation.json its test split")
    add("--res", required=True, nargs="+", metavar="[NAME=]FILE", help="the generated reports of one or more systems")
    add(
        "--train",
        metavar="FILE",
        help="training reports, or an annotation.json: adds the baseline, and scores of "
        "references that were seen in training",
    )
    add(
        "--cleaner",
        choices=("none", *CLEANERS),
        default="none",
        help="rules that clean both sides as the data set's "
        "models are trained; coco: Penn Treebank tokens, several captions (default: %(default)s)",
    )
    add(
        "--max_seq_length",
        type=int,
        default=0,
        metavar="INT",
        help="score references cut to it too, as the R2Gen "
        "family does (iu_xray 60, mimic_cxr 100); default: whole ones only",
    )
    add(
        "--threshold",
        type=int,
        default=0,
        metavar="INT",
        help="words of cut references that are rarer in --train are <unk> (iu_xray 3, mimic_cxr 10); default: none are",
    )
    add("--gts_column", default="", metavar="NAME", help="column or field of the references, where it is not found")
    add("--res_column", default="", metavar="NAME", help="column or field of the generated reports, likewise")
    add(
        "--published",
        type=lambda text: {name.lower(): name for name in PUBLISHED}.get(text.lower(), text),
        choices=tuple(PUBLISHED),
        metavar="NAME",
        help=f"print clinical scores in the convention of a paper or package first: {', '.join(PUBLISHED)}",
    )
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write results.json, statistics.npz, res.csv, gts.csv and "
        "report.html, for each of several systems in a folder of its own, and comparisons with the first",
    )
    add("--all_scores", action="store_true", help="print every score, not only the main ones")
    scores = [item.name for item in dataclasses.fields(ScoringSettings)]
    add_flags(parser, [*scores, "report_samples", "device"], defaults=True)
    return parser


def main() -> None:
    """Read, score, print the tables, write the folder."""
    arguments = build_parser().parse_args()
    for item in dataclasses.fields(ScoringSettings):
        check_value(item.name, getattr(arguments, item.name), item.metadata)
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: is not a folder")

    from modules.evaluation.system_tests import paired_tests
    from modules.run.file_scores import Inputs, score_files, systems_of

    inputs = Inputs(
        arguments.gts,
        systems_of(arguments.res),
        training=arguments.train or "",
        cleaner=arguments.cleaner,
        max_seq_length=arguments.max_seq_length,
        threshold=arguments.threshold,
        references_column=arguments.gts_column,
        generated_column=arguments.res_column,
    )
    folders = folders_of(arguments.out, list(inputs.runs)) if arguments.out else {}
    check_folders(folders, inputs)
    found = score_files(inputs, part_of(arguments, ScoringSettings), arguments.device)
    if arguments.published:
        print(render_published(arguments.published, found), end="\n\n")
    shown = (lambda name: True) if arguments.all_scores else is_main
    print(render_scores(found.scored, found.systems, shown))
    if tests := paired_tests(found.scored, found.systems, shown):
        print("\n" + render_tests(tests))
    print(render_notes(found))
    if arguments.out:
        write(folders, found, arguments.report_samples)
        print(f"written: {arguments.out}")


def render_published(name: str, found: "FileScores") -> str:
    """Every run's clinical scores as ``name`` publishes them, by the labeler that it uses where that is there."""
    from modules.evaluation.published_scores import published_lines

    labelers = list(found.scored.labels)
    if not labelers:
        return f"--published {name}: there are no clinical scores; see below"
    labeler = PUBLISHED[name].labeler.lower()
    labeler = labeler if labeler in labelers else labelers[0]
    return "\n".join(
        line
        for run in found.generated
        for line in (
            f"{run}, as {name} publishes clinical scores:",
            *published_lines(name, found.scored.scores[run], found.scored.intervals[run], labeler),
        )
    )


def folders_of(out: Path, runs: Sequence[str]) -> dict[str, Path]:
    """Each run's folder: ``out`` itself for one, below it for several; InputError where two would be the same."""
    from modules.run.file_scores import folder_name

    folders = {run: out if len(runs) == 1 else out / folder_name(run) for run in runs}
    if len(set(folders.values())) < len(runs):
        raise InputError(f"--out {out}: two systems would have one folder; give them names that differ in letters")
    return folders


def check_folders(folders: Mapping[str, Path], inputs: "Inputs") -> None:
    """InputError where a folder is a run's, or holds an input."""
    from modules.data.report_files import file_in

    read = [("--gts", file_in(inputs.references, "gts")), ("--train", inputs.training or None)]
    read += [("--res", file_in(path, "res")) for path in inputs.runs.values()]
    for folder in folders.values():
        if found := [name for name in OF_RUNS if (folder / name).exists()]:
            raise InputError(f"--out {folder}: is the folder of a run, which {found[0]} is of; name another")
        files = ("results.json", "res.csv", "gts.csv", "statistics.npz", "report.html")
        check_outputs([Output("--out", folder / name, "a result", lambda _: True) for name in files], read)


def write(folders: Mapping[str, Path], found: "FileScores", samples: int) -> None:
    """What main_test.py would leave in each run's folder, and the pages that compare the others with the first."""
    from modules.pages.comparison import to_html
    from modules.run.file_scores import write_run
    from modules.runtime.records import write_private
    from scripts.compare_runs import compare_folders, read_folder

    for run, folder in folders.items():
        write_run(folder, found, run, samples)
    first, *others = (read_folder(folder) for folder in folders.values())
    for other in others:
        page = compare_folders((first, other), by="ROUGE_L", show=3, all_scores=False)
        write_private(other.path / f"comparison_with_{first.path.name}.html", to_html(page))


def render_scores(scored: "Scored", systems: Mapping[str, Sequence[str]], shown: Callable[[str], bool]) -> str:
    """A line for each score with its interval by system; of several seeds mean and standard deviation."""
    from modules.evaluation.bootstrap import over_seeds

    columns = dict(systems) | {name: [name] for name in scored.scores if name not in sum(systems.values(), [])}
    lines = [f"| score | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(name for own in scored.scores.values() for name in own if shown(name)):
        cells = []
        for runs in columns.values():
            values = [scored.scores[run].get(name) for run in runs]
            limits = scored.intervals[runs[0]].get(name)
            if any(value is None for value in values):
                cells.append("–")
            elif len(runs) > 1:
                spread = over_seeds([scored.scores[run] for run in runs])[name]
                cells.append(f"{spread.mean:.4f} ± {spread.sd:.4f}")
            else:
                cells.append(f"{values[0]:.4f}" + (f" [{limits[0]:.4f}, {limits[1]:.4f}]" if limits else ""))
        lines.append(f"| {_marked(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render_tests(tests: Sequence["SystemTest"]) -> str:
    """A line for each test of a system against the first; interval and p know seeds where there are several."""
    from modules.evaluation.bootstrap import LEVEL, p_text

    kind = "randomisation" if tests[0].change.p_seeds is None else "seeds"
    lines = [
        f"| against the first | score | difference | 95 % interval | p {kind} | p Holm |",
        "|---|---|---|---|---|---|",
    ]
    for test in tests:
        change = test.change
        low, high = (change.low, change.high) if change.p_seeds is None else change.over_seeds(LEVEL)
        interval = "–" if change.low is None else f"[{low:+.4f}, {high:+.4f}]"
        lines.append(
            f"| {test.system} | {_marked(test.score)} | {change.difference:+.4f} | {interval} | "
            f"{p_text(change.p)} | {p_text(test.p_holm)} |"
        )
    return "\n".join(lines)


def _marked(name: str) -> str:
    return f"{name} (lower is better)" if smaller_is_better(name) else name


def render_notes(found: "FileScores") -> str:
    """What a reader of the numbers has to know."""
    scored = found.scored
    lines = [f"\nintervals: {scored.intervals_are}"]
    lines += [f"{name} is missing: {reason}" for name, reason in scored.missing.items()]
    lines += [f"warning: {run}: {line}" for run in found.generated for line in scored.warnings(run)]
    for kind, part in scored.by_reference.items():
        for run in found.generated:
            if scores := part["scores"].get(run):
                words = " ".join(f"{name}={scores[name]:.4f}" for name in ("BLEU_4", "ROUGE_L", "CIDEr"))
                lines.append(f"{run}, references {kind} in training ({part['reports']}): {words}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
