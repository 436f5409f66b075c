"""Run a table of experiments: every row (a flag set) with every seed, then write one table of all scores.

Finished runs are skipped, interrupted ones resume from their checkpoint, and missing ones are trained and tested by
main_train.py in a process of their own, into OUT/<row>/seed<k>. If a folder was made with other settings, it is named
and nothing is run. Hard negatives are mined once per data set, if a row needs them.

  python scripts/run_experiments.py experiments/table3_components.json --dataset demo
  python scripts/run_experiments.py experiments/table1_iu_xray.json --dry_run
  python scripts/run_experiments.py my_rows.json --dataset demo --seeds 1 2 --overrides "--epochs 2"

The table is written to OUT/table.md, table.csv and table.tex: mean and standard deviation over seeds, intervals,
significance against each row's baseline, training-free baselines, and the paper's figures. With --keep DIR the numbers
of every finished run are kept as JSON, from which the table can be made again elsewhere. See docs/EXPERIMENT_TABLES.md.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser
from modules.runtime.environment import ROOT
from modules.runtime.errors import InputError, run_entry_point
from scripts.experiments.files import DataSet, choose, read_datasets, read_table
from scripts.experiments.plan import CHANGED, CUT, MISSING, RESULTS, UNTESTED, Run, changed_line, plan
from scripts.experiments.runs import LOCK, execute, locked, mine, move_aside, prepare, states


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE", help="JSON file of rows, such as those in experiments/")
    add("--dataset", default="", metavar="NAME", help="data set for every row, such as demo; default: each row's own")
    add(
        "--datasets",
        type=Path,
        default=ROOT / "experiments" / "datasets.json",
        metavar="FILE",
        help="data sets by name; default experiments/datasets.json",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the runs and the table; default results/<table>_<data set>")
    add("--seeds", type=int, nargs="+", default=[], metavar="S", help="seeds of every row; default: the table's")
    add("--rows", nargs="+", default=[], metavar="ROW", help="run these rows only (the table still shows all)")
    add("--overrides", default="", metavar="FLAGS", help="flags of main_train.py for all rows, in quotes; they win")
    add(
        "--text_encoder",
        default="",
        metavar="NAME",
        help="for mining, as in scripts/mine_hard_negatives.py; default: the table's, else the data set's",
    )
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time; default %(default)s")
    add("--by_seed", action="store_true", help="run all rows with the first seed, then all with the second, and so on")
    add(
        "--keep",
        type=Path,
        metavar="DIR",
        help="write the numbers of finished runs, without texts, there; runs whose numbers are there count as done",
    )
    add("--dry_run", action="store_true", help="list what is done and what would run, then stop")
    add("--table_only", action="store_true", help="run nothing, write the table of what is done")
    add(
        "--redo_changed",
        action="store_true",
        help="move folders made with other settings aside (renamed, not deleted) and run those rows again",
    )
    return parser


def require_own_tables(out: Path) -> None:
    """InputError if ``out`` has tables but neither this script's lock nor the folder of a run."""
    from scripts.experiments.tables import FORMS

    found = [name for name in FORMS if (out / name).exists()]
    own = (out / LOCK).exists() or any(True for runs in ("*/seed*/", "*/*/seed*/") for _ in out.glob(runs))
    if found and not own:
        raise InputError(
            f"--out {out}: its {found[0]} would be replaced, and nothing there shows that run_experiments.py wrote it; "
            "name another folder, or move that file away"
        )


def run_missing(
    arguments: argparse.Namespace, make_plan: Callable[[], list[Run]], datasets: dict[str, DataSet], lock: int
) -> dict[str, str]:
    """Run what is missing or was interrupted; returns the failures by run.

    InputError where a data set has to be prepared by hand.
    """
    chosen = chosen_runs(make_plan(), arguments.rows)
    names = dict.fromkeys(run.row.dataset for run in chosen)
    prepare({datasets[name]: {run.model for run in chosen if run.row.dataset == name} for name in names})
    runs = chosen_runs(make_plan(), arguments.rows)  # the settings include files that have just been made
    if arguments.redo_changed:
        move_aside([run for run in runs if run.state == CHANGED])
        runs = chosen_runs(make_plan(), arguments.rows)
    elif line := changed_line(runs):
        raise InputError(line)
    runs = [run for run in runs if run.state in (MISSING, CUT, UNTESTED)]
    if arguments.by_seed:
        runs = sorted(runs, key=lambda run: run.seed)
    for run in runs:
        if not run.settings["annotation_sha256"]:
            hint = "--dataset demo needs none" if run.row.name == run.row.whole else "make_folds.py makes folds of it"
            raise InputError(
                f"{run.name}: data set {run.row.dataset!r} has no annotation yet (see data/README.md); {hint}"
            )
    mine(runs)
    failed: dict[str, str] = {}
    for stage in (0, 1, 2):
        failed |= run_stage([run for run in runs if stage_of(run) == stage], arguments.jobs, lock, arguments.keep)
    return failed


def stage_of(run: Run) -> int:
    """0 for runs trained from the beginning, 1 for those that start from a model of these, 2 for those only tested."""
    return 2 if run.weights else 1 if run.start else 0


def run_stage(runs: Sequence[Run], jobs: int, lock: int, keep: Path | None) -> dict[str, str]:
    """Run those whose models of other rows exist; returns the failures by run."""
    failed = {}
    for run in runs:
        model, does = (run.weights, "tests the models of") if run.weights else (run.start, "starts from")
        if model and not model.with_name(RESULTS).is_file():
            name = run.row.trained_as or run.row.starts_from
            failed[run.name] = f"it {does} row {name}, whose seed {run.seed} is not trained"
    return failed | execute([run for run in runs if run.name not in failed], jobs=jobs, lock=lock, keep=keep)


def chosen_runs(runs: Sequence[Run], rows: Sequence[str]) -> list[Run]:
    """The runs of the named rows or folds of rows; all if none is named."""
    return [run for run in runs if not rows or run.row.whole in rows or run.row.name in rows]


def stop(*_) -> None:
    """SIGTERM ends this script as Ctrl-C does, so that its trainings end with it."""
    raise KeyboardInterrupt


def main() -> int:
    """Prepare, plan, run, write; returns the exit code, 1 if a run failed."""
    arguments = build_parser().parse_args()
    signal.signal(signal.SIGTERM, stop)
    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: must be 1 or more")
    table = choose(read_table(arguments.table), dataset=arguments.dataset, seeds=arguments.seeds)
    known = list(dict.fromkeys(row.whole for row in table.rows))
    for name in arguments.rows:
        if name not in known and name not in [row.name for row in table.rows]:
            raise InputError(f"--rows {name}: the table has {', '.join(known)}")
    out = arguments.out or Path("results") / "_".join(filter(None, (table.name, arguments.dataset)))
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    datasets = read_datasets(arguments.datasets)
    try:
        overrides = shlex.split(arguments.overrides)
    except ValueError as error:
        raise InputError(f"--overrides {arguments.overrides}: must be flags as on a command line ({error})") from error

    from scripts.experiments.kept import counted, pack_finished, restore
    from scripts.experiments.tables import check_columns, gather, write

    def make_plan() -> list[Run]:
        return plan(table, datasets, out, overrides=overrides, text_encoder=arguments.text_encoder)

    check_columns(table, runs := make_plan())
    if arguments.dry_run:
        print(states(counted(runs, arguments.keep) if arguments.keep else runs))
        return 0
    require_own_tables(out)
    with locked(out) as lock:
        if arguments.keep:
            restore(runs, arguments.keep)
        failed = {} if arguments.table_only else run_missing(arguments, make_plan, datasets, lock)
        runs = make_plan()
        print(states(runs, failed))
        paths = write(gather(table, datasets, runs, failed), out)
        if arguments.keep:
            pack_finished(runs, arguments.keep)
    print(paths[0].read_text(encoding="utf-8"))
    print("table:", ", ".join(map(str, paths)))
    return 1 if failed else 0


if __name__ == "__main__":
    run_entry_point(main)
