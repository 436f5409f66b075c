"""The tables that run_experiments.py writes, on small results; and the whole script on trainings of seconds."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from modules.evaluation.report_statistics import ReportStatistics, save_statistics
from modules.runtime.errors import InputError
from scripts.experiments.files import choose, read_datasets, read_table
from scripts.experiments.kept import kept_file, pack_finished
from scripts.experiments.plan import plan
from scripts.experiments.score_table import Cell, ScoreTable, TableRow
from scripts.experiments.tables import _with_holm, check_columns, gather, write
from scripts.research import planned_comparisons
from tests.experiment_support import by_name, finish, planned, write_files, write_table


@pytest.fixture
def finished(tmp_path):
    """Both rows with two seeds, 40 reports each; ITHN is better in every report."""
    files = write_files(tmp_path)
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.5, 40)
    for name, run in by_name(planned(files)).items():
        values = base + (0.2 if "ithn" in name else 0.0) + 0.001 * run.seed
        finish(run, score=values.mean())
        system = ReportStatistics({"BLEU_4": values[:, None]}, "cut", "whole")
        save_statistics(run.folder / "statistics.npz", {"model": system, "nearest training image": system})
    return files


def gathered(files, failed=()):
    table = choose(read_table(files / "rows.json"), dataset="tiny")
    return gather(table, read_datasets(files / "datasets.json"), planned(files), dict(failed))


def test_table_has_spread_intervals_marks_floors_and_the_papers_figures(finished):
    table = gathered(finished)
    base, ithn, floor = table.rows
    cell = ithn.cells["BLEU_4"]
    assert cell.mean - base.cells["BLEU_4"].mean == pytest.approx(0.2)
    assert cell.sd == pytest.approx(0.001 / 2**0.5) and cell.low < cell.mean < cell.high
    assert cell.p < 0.01 and base.cells["BLEU_4"].p is None
    assert ithn.published == {"BLEU_4": 0.5} and ithn.published_on == "IU X-Ray" and ithn.group == "tiny data"
    assert floor.is_baseline and floor.cells["BLEU_4"].mean == 0.02
    paths = write(table, finished / "out")
    markdown, csv_text, latex = (path.read_text() for path in paths)
    assert f"**{cell.mean:.3f}** ± 0.001 \\*\\* |" in markdown and r"Base\_1" in markdown
    assert f"[{cell.low:.3f}, {cell.high:.3f}]" in markdown and "| paper, IU X-Ray | 0.500 |" in markdown
    assert "SYNTHETIC" in markdown and "SYNTHETIC" in latex
    assert csv_text.splitlines()[0].startswith("dataset,method,source,paper_dataset,BLEU_4_mean,BLEU_4_sd,BLEU_4_low")
    assert f"\\textbf{{{cell.mean:.3f}}} $\\pm$ 0.001 $^{{**}}$" in latex and r"Base\_1" in latex
    assert latex.count(r"\begin") == latex.count(r"\end") == 2


def test_stars_are_given_after_holms_correction_for_the_whole_table():
    rows = [
        TableRow(
            "ithn", "data", "3 seeds", {"a": Cell(0.2, p=0.02), "b": Cell(0.2, p=0.001), "hidden": Cell(1, p=0.04)}
        ),
        TableRow("base", "data", "3 seeds", {"a": Cell(0.1), "b": Cell(0.1)}),
        TableRow("mochi", "data", "3 seeds", {"a": Cell(0.2, p=0.03)}),
    ]
    ithn, base, mochi = _with_holm(rows, ["a", "b"])
    # Three tests are shown: 3 x .001, 2 x .02, 1 x .03 but not below the one before.
    assert (ithn.cells["b"].p_holm, ithn.cells["a"].p_holm, mochi.cells["a"].p_holm) == (0.003, 0.04, 0.04)
    assert (ithn.cells["b"].mark, ithn.cells["a"].mark) == ("**", "*")
    assert base.cells["a"].p_holm is None and ithn.cells["hidden"].p_holm is None and ithn.cells["hidden"].mark == ""


def test_table_of_unfinished_work_says_so(finished):
    (finished / "out/ithn/seed2/results.json").unlink()
    table = gathered(finished, {"ithn seed 2": "no such thing"})
    ithn = table.rows[1]
    assert ithn.source == "1 of 2 seeds, 1 failed" and ithn.cells["BLEU_4"].sd is None
    # Compared on the seed that both rows have.
    assert ithn.cells["BLEU_4"].p < 0.01
    assert "ithn seed 2: no such thing" in table.notes


def test_rows_on_other_reports_are_not_compared(finished):
    for seed in (1, 2):
        system = ReportStatistics({"BLEU_4": np.ones((40, 1))}, "cut", "others")
        save_statistics(finished / f"out/ithn/seed{seed}/statistics.npz", {"model": system})
    table = gathered(finished)
    assert table.rows[1].cells["BLEU_4"].p is None
    assert any("+ ITHN: not compared with base" in note for note in table.notes)


@pytest.fixture
def folded(tmp_path):
    """Two rows on two folds of 30 and 10 reports, with two seeds; ITHN is better in every report."""
    rows = [{"name": "base", "label": "Base", "flags": "--ithn off"}]
    rows += [{"name": "ithn", "flags": "--ithn on", "baseline": "base"}]
    write_table(tmp_path, rows, folds=["one", "two"])
    datasets = {
        name: {"title": f"fold {name}", "flags": f"--ann_path {tmp_path / name}.json"} for name in ("one", "two")
    }
    (tmp_path / "datasets.json").write_text(json.dumps(datasets))
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(name)
    rng = np.random.default_rng(0)
    base = {"one": rng.uniform(0, 0.2, 30), "two": rng.uniform(0.4, 0.6, 10)}
    for run in of_folds(tmp_path):
        values = base[run.row.dataset] + (0.2 if run.row.whole == "ithn" else 0.0) + 0.001 * run.seed
        finish(run, score=9.9)
        system = ReportStatistics({"BLEU_4": values[:, None]}, f"cut {run.row.dataset}", f"whole {run.row.dataset}")
        save_statistics(run.folder / "statistics.npz", {"model": system, "nearest training image": system})
    return tmp_path, np.concatenate(list(base.values())).mean()


def of_folds(files):
    return plan(read_table(files / "rows.json"), read_datasets(files / "datasets.json"), files / "out")


def gathered_folds(files):
    return gather(read_table(files / "rows.json"), read_datasets(files / "datasets.json"), of_folds(files), {})


def test_folds_are_one_test_set(folded):
    files, mean = folded
    assert (files / "out/ithn/two/seed1/results.json").is_file()
    base, ithn, floor = gathered_folds(files).rows
    # A mean of the folds' means would weigh 10 reports as much as 30.
    assert base.cells["BLEU_4"].mean == pytest.approx(mean + 0.0015) and base.source == "2 seeds"
    assert base.cells["BLEU_4"].sd == pytest.approx(0.001 / 2**0.5)
    assert ithn.cells["BLEU_4"].mean - base.cells["BLEU_4"].mean == pytest.approx(0.2) and ithn.cells["BLEU_4"].p < 0.01
    assert floor.is_baseline and {row.group for row in (base, ithn, floor)} == {
        "test reports of all together: fold one, fold two"
    }
    assert (base.label, ithn.label) == ("Base", "ithn")


def test_variety_of_folds_is_their_mean(folded):
    files, _ = folded
    rows = json.loads((files / "rows.json").read_text())
    (files / "rows.json").write_text(json.dumps(rows | {"columns": ["BLEU_4", "commonest_share", "diversity"]}))
    for run in of_folds(files):
        results = json.loads((run.folder / "results.json").read_text())
        share = {"one": 0.2, "two": 0.4}[run.row.dataset]
        results["variety"] = {"model": {"commonest_share": share, "diversity": None if share > 0.3 else 1.0}}
        (run.folder / "results.json").write_text(json.dumps(results))
    table = gathered_folds(files)
    assert table.rows[0].cells["commonest_share"].mean == pytest.approx(0.3)
    assert any(note.startswith("Not known for the folds together: diversity") for note in table.notes)


def test_comparisons_of_folds_join_them(folded, monkeypatch, capsys):
    files, _ = folded
    for run in of_folds(files):
        (run.folder / "history.json").write_text('[{"epoch": 1}]')
        (run.folder / "res.csv").write_text("a\n" * 30)
    kept = files / "kept"
    pack_finished(of_folds(files), kept)
    argv = ["planned_comparisons.py", str(files / "rows.json"), "--kept", str(kept), "--score", "BLEU_4"]
    monkeypatch.setattr("sys.argv", [*argv, "--compare", "ithn:base"])
    planned_comparisons.main()
    found = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert found[1] == "2 of 2" and found[4] == "+0.200" and found[-1].startswith("gain")
    kept_file(kept, "base/two", 2).unlink()
    planned_comparisons.main()
    assert "open: 1 of 2 seeds" in capsys.readouterr().out.splitlines()[-1]


def test_a_seed_counts_when_all_its_folds_are_done(folded):
    files, mean = folded
    (files / "out/base/two/seed2/results.json").unlink()
    base, ithn, _ = gathered_folds(files).rows
    assert base.source == "1 of 2 seeds (3 of 4 runs)" and base.cells["BLEU_4"].mean == pytest.approx(mean + 0.001)
    assert ithn.source == "2 seeds" and ithn.cells["BLEU_4"].p < 0.01  # compared on seed 1


@pytest.mark.parametrize(
    ("changed", "part"), [(None, "statistics.npz: no such file"), ("truncated_60", "cannot be joined")]
)
def test_a_fold_that_cannot_be_joined_leaves_its_seed_out(folded, changed, part):
    files, mean = folded
    path = files / "out/ithn/one/seed1/statistics.npz"
    if changed:
        system = ReportStatistics({"BLEU_4": np.ones((30, 1))}, "cut one", "whole one", changed)
        save_statistics(path, {"model": system})
    else:
        path.unlink()
    table = gathered_folds(files)
    base, ithn, _ = table.rows
    assert base.source == "2 seeds" and ithn.source == "1 of 2 seeds (4 of 4 runs)"
    assert ithn.cells["BLEU_4"].mean == pytest.approx(mean + 0.202) and ithn.cells["BLEU_4"].p < 0.01
    assert any(note.startswith("ithn: seed 1 is left out: ") and part in note for note in table.notes)


def test_a_column_that_no_score_has_is_refused(tmp_path):
    files = write_files(tmp_path)
    for key in (
        "BLEU_4_full",
        "CIDEr_truncated",
        "METEOR_reference_labels_full",
        "nll",
        "diversity",
        "repetition_4",
        "ce_chexbert_f1_micro_14_uncertain_negative_full",
        "BERTScore_f1",
        "RadGraph_F1_partial",
        "RadEval_RaTEScore",
        "RadEval_RadCliQ_v1_full",
        "comparison_rate_full",
        "hallucinated_devices_reference_labels_full",
        "ours",
    ):
        write_table(files, columns=[key])
        runs = planned(files)
        for run in runs if key == "ours" else ():  # a score that somebody has added
            finish(run)
            results = json.loads((run.folder / "results.json").read_text())
            results["test"]["model"]["ours"] = 1.0
            (run.folder / "results.json").write_text(json.dumps(results))
        check_columns(read_table(files / "rows.json"), planned(files))
    errors = ("contradictions", "did you mean contradictions_full")
    for key, part in (("CIDErr", "did you mean CIDEr"), ("F", "a name of results.json"), errors):
        write_table(files, columns=[key])
        with pytest.raises(InputError, match=f"no score is called '{key}'.*{part}"):
            check_columns(read_table(files / "rows.json"), planned(files))


def test_columns_that_folds_cannot_have_together_are_named(folded):
    files, _ = folded
    rows = json.loads((files / "rows.json").read_text())
    (files / "rows.json").write_text(json.dumps(rows | {"columns": ["BLEU_4", {"key": "METEOR", "label": "Met"}]}))
    assert "Not known for the folds together: Met." in gathered_folds(files).notes


def test_rows_without_statistics_still_have_means(finished):
    for path in (finished / "out").glob("ithn/*/statistics.npz"):
        path.unlink()
    cell = gathered(finished).rows[1].cells["BLEU_4"]
    assert cell.sd > 0 and cell.low is None and cell.p is None


@pytest.mark.slow
def test_the_whole_on_real_trainings(demo, tmp_path):
    from tests.conftest import TINY

    flags = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images", *TINY, "--epochs", 1]
    (tmp_path / "datasets.json").write_text(json.dumps({"tiny": {"flags": shlex.join(map(str, flags))}}))
    write_table(tmp_path)
    command = [sys.executable, "scripts/run_experiments.py", tmp_path / "rows.json", "--dataset", "tiny"]
    command += ["--datasets", tmp_path / "datasets.json", "--out", tmp_path / "out", "--seeds", "1"]

    def call(*flags):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)

    done = call()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,000 resamples" in done.stdout and (tmp_path / "out/table.tex").is_file()
    before = (tmp_path / "out/ithn/seed1/results.json").stat().st_mtime_ns
    assert call().returncode == 0
    assert (tmp_path / "out/ithn/seed1/results.json").stat().st_mtime_ns == before
    changed = call("--overrides", "--alpha 0.5")
    assert changed.returncode == 2 and changed.stderr.count("\n") == 1 and "alpha 0.01, now 0.5" in changed.stderr


@pytest.mark.parametrize(
    "key",
    [
        "nll_reference_labels",
        "hallucinated_devices_reference_labels_full",
        "RadEval_RadCliQ_v1_truncated",
        "unk_share",
        "repetition_2",
        "commonest_share_reference_labels",
    ],
)
def test_the_lowest_is_the_best_whatever_the_name_says_besides(key):
    rows = [TableRow(name, "data", "1 seed", {key: Cell(value)}) for name, value in (("a", 0.2), ("b", 0.1))]
    assert ScoreTable("t", {key: key}, rows).best("data") == {key: 0.1}


def test_the_lowest_nll_is_the_best():
    rows = [
        TableRow(name, "data", "3 seeds", {"nll": Cell(nll), "CIDEr": Cell(cider)})
        for name, nll, cider in (("a", 1.5, 0.3), ("b", 1.4, 0.2), ("c", 1.6, 0.4))
    ]
    table = ScoreTable("t", {"nll": "nll", "CIDEr": "C"}, rows)
    assert table.best("data") == {"nll": 1.4, "CIDEr": 0.4}
