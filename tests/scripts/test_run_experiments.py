"""run_experiments.py: runs told apart by their settings, run, resumed, skipped."""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modules.config import Config
from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from scripts import run_experiments
from scripts.experiments import runs as experiment_runs
from scripts.experiments.files import choose, read_datasets, read_table
from scripts.experiments.plan import (
    CHANGED,
    CUT,
    DONE,
    MISSING,
    NO_EFFECT_ON_RESULTS,
    SCORING,
    UNTESTED,
    changed_line,
    plan,
)
from tests.experiment_support import BASE, by_name, finish, planned, write_files, write_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The support's files; the runner looks at its runs often."""
    monkeypatch.setattr(experiment_runs, "SECONDS_BETWEEN_LOOKS", 0.02)
    return write_files(tmp_path)


# ---- what is to be done


def test_states(files):
    runs = by_name(planned(files))
    assert [run.state for run in runs.values()] == [MISSING] * 4
    finish(runs["base seed 1"])
    finish(runs["base seed 2"], alpha=0.5, device="cuda", save_dir="elsewhere")
    finish(runs["ithn seed 1"], meteor=False)
    runs["ithn seed 2"].folder.mkdir(parents=True)
    (runs["ithn seed 2"].folder / "current_checkpoint.pth").touch()
    runs = by_name(planned(files))
    assert [run.state for run in runs.values()] == [DONE, CHANGED, UNTESTED, CHANGED]
    assert runs["base seed 2"].reason == "alpha 0.5, now 0.01"
    line = changed_line(runs.values())
    assert "base seed 2 (and 1 more" in line and "alpha 0.5, now 0.01" in line and "\n" not in line
    experiment_runs.move_aside([run for run in runs.values() if run.state == CHANGED])
    assert (files / "out/base/seed2.old1/results.json").is_file()
    assert changed_line(planned(files)) is None


def test_another_annotation_is_noticed_and_another_place_is_not(files):
    for run in planned(files):
        finish(run)
    assert {run.state for run in planned(files)} == {DONE}
    (files / "moved.json").write_bytes((files / "annotation.json").read_bytes())
    moved = planned(files, ["--ann_path", str(files / "moved.json"), "--num_workers", "0"])
    assert {run.state for run in moved} == {DONE}
    (files / "annotation.json").write_text('{"more": 1}')
    assert "annotation_sha256" in planned(files)[0].reason


def test_input_files_are_compared_by_content(files):
    labels = files / "labels.csv"
    labels.write_text("id\n1\n")
    given = f"--model_name xpronet --label_path {labels} --feature_cache a --freeze_visual_extractor true".split()
    run = planned(files, given)[0]
    finish(run)
    content = json.loads((run.folder / "results.json").read_text())
    content["provenance"]["files_sha256"] = {"label_path": hashlib.sha256(labels.read_bytes()).hexdigest()}
    (run.folder / "results.json").write_text(json.dumps(content))
    assert planned(files, given)[0].state == DONE
    labels.rename(files / "moved.csv")
    moved = [*given, "--label_path", str(files / "moved.csv"), "--feature_cache", "b"]
    assert planned(files, moved)[0].state == DONE
    (files / "moved.csv").write_text("id\n2\n")
    assert planned(files, moved)[0].state == CHANGED and planned(files, moved)[0].reason.startswith("label_path ")


def test_an_index_that_a_row_names_is_compared_by_content(files):
    for folder in "ab":
        (files / folder).mkdir()
        (files / folder / "index.safetensors").write_text(folder)

    def of(folder):
        index = files / folder / "index.safetensors"
        write_table(files, {"own": f"--ithn on --negative_index {index}"}, seeds=[1])
        return planned(files)[0], hashlib.sha256(index.read_bytes()).hexdigest()

    run, sha256 = of("a")
    finish(run)
    assert of("b")[0].state == DONE  # an older result, or a kept one: nothing but the name is known
    content = json.loads((run.folder / "results.json").read_text())
    content["provenance"]["negative_index_sha256"] = sha256
    (run.folder / "results.json").write_text(json.dumps(content))
    assert of("a")[0].state == DONE and of("b")[0].state == CHANGED
    assert of("b")[0].reason == "negative_index index.safetensors, now another file"
    write_table(files, {"own": "--ithn on"}, seeds=[1])  # the shared one, which has another name
    assert planned(files)[0].reason.startswith("negative_index index.safetensors, now tiny-tfidf-")


def test_an_older_result_without_a_new_setting_is_still_the_same(files):
    run = planned(files)[0]
    finish(run)
    content = json.loads((run.folder / "results.json").read_text())
    del content["config"]["clamp_segment"], content["config"]["alpha"]
    (run.folder / "results.json").write_text(json.dumps(content))
    assert planned(files)[0].state == DONE
    assert planned(files, ["--alpha", "0.3"])[0].reason == "alpha 0.01, now 0.3"


def test_one_index_for_the_rows_that_need_one(files):
    flags = {"off": "--ithn off", "con": "--ithn on --strategy contrastive", "ithn": "--ithn on"}
    flags |= {"mochi": "--ithn on --strategy mochi --num_neighbours 9"}
    flags |= {"own": "--ithn on --negative_index mine.safetensors"}
    write_table(files, flags, seeds=[1])
    runs = {run.row.name: run for run in planned(files)}
    assert [name for name, run in runs.items() if run.index] == ["ithn", "mochi"]
    assert runs["ithn"].index == runs["mochi"].index and runs["mochi"].index.top_k == 9
    assert runs["ithn"].index.text_encoder == "tfidf" and str(runs["ithn"].index.path) in runs["ithn"].flags
    finish(runs["ithn"])
    write_table(files, {"ithn": "--ithn on"}, seeds=[1])
    assert planned(files)[0].index.top_k == 5 and planned(files)[0].state == DONE


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--alpha x", "row base: argument --alpha"),
        ("--model_name gpt", "row base: --model_name gpt"),
        ("--seed 3", "row base: --seed is set for each run"),
        ("--heads 3", "row base: unrecognized"),
        ("--d_model 7", "row base: --d_model 7 cannot"),
    ],
)
def test_wrong_flags_name_their_row(files, flags, part):
    with pytest.raises(InputError, match=part):
        planned(files, flags.split())


# ---- running, with a stand-in for main_train.py


STAND_IN = """
import json, pathlib, sys, time
flags = sys.argv[1:]
value = lambda name: flags[flags.index(name) + 1]
folder = pathlib.Path(value("--save_dir"))
(folder / "calls").open("a").write(" ".join(flags) + "\\n")
if "--alpha" in flags:
    print("error: no such thing", file=sys.stderr)
    sys.exit(2)
(folder / "current_checkpoint.pth").touch()
(folder / "history.json").write_text("[1, 2]")
while (pathlib.Path(__file__).parent / "wait").exists():
    time.sleep(0.02)
(folder / "results.json").write_text("{}")
"""


@pytest.fixture
def stand_in(files, monkeypatch):
    monkeypatch.setattr(experiment_runs, "ROOT", files)
    for name in ("main_train.py", "main_test.py"):
        (files / name).write_text(STAND_IN)
    with experiment_runs.locked(files / "out") as lock:
        yield lambda runs, **options: experiment_runs.execute(runs, lock=lock, **({"jobs": 2} | options))


def test_runs_what_is_given_and_goes_on_after_a_failure(files, stand_in):
    bad = planned(files, ["--alpha", "0.3"])[0]
    good = planned(files)[1:]
    assert stand_in([bad, *good]) == {"base seed 1": "no such thing"}
    assert all((run.folder / "results.json").is_file() for run in good)
    assert "--seed 2" in (good[0].folder / "calls").read_text()
    assert (good[0].folder / "console.log").stat().st_mode & 0o077 == 0
    record = json.loads((good[0].folder / "experiment.json").read_text())
    assert record["seed"] == 2 and record["settings"]["ithn"] == "off"


def test_a_cut_run_goes_on_and_a_failed_one_is_not_believed(files, stand_in):
    (files / "wait").touch()
    run = planned(files)[0]
    process, _ = experiment_runs.start(run, lock=os.open(files / "out/.lock", os.O_RDONLY))
    while not (run.folder / "history.json").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    (files / "wait").unlink()
    run = planned(files)[0]
    assert run.state == CUT
    assert stand_in([run]) == {}
    first, second = (run.folder / "calls").read_text().splitlines()
    assert "--resume" not in first and second.endswith("--resume auto")
    (files / "main_train.py").write_text("print('no validation was run')")
    assert stand_in([planned(files)[1]]) == {"base seed 2": "no validation was run"}


def test_untested_runs_are_tested_again(files, stand_in):
    finish(planned(files)[0], meteor=False)
    [run] = [run for run in planned(files) if run.state == UNTESTED]
    command = experiment_runs.command(run)
    assert command[1].endswith("main_test.py") and command[2:4] == ["--load", str(run.folder / "model_best.pth")]


def test_a_row_is_tested_on_the_models_of_another(files, stand_in, monkeypatch):
    write_table(files, [BASE, {"name": "guided", "flags": "--guidance 1.5", "trained_as": "base"}])
    runs = by_name(planned(files))
    guided = runs["guided seed 2"]
    assert guided.state == MISSING and guided.settings["ithn"] == "off"
    command = experiment_runs.command(guided)
    assert command[1].endswith("main_test.py")
    assert command[2:4] == ["--load", str(files / "out/base/seed2/model_best.pth")]
    assert command[command.index("--guidance") + 1] == "1.5" and "--ithn" in command

    finish(runs["base seed 2"])
    finish(guided, checkpoint_sha256=file_sha256(runs["base seed 2"].folder / "model_best.pth"))
    assert by_name(planned(files))["guided seed 2"].state == DONE
    (runs["base seed 2"].folder / "model_best.pth").write_bytes(b"trained again")
    assert by_name(planned(files))["guided seed 2"].state == UNTESTED

    arguments = argparse.Namespace(rows=["guided"], redo_changed=False, jobs=1, by_seed=False, keep=None)
    with open(files / "out/.lock") as lock:
        failed = run_experiments.run_missing(
            arguments, lambda: planned(files), read_datasets(files / "datasets.json"), lock.fileno()
        )
    assert failed == {"guided seed 1": "it tests the models of row base, whose seed 1 is not trained"}
    assert "--load" in (files / "out/guided/seed2/calls").read_text()


def test_a_row_starts_from_the_models_of_another(files, stand_in):
    stage = {"name": "stage", "flags": "--self_critical true --scst_samples 2", "starts_from": "base"}
    guided = {"name": "guided", "flags": "--guidance 1.5", "trained_as": "stage"}
    write_table(files, [guided, stage, {"name": "base", "flags": "--ithn off --lr_ed 0.5"}])
    runs = by_name(planned(files))
    assert list(runs) == [f"{name} seed {seed}" for name in ("guided", "stage", "base") for seed in (1, 2)]
    stage, guided = runs["stage seed 1"], runs["guided seed 1"]
    command = experiment_runs.command(stage)
    assert command[1].endswith("main_train.py")
    assert command[-2:] == ["--load", str(files / "out/base/seed1/model_best.pth")]
    # Of the row that it starts from, of the stage's own preset, and of the row itself.
    assert [stage.settings[name] for name in ("ithn", "lr_ed", "lr_ve", "scst_samples")] == ["off", 0.5, 1e-5, 2]
    assert guided.settings["lr_ve"] == 1e-5 and guided.settings["guidance"] == 1.5

    record = (
        (files / "main_train.py")
        .read_text()
        .replace("folder = ", f"open({str(files / 'order')!r}, 'a').write(value('--save_dir') + chr(10)); folder = ", 1)
    )
    (files / "main_train.py").write_text(record + "(folder / 'model_best.pth').touch()\n")
    arguments = argparse.Namespace(rows=[], redo_changed=False, jobs=1, by_seed=False, keep=None)
    failed = run_experiments.run_missing(
        arguments,
        lambda: [run for run in planned(files) if run.name not in ("guided seed 2", "base seed 2")],
        read_datasets(files / "datasets.json"),
        os.open(files / "out/.lock", os.O_RDONLY),
    )
    assert failed == {"stage seed 2": "it starts from row base, whose seed 2 is not trained"}
    order = [Path(line).relative_to(files / "out").as_posix() for line in (files / "order").read_text().split()]
    assert order == ["base/seed1", "stage/seed1"]
    assert (files / "out/guided/seed1/calls").read_text().count("--load") == 1

    finish(stage, self_critical=True, lr_ve=1e-5, lr_scheduler="constant", monitor_metric="CIDEr")
    assert by_name(planned(files))["stage seed 1"].state == DONE
    (runs["base seed 1"].folder / "model_best.pth").write_bytes(b"trained again")
    run = by_name(planned(files))["stage seed 1"]
    assert run.state == CHANGED and run.reason == "row base, from which it started, has been trained again since"


def test_a_row_of_a_table_with_folds_is_all_its_folds(files):
    (files / "folds.json").write_text(
        json.dumps(
            {
                "folds": ["tiny", "iu_xray"],
                "seeds": [1],
                "rows": [{"name": "a", "flags": "--ithn off"}, {"name": "b", "baseline": "a", "trained_as": "a"}],
            }
        )
    )
    table = read_table(files / "folds.json")
    assert [(row.name, row.dataset, row.baseline, row.trained_as) for row in table.rows] == [
        ("a/tiny", "tiny", "", ""),
        ("a/iu_xray", "iu_xray", "", ""),
        ("b/tiny", "tiny", "a/tiny", "a/tiny"),
        ("b/iu_xray", "iu_xray", "a/iu_xray", "a/iu_xray"),
    ]
    runs = plan(table, read_datasets(files / "datasets.json"), files / "out")
    assert [run.name for run in run_experiments.chosen_runs(runs, ["b"])] == ["b/tiny seed 1", "b/iu_xray seed 1"]
    assert [run.name for run in run_experiments.chosen_runs(runs, ["b/tiny"])] == ["b/tiny seed 1"]
    assert runs[2].weights == files / "out/a/tiny/seed1/model_best.pth" == runs[0].folder / "model_best.pth"
    with pytest.raises(InputError, match='names its data sets itself, under "folds"'):
        choose(table, dataset="tiny", seeds=())


def test_two_runners_do_not_share_a_folder(files, stand_in):
    with pytest.raises(InputError, match=r"another run_experiments\.py"), experiment_runs.locked(files / "out"):
        pass


def test_stopping_leaves_no_training_behind(files, stand_in):
    (files / "wait").touch()
    script = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from scripts.experiments import runs as experiment_runs
from scripts import run_experiments
import signal
experiment_runs.ROOT = pathlib.Path({str(files)!r})
run_experiments.mine = lambda runs: None
sys.argv = ["x", {str(files / "rows.json")!r}, "--datasets", {str(files / "datasets.json")!r}, "--dataset", "tiny",
            "--out", {str(files / "other")!r}, "--jobs", "2"]
run_experiments.run_entry_point(run_experiments.main)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(list((files / "other").glob("*/*/history.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert b"table:" not in process.communicate(timeout=60)[0] and process.returncode == 130
    with experiment_runs.locked(files / "other"):  # nobody holds it any more
        assert not list((files / "other").glob("*/*/results.json"))


@pytest.mark.parametrize(
    ("more", "part"),
    [(["--out", "rows.json"], "--out rows.json: is a file; name a folder"), ([], "no score is called 'BLEU4'")],
)
def test_a_dry_run_finds_what_a_run_would_end_at(files, monkeypatch, more, part):
    if not more:
        write_table(files, columns=["BLEU4"])
    monkeypatch.chdir(files)
    monkeypatch.setattr(run_experiments.signal, "signal", lambda *_: None)
    argv = ["run_experiments.py", "rows.json", "--datasets", "datasets.json", "--dataset", "tiny", "--dry_run", *more]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(InputError, match=part):
        run_experiments.main()


def test_every_flag_that_is_not_compared_exists():
    assert {field.name for field in dataclasses.fields(Config)} >= NO_EFFECT_ON_RESULTS


def test_results_older_than_a_setting_were_made_as_it_was_then(files):
    """Before --suppress_unk there was nothing that kept <unk> from being written."""
    run = by_name(planned(files))["base seed 1"]
    finish(run)
    content = json.loads((run.folder / "results.json").read_text())
    del content["config"]["suppress_unk"], content["config"]["meteor_timeout"]
    (run.folder / "results.json").write_text(json.dumps(content))
    run = by_name(planned(files))["base seed 1"]
    assert (run.state, run.reason) == (CHANGED, "suppress_unk False, now True")


def test_flags_of_results_train_nothing_anew_unless_they_choose_the_model():
    flags = {field.name for field in dataclasses.fields(Config) if field.metadata["group"] in ("results", "scores")}
    choosing = {"monitor_metric", "monitor_mode", "early_stop", "start_eval_epoch"}
    assert flags == SCORING | (NO_EFFECT_ON_RESULTS & flags) and choosing.isdisjoint(SCORING | NO_EFFECT_ON_RESULTS)
