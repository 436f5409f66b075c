"""Finished runs kept as JSON: without texts, and enough for every table; comparisons that a plan names."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from modules.evaluation.report_statistics import ReportStatistics, clinical_tables, load_statistics, save_statistics
from modules.runtime.errors import InputError
from scripts.experiments.files import choose, read_datasets, read_table
from scripts.experiments.kept import counted, kept_file, pack_finished, restore
from scripts.experiments.plan import differences
from scripts.experiments.tables import gather
from scripts.research import planned_comparisons
from tests.experiment_support import by_name, finish, planned, write_files

GAIN = 0.2


@pytest.fixture
def files(tmp_path):
    """Two rows with two seeds, 60 reports each, the second better in every report."""
    files = write_files(tmp_path)
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.5, 60)
    for name, run in by_name(planned(files)).items():
        values = base + (GAIN if "ithn" in name else 0.0) + 0.001 * run.seed + rng.normal(0, 0.01, 60)
        finish(run, score=float(values.mean()))
        tables = {"BLEU_4": values[:, None].astype(np.float32), "nll": np.column_stack([values, np.full(60, 9)])}
        system = ReportStatistics(tables, "cut", "whole", studies=np.arange(60), targets="tokens")
        save_statistics(run.folder / "statistics.npz", {"model": system})
        (run.folder / "history.json").write_text(json.dumps([{"epoch": 1, "val_CIDEr": 0.4, "note": "text"}]))
        (run.folder / "res.csv").write_text("a secret dog\na cat\na secret dog\n" + "a cow\n" * 57)
    return files


def table_of(files):
    return gather(
        choose(read_table(files / "rows.json"), dataset="tiny"),
        read_datasets(files / "datasets.json"),
        planned(files),
        {},
    )


def test_tables_are_made_again_from_what_is_kept(files, tmp_path):
    before, keep = table_of(files), tmp_path / "kept"
    statistics = load_statistics(by_name(planned(files))["ithn seed 2"].folder / "statistics.npz")["model"]
    pack_finished(planned(files), keep)
    shutil.rmtree(files / "out")
    assert {run.state for run in planned(files)} == {"missing"}
    assert {run.state for run in counted(planned(files), keep)} == {"done"}
    restore(planned(files), keep)
    assert {run.state for run in planned(files)} == {"done"}
    after = table_of(files)
    assert "SYNTHETIC" in before.notes[0] and after.notes[0] == before.notes[0]
    for row, again in zip(before.rows[:2], after.rows[:2], strict=True):
        assert again.cells["BLEU_4"].mean == row.cells["BLEU_4"].mean and again.label == row.label
        assert again.cells["BLEU_4"].low == pytest.approx(row.cells["BLEU_4"].low, abs=1e-5)
    again = load_statistics(by_name(planned(files))["ithn seed 2"].folder / "statistics.npz")["model"]
    assert again.scores() == pytest.approx(statistics.scores(), abs=1e-5)
    assert np.array_equal(again.studies, statistics.studies) and again.targets == "tokens"


def test_what_is_kept_are_numbers(files, tmp_path):
    keep = tmp_path / "kept"
    pack_finished(planned(files), keep)
    path = kept_file(keep, "base", 1)
    text = path.read_text()
    assert path.name == "base_1.json" and "secret" not in text and str(files / "out") not in text
    content = json.loads(text)
    assert content["texts"] == [0, 1, 0] + [2] * 57 and content["history"] == [{"epoch": 1, "val_CIDEr": 0.4}]
    assert content["statistics"]["model"]["nll"][1] == [9] * 60  # whole numbers stay so


def test_a_file_of_another_kind_is_named(files, tmp_path):
    keep = tmp_path / "kept"
    keep.mkdir()
    shutil.rmtree(files / "out")
    (keep / "base_1.json").write_text("[1]")
    with pytest.raises(InputError, match="base_1.json: does not hold a run's numbers"):
        restore(planned(files), keep)
    assert not (files / "out").exists()


def compare(files, monkeypatch, capsys, *flags):
    argv = [
        "planned_comparisons.py",
        str(files / "rows.json"),
        "--kept",
        str(files / "kept"),
        "--score",
        "BLEU_4",
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    planned_comparisons.main()
    return [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]


def test_planned_comparisons(files, monkeypatch, capsys):
    pack_finished(planned(files), files / "kept")
    gain, loss = compare(
        files, monkeypatch, capsys, "--compare", "ithn:base", "base:ithn", "--figure", str(files / "a.png")
    )
    assert (files / "a.png").read_bytes().startswith(b"\x89PNG")
    assert gain[1] == "2 of 2" and float(gain[4]) == pytest.approx(GAIN, abs=0.01) and gain[-1].startswith("gain")
    assert loss[-1].startswith("loss") and float(loss[4]) == -float(gain[4])
    low, high = (float(value) for value in gain[5].split(" to "))
    assert low < GAIN < high
    assert float(gain[7]) == pytest.approx(2 * float(gain[6]), abs=1e-4)  # Holm, two tests with one p
    [alike] = compare(files, monkeypatch, capsys, "--compare", "ithn:base", "--margin", "0.5")
    assert alike[-1].startswith("no difference of that size")
    listed = compare(files, monkeypatch, capsys, "--validation", "--score", "CIDEr")
    assert [row[0] for row in listed] == ["| base_1", "| base_2", "| ithn_1", "| ithn_2"]
    assert listed[0][1] == "0.4000 |"
    (files / "kept/ithn_2.json").unlink()
    [opened] = compare(files, monkeypatch, capsys, "--compare", "ithn:base")
    assert opened[1] == "1 of 2" and opened[-1].startswith("open: 1 of 2 seeds")
    with pytest.raises(InputError, match="--compare ithn:mochi: must be two of base, ithn"):
        compare(files, monkeypatch, capsys, "--compare", "ithn:mochi")


def test_a_higher_nll_is_a_loss(files, monkeypatch, capsys):
    pack_finished(planned(files), files / "kept")
    [found] = compare(files, monkeypatch, capsys, "--compare", "ithn:base", "--score", "nll", "--margin", "0.01")
    assert float(found[4]) > 0 and found[-1].startswith("loss")
    with pytest.raises(InputError, match="--score CIDEr: ithn:base can be compared by BLEU_4, nll"):
        compare(files, monkeypatch, capsys, "--compare", "ithn:base", "--score", "CIDEr")


def test_the_interval_over_seeds_agrees_with_its_test():
    from modules.evaluation.bootstrap import compare as paired

    rng = np.random.default_rng(1)
    sides = [
        [ReportStatistics({"score": (rng.normal(mean + rng.normal(0, 0.05), 1, 200))[:, None]}, "", "") for _ in "abc"]
        for mean in (0.2, 0.0)
    ]
    found = paired(*sides, resamples=400)["score"]
    low, high = found.over_seeds(1 - found.p_seeds)  # the limit lies at 0 exactly there
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6) and low < found.difference < high
    narrow, wide = found.over_seeds(0.5), found.over_seeds(0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_what_was_kept_of_other_settings_does_not_count(files, monkeypatch, capsys):
    keep = files / "kept"
    pack_finished(planned(files), keep)
    path = kept_file(keep, "ithn", 2)
    content = json.loads(path.read_text())
    content["settings"]["alpha"] += 1
    path.write_text(json.dumps(content))
    shutil.rmtree(files / "out")
    states = {run.name: run for run in counted(planned(files), keep)}
    assert states["ithn seed 1"].state == "done" and states["ithn seed 2"].state == "changed"
    assert "ithn_2.json: alpha" in states["ithn seed 2"].reason
    content["settings"]["seed"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"ithn_2.json: made with --seed 3, where the table has 2"):
        compare(files, monkeypatch, capsys, "--compare", "ithn:base")


def test_a_run_that_has_begun_again_is_not_overwritten(files):
    keep = files / "kept"
    pack_finished(planned(files), keep)
    [run] = [run for run in planned(files) if run.name == "ithn seed 2"]
    (run.folder / "results.json").unlink()
    (run.folder / "current_checkpoint.pth").write_bytes(b"begun")
    restore(planned(files), keep)
    assert not (run.folder / "results.json").is_file()


def test_numbers_that_cannot_be_kept_end_their_own_run_only(files, monkeypatch):
    from scripts.experiments import runs as running

    made = list(planned(files))
    (made[0].folder / "history.json").unlink()
    monkeypatch.setattr(running, "command", lambda run: [sys.executable, "-c", ""])
    with running.locked(files / "out") as lock:
        failed = running.execute(made, jobs=1, lock=lock, keep=files / "kept")
    assert list(failed) == [made[0].name] and "history.json" in failed[made[0].name]
    assert len(list((files / "kept").iterdir())) == len(made) - 1
    tested = replace(made[0], weights=made[1].folder / "model_best.pth")  # as a row with "trained_as"
    pack_finished([tested], files / "kept")
    assert json.loads(kept_file(files / "kept", tested.row.name, tested.seed).read_text())["history"] == []


@pytest.mark.parametrize(("kept", "same"), [("a-tfidf-3e4a56df", True), ("a-random-3e4a56df", False), ("", False)])
def test_numbers_count_where_the_annotation_that_names_the_index_is_not_there(kept, same):
    """In a fresh clone tables are made of kept numbers alone."""
    kept = kept and f"{kept}.safetensors"
    wanted = {"negative_index": "a-tfidf-new.safetensors", "annotation_sha256": "", "files_sha256": {}}
    found = {"negative_index": kept, "annotation_sha256": "3e4a56df", "files_sha256": {}}
    assert differences(found, wanted) == ([] if same else ["negative_index"])


def edit(files, name, change):
    """Rewrite the kept file ``name`` after ``change`` has been made to its content."""
    content = json.loads((path := files / "kept" / name).read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_table(columns):
    return lambda content: content["statistics"]["model"].update(BLEU_4=columns)


@pytest.mark.parametrize(
    "change",
    [
        set_table([[0.1] * 59]),
        set_table([[0.1] * 59 + [None]]),
        set_table([[0.1] * 59 + ["0.1"]]),
        set_table([0.1] * 60),
        lambda content: content["statistics"]["model"].clear(),
        lambda content: content["statistics"].pop("model"),
        lambda content: content["statistics"]["model"].update(BLEU=[[1] * 60] * 4),
        lambda content: content["units"].update(studies=[0] * 59),
        lambda content: content.update(settings=None),
        lambda content: content.update(tag=5),
        lambda content: content.update(history=[1]),
        lambda content: content["history"][0].update(val_CIDEr="high"),
        lambda content: content["scores"]["model"].update(BLEU_4="high"),
    ],
)
def test_a_damaged_file_is_one_line(files, monkeypatch, capsys, change):
    pack_finished(planned(files), files / "kept")
    edit(files, "ithn_2.json", change)
    with pytest.raises(InputError, match=r"ithn_2.json: does not hold a run's numbers \(") as error:
        compare(files, monkeypatch, capsys, "--compare", "ithn:base")
    assert "\n" not in str(error.value)
    shutil.rmtree(files / "out")
    with pytest.raises(InputError, match=r"ithn_2.json: does not hold"):
        restore(planned(files), files / "kept")


def test_a_score_that_is_no_number_in_one_run_is_named(files, monkeypatch, capsys):
    pack_finished(planned(files), files / "kept")
    edit(files, "ithn_2.json", set_table([[0.1] * 59 + [float("nan")]]))
    with pytest.raises(InputError, match="--score BLEU_4: ithn seed 2 has none that is a finite number"):
        compare(files, monkeypatch, capsys, "--compare", "ithn:base")


@pytest.mark.parametrize("name", ["ithn_2.json", "base_1.json", "both of ithn"])
def test_runs_made_with_other_settings_are_not_compared(files, monkeypatch, capsys, name):
    """Settings that no row gives come with the data set and --overrides, which the kept file alone knows."""
    pack_finished(planned(files), files / "kept")
    for changed in ("ithn_1.json", "ithn_2.json") if name == "both of ithn" else (name,):
        edit(files, changed, lambda content: content["settings"].update(epochs=99))
    with pytest.raises(InputError, match=r"cannot be compared with .*: epochs (2 and 99|99 and 2)"):
        compare(files, monkeypatch, capsys, "--compare", "ithn:base")
    pack_finished(planned(files), files / "kept")  # made with other settings than the table's: kept anew
    edit(files, "base_2.json", lambda content: content["provenance"].update(annotation_sha256="0" * 64))
    with pytest.raises(InputError, match="cannot be compared with .*: annotation_sha256 0000"):
        compare(files, monkeypatch, capsys, "--compare", "ithn:base")
    edit(files, "base_2.json", lambda content: content["provenance"].pop("annotation_sha256"))
    assert compare(files, monkeypatch, capsys, "--compare", "ithn:base")  # an older file does not say


def test_a_macro_average_over_rare_classes_has_no_interval_here_either(files, monkeypatch, capsys):
    """Nor is it called equal by one."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((60, 14)) < 0.03, 1.0, np.nan)
    for run in planned(files):
        path = run.folder / "statistics.npz"
        system = load_statistics(path)["model"]
        tables = system.tables | clinical_tables(labels, np.where(rng.random((60, 14)) < 0.03, 1.0, np.nan), "rule")
        save_statistics(path, {"model": replace(system, tables=tables)})
    pack_finished(planned(files), files / "kept")
    flags = ("--margin", "0.9", "--compare", "ithn:base", "--figure", str(files / "a.png"), "--score")
    [macro] = compare(files, monkeypatch, capsys, *flags, "ce_rule_f1_macro_14_uncertain_negative")
    assert macro[5] == "–" and float(macro[6]) > 0 and macro[-1].startswith("undecided")
    [micro] = compare(files, monkeypatch, capsys, *flags, "ce_rule_f1_micro_14_uncertain_negative")
    assert " to " in micro[5] and micro[-1].startswith("no difference of that size")


def test_a_row_without_the_score_is_left_out_of_the_figure(files, monkeypatch, capsys):
    pack_finished(planned(files), files / "kept")
    for seed in (1, 2):
        edit(files, f"ithn_{seed}.json", lambda content: content["statistics"]["model"].pop("nll"))
    figure = files / "a.png"
    assert compare(files, monkeypatch, capsys, "--compare", "base:base", "--score", "nll", "--figure", str(figure))
    assert figure.is_file()


def test_what_cannot_be_tested_says_why():
    one = planned_comparisons.Comparison("a:b", 1, 1, 0.5, 0.4, (0.0, 0.2), None)
    assert one.outcome(None, 0.03) == "open: of one seed there is no test"
    assert replace(one, seeds=3, planned=3).outcome(None, 0.03) == "open: nothing that can be tested"
