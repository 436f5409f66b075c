"""Tables of experiments and data sets as files: those of the project, and wrong ones."""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from modules.flags import flags_in_effect, parse_flags, preset, resolve_config
from modules.runtime.errors import InputError
from modules.runtime.records import write_results
from scripts.experiments.files import choose, read_datasets, read_table
from scripts.experiments.plan import MISSING, plan

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted(path for path in (ROOT / "experiments").glob("*.json") if path.name != "datasets.json")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_run_on_the_demo_data_and_on_their_own(path, tmp_path):
    table, datasets = read_table(path), read_datasets(ROOT / "experiments" / "datasets.json")
    assert len(table.seeds) == 3 and all(row.published for row in table.rows) == path.stem.startswith("table")
    assert all(set(row.published) <= set(table.columns) for row in table.rows)
    for chosen in (table, choose(table, dataset="demo")):
        runs = plan(chosen, datasets, tmp_path)
        assert len(runs) == 3 * len(table.rows)
    assert all("tfidf" in str(run.index.path) for run in runs if run.index)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "evidence").glob("*.json")), ids=lambda path: path.stem)
def test_tables_of_the_evidence_can_be_planned(path, tmp_path):
    if path.stem == "datasets":
        assert {"demo_30", "cxr_notes", "coco_mini", "phantom_fold1"} <= set(read_datasets(path))
        return
    table = read_table(path)
    datasets = read_datasets(ROOT / "experiments" / "datasets.json") | read_datasets(path.with_name("datasets.json"))
    # The tables of a plan: one seed to tune with, six that count.
    assert len(table.seeds) == {
        "flickr8k": 6,
        "flickr8k_weight": 6,
        "flickr8k_tuning": 1,
        "flickr8k_captioners": 1,
        "flickr8k_defaults": 1,
    }.get(path.stem, 3)
    runs = plan(table, datasets, tmp_path)
    assert len(runs) == len(table.seeds) * len(table.rows) and {run.state for run in runs} == {MISSING}


def test_figures_of_the_paper():
    components = {row.name: row.published for row in read_table(ROOT / "experiments/table3_components.json").rows}
    assert components["ithn"] == {"BLEU_4": 0.183, "ROUGE_L": 0.387, "CIDEr": 0.495}
    table1 = {row.name: row.published for row in read_table(ROOT / "experiments/table1_iu_xray.json").rows}
    assert list(table1["r2gencmn_ithn"].values()) == [0.496, 0.319, 0.220, 0.160, 0.378, 0.194, 0.461]


@pytest.mark.parametrize(("name", "model"), [("iu_xray", ""), ("mimic_cxr", ""), ("coco", "visualgpt")])
def test_data_sets_have_the_settings_of_the_run_scripts(name, model, tmp_path):
    scripted = _flags_of_script(f"run_{name}.sh", tmp_path)
    dataset = read_datasets(ROOT / "experiments" / "datasets.json")[name]
    assert _config((*dataset.flags, *dataset.model_flags.get(model, ()))) == _config(scripted)


@pytest.mark.parametrize("name", ["iu_xray", "mimic_cxr"])
def test_xpronet_is_the_published_model(name):
    flags = read_datasets(ROOT / "experiments" / "datasets.json")[name].model_flags["xpronet"]
    config, published = dataclasses.asdict(_config(flags)), preset("xpronet", name)
    own = ("topk", "num_cluster", "num_protype", "d_img_ebd", "d_txt_ebd", "weight_img_con_loss", "weight_txt_con_loss")
    assert {key: config[key] for key in own} == {key: published[key] for key in own}


def test_demo_has_the_settings_of_the_demo_script():
    script = (ROOT / "run_demo.sh").read_text()
    command = script[script.index("main_train.py --ann_path") :].partition('"${given[@]}"')[0].replace("\\\n", " ")
    values = dict(pair.split("=") for pair in re.search(r"^data=.*", script, re.M)[0].split() if "(" not in pair)
    for name, value in values.items():
        command = command.replace(f"${name}", value)
    words = [word for word in shlex.split(command)[1:] if not word.startswith("${")]
    assert _config(read_datasets(ROOT / "experiments" / "datasets.json")["demo"].flags) == _config(words)


def _config(flags):
    given, _ = parse_flags(flags, "", "")
    for name in ("seed", "save_dir", "negative_index"):
        given.pop(name, None)
    return resolve_config(given)


def _flags_of_script(script, folder):
    """What a run script calls main_train.py with: a stand-in for Python writes it down."""
    (folder / "scripts").mkdir()
    for name in (script, "scripts/mine_train_test.sh"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    stand_in = folder / ".venv/bin/python"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = main_train.py ] && printf "%s\\n" "$@" >{folder}/calls\nexit 0\n')
    stand_in.chmod(0o755)
    subprocess.run(["bash", folder / script], check=True, stdout=subprocess.DEVNULL)
    return (folder / "calls").read_text().splitlines()[1:]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("t.json", "[1]", "must be an object in braces, found list"),
        ("t.json", "{", "line 1: not JSON"),
        ("t.json", '{"rows": []}', "must list one row or more"),
        ("t.json", '{"row": []}', "'row' is not one of"),
        ("t.json", '{"rows": [{"name": "a/b"}]}', "name 'a/b'"),
        ("t.json", '{"rows": [{"name": "a", "x": 1}]}', "'x'"),
        ("t.json", '{"rows": [{"name": "a", "flags": "alpha"}]}', "flags start with --"),
        ("t.json", '{"rows": [{"name": "a", "flags": "--x \'"}]}', "flags must be text"),
        ("t.json", '{"seeds": [1, 1], "rows": [{"name": "a"}]}', "different whole numbers"),
        ("t.json", '{"seeds": ["x"], "rows": [{"name": "a"}]}', "different whole numbers"),
        ("t.json", '{"rows": [{"name": "a", "published": {"BLEU_4": "high"}}]}', "published figures must be numbers"),
        ("t.json", '{"rows": [{"name": "a"}, {"name": "a"}]}', "two rows are named 'a'"),
        ("t.json", '{"rows": [{"name": "a", "baseline": "b"}]}', "baseline 'b' is not one of"),
        ("t.json", '{"rows": [{"name": "a"}, {"name": "b", "trained_as": "b"}]}', r"a row that is trained \(a\), and"),
        (
            "t.json",
            '{"rows": [{"name": "a"}, {"name": "b", "starts_from": "a"}, {"name": "c", "starts_from": "b"}]}',
            r"row c: starts_from must name a row that is trained from the beginning \(a\), and .* found 'b'",
        ),
        (
            "t.json",
            '{"rows": [{"name": "a"}, {"name": "b", "starts_from": "a", "trained_as": "a"}]}',
            "excludes trained",
        ),
        (
            "t.json",
            '{"rows": [{"name": "a"}, {"name": "b", "trained_as": "a", "flags": "--guidance 1 --epochs 9"}]}',
            r"row 2 \(b\): --epochs acts in training, and this row tests what row a has trained",
        ),
        ("t.json", '{"folds": ["a"], "rows": [{"name": "a"}]}', "folds must list the names of two or more"),
        ("t.json", '{"folds": [], "rows": [{"name": "a"}]}', "folds must list the names of two or more"),
        ("t.json", '{"folds": ["a", "../b"], "rows": [{"name": "a"}]}', "folds must list the names of two or more"),
        (
            "t.json",
            '{"folds": ["a", "b"], "rows": [{"name": "a", "published": {}}]}',
            "folds and published exclude each",
        ),
        ("t.json", '{"folds": ["a", "b"], "dataset": "a", "rows": [{"name": "a"}]}', "folds and dataset exclude each"),
        ("t.json", None, "No such file"),
    ],
)
def test_wrong_tables_get_one_line(tmp_path, name, content, part):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=part) as error:
        read_table(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_flags_of_the_table_come_before_those_of_the_row_that_another_goes_on_from(tmp_path):
    (tmp_path / "t.json").write_text(
        json.dumps(
            {
                "flags": "--epochs 3",
                "rows": [
                    {"name": "a", "flags": "--epochs 9"},
                    {"name": "b", "starts_from": "a", "flags": "--lr_ed 0.5"},
                    {"name": "c", "trained_as": "b", "flags": "--guidance 1"},
                ],
            }
        )
    )
    assert [" ".join(row.flags) for row in read_table(tmp_path / "t.json").rows] == [
        "--epochs 3 --epochs 9",
        "--epochs 3 --epochs 9 --lr_ed 0.5",
        "--epochs 3 --epochs 9 --lr_ed 0.5 --guidance 1",
    ]


def test_data_sets_run_nothing_but_scripts_of_the_project(tmp_path):
    path = tmp_path / "datasets.json"
    for command in ("/bin/sh -c x", "scripts/../../x.py", "scripts/../main_train.py", "scripts/absent.py", ""):
        path.write_text(json.dumps({"d": {"prepare": [{"makes": "x", "run": command}]}}))
        with pytest.raises(InputError, match="is not a command of this project"):
            read_datasets(path)


@pytest.mark.parametrize("path", [*TABLES, *sorted((ROOT / "experiments" / "evidence").glob("f*.json"))], ids=str)
def test_a_run_with_the_flags_of_the_plan_is_done(path, tmp_path):
    """What a run writes: the device's precision, and defaults for flags that its model does not have."""
    table, datasets = read_table(path), read_datasets(ROOT / "experiments" / "datasets.json")
    datasets |= read_datasets(ROOT / "experiments" / "evidence" / "datasets.json")
    table = choose(table, seeds=table.seeds[:1])
    for run in plan(table, datasets, tmp_path):
        if run.weights or run.start:
            continue
        given, _ = parse_flags(run.flags, "main_train.py", "")
        left, _ = flags_in_effect(given, resolve_config(given))
        config = dataclasses.asdict(resolve_config(left))
        if config["precision"] == "auto":
            config["precision"] = "bfloat16"
        made_from = {name: run.settings[name] for name in ("annotation_sha256", "files_sha256")}
        write_results(run.folder / "results.json", {"config": config, "provenance": made_from})
    found = [run for run in plan(table, datasets, tmp_path) if not (run.weights or run.start)]
    assert {(run.state, run.reason) for run in found} == {("done", "")}
