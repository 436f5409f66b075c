"""What is there is not lost: outputs that are inputs, or files of another kind, are refused before the work."""

import importlib
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from modules.runtime.errors import InputError
from modules.runtime.output_files import Output, begins_with, check_outputs, is_json, is_safetensors, write_annotation

TEXT = b"my notes\n"
FLAGS = (
    "--visual_extractor resnet18 --visual_extractor_pretrained false --image_size 32 --device cpu --num_workers 0 "
    "--batch_size 8"
).split()


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    return importlib.import_module(f"scripts.{script}").main()


def own_files(folder, demo, trained):
    """A copy of the tiny data set, its labels and a model, beside files of somebody's own."""
    shutil.copytree(demo, folder)
    shutil.copy(trained / "model_best.pth", folder / "model.pth")
    for name in ("notes.txt", "attention.html", "negatives.md"):
        (folder / name).write_bytes(TEXT)
    (folder / "config.json").write_text('{"model": 1}')
    (folder / "gts.csv").write_text("no edema .\n")
    (folder / "res.csv").write_text("edema .\n")
    shutil.copy(next((demo / "images").rglob("*.png")), folder / "image.png")
    return folder


@pytest.fixture
def files(demo, demo_index, demo_labels, trained, tmp_path):
    return own_files(tmp_path / "files", demo, trained)


@pytest.fixture(scope="module")
def threatened(demo, demo_index, demo_labels, trained, tmp_path_factory):
    """The same files once for all refusals, with others that programs of ours and people might have left."""
    from modules.inference.report_index import ReportIndex

    folder = own_files(tmp_path_factory.mktemp("threatened") / "files", demo, trained)
    ReportIndex.of(np.ones((1, 2)), ["a"], "b").save(folder / "reports.safetensors")
    with open(folder / "report_labels.csv", "a") as file:
        file.write("X,train,corrected by hand" + "," * 14 + "\n")
    (folder / "link.json").symlink_to("annotation.json")
    os.link(folder / "annotation.json", folder / "hard_link.json")
    os.mkfifo(folder / "pipe")
    (folder / "figures").mkdir()
    for name in ("image.png.png", "figures.png"):
        Image.new("L", (8, 8)).save(folder / "figures" / name)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MINE = ("mine_hard_negatives", "--ann_path", "annotation.json", "--text_encoder", "tfidf", "--device", "cpu", "--out")
LABEL = ("label_reports", "annotation.json", "--out")
BUILD = (
    "build_prototypes",
    "--ann_path",
    "annotation.json",
    "--image_dir",
    "images",
    "--label_path",
    "report_labels.csv",
    "--text_encoder",
    "tfidf",
    *FLAGS,
    "--out",
)
PROBE = (
    "probe_images",
    "--ann_path",
    "annotation.json",
    "--image_dir",
    "images",
    "--label_path",
    "report_labels.csv",
    *FLAGS,
    "--out",
)
SCORE = ("compute_ce", "--gts", "gts.csv", "--res", "res.csv", "--out")
PREDICT = ("predict", "--load", "model.pth", "--device", "cpu", "--quiet", "image.png")
INDEX = (
    "index_reports",
    "--load",
    "model.pth",
    "--ann_path",
    "annotation.json",
    "--image_dir",
    "images",
    "--device",
    "cpu",
    "--out",
)
CHECK = ("check_data", "--ann_path", "annotation.json", "--image_dir", "images", "--json")


@pytest.mark.parametrize(
    ("command", "out", "problem"),
    [
        (MINE, "annotation.json", "--out annotation.json: is --ann_path of the same command"),
        (MINE, "images/../annotation.json", "is --ann_path of the same command"),
        (MINE, "link.json", "is --ann_path of the same command"),
        (MINE, "hard_link.json", "is --ann_path of the same"),
        (MINE, "notes.txt", "--out notes.txt: is there and is no hard-negative index; name another file"),
        (MINE, "config.json", "is there and is no hard-negative index"),
        (MINE, "model.pth", "is no hard-negative index"),
        (MINE, "reports.safetensors", "is no hard-negative index"),
        (MINE, "pipe", "is no regular file"),
        (LABEL, "annotation.json", "is the input of the same command"),
        (LABEL, "labels.csv", "is no output of this program as it wrote it (by labels.provenance.json)"),
        (LABEL, "report_labels.csv", "is no output of this program as it wrote it"),  # corrected by hand, see below
        (LABEL, "..", "--out ..: is a folder"),
        (BUILD, "report_labels.csv", "is --label_path of the same command"),
        (BUILD, "negatives.safetensors", "is no file of prototypes"),
        (PROBE, "annotation.json", "is --ann_path"),
        (PROBE, "config.json", "is no table of this program"),
        (SCORE, "gts.csv", "is --gts"),
        (SCORE, "res.csv", "is --res"),
        (SCORE, "annotation.json", "is no JSON file of"),
        ((*PREDICT, "--csv"), "image.png", "--csv image.png: is an image of the same command"),
        ((*PREDICT, "--csv"), "annotation.json", "is no table of this program"),
        ((*PREDICT, "--csv"), "gts.csv", "is no table of this program"),
        ((*PREDICT, "--json"), "annotation.json", "is no JSON file of this program"),
        ((*PREDICT, "--json"), "model.pth", "--json model.pth: is --load of the same command"),
        ((*PREDICT, "--html"), "image.png", "is an image"),
        ((*PREDICT, "--html"), "config.json", "no page of this"),
        ((*PREDICT, "--csv", "new", "--json"), "new", "--csv new: is --json of the same command"),
        (INDEX, "negatives.safetensors", "is no index of this program"),
        (INDEX, "model.pth", "is --load"),
        (CHECK, "annotation.json", "is --ann_path"),
        (CHECK, "config.json", "is no JSON file of this program"),
        (
            ("inspect_negatives", "--load", "model.pth", "--out"),
            "./",
            "negatives.md: is there and is no output of this",
        ),
        (
            ("plot_attention", "--load", "model.pth", "image.png", "--out"),
            "./",
            "attention.html: is there and is no page",
        ),
        (
            ("plot_attention", "--load", "model.pth", "image.png", "--out"),
            "figures",
            "image.png.png: is there and is no",
        ),
        (
            ("plot_attention", "--load", "model.pth", "--group", "folder", "figures", "--out"),
            "figures",
            "figures.png: is an image of the same command",
        ),
    ],
)
def test_what_would_be_lost_is_refused_before_the_work(threatened, monkeypatch, command, out, problem):
    monkeypatch.chdir(threatened)
    before = content(threatened)
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        run(monkeypatch, *command, out)
    assert "\n" not in str(caught.value)
    assert content(threatened) == before


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (MINE, "new/index.safetensors"),
        (LABEL, "new/labels.csv"),
        (BUILD, "new/prototypes.safetensors"),
        (PROBE, "new/probe.json"),
        (SCORE, "new/ce.json"),
        (INDEX, "new/reports.safetensors"),
        (CHECK, "new/found.json"),
        ((*PREDICT, "--csv", "new/a.csv", "--html", "new/a.html", "--json"), "new/a.json"),
        (("plot_attention", "--load", "model.pth", "--device", "cpu", "image.png", "--out"), "new"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_can_be_run_again(files, monkeypatch, command, out):
    monkeypatch.chdir(files)
    (files / "new").mkdir()
    written = []
    if command[0] != "plot_attention":
        (files / out).touch()  # an empty file, of mktemp for one, is no loss
    for _ in range(2):
        assert not run(monkeypatch, *command, out)
        written.append(sorted(path.name for path in (files / "new").iterdir()))
    assert written[0] == written[1] and all(path.stat().st_size for path in (files / "new").rglob("*"))


def test_only_whole_safetensors_headers_count(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "ours", {"format": "ithn-hard-negatives-0"})
    recognises = is_safetensors("ithn-hard-negatives")
    assert recognises(tmp_path / "ours")  # of another version, which is to be mined again
    whole = (tmp_path / "ours").read_bytes()
    for number, damaged in enumerate((b"\xff" * 64, whole[:20], b"\x02" + bytes(7) + b"[]", b"abc", bytes(8))):
        path = tmp_path / str(number)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is there and is no index"):
            check_outputs([Output("--out", path, "index", recognises)])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no table"):
        check_outputs([Output("--out", tmp_path / "deep.json", "table", is_json("a"))])
    (tmp_path / "table").write_text("a,b\r\n")
    assert not begins_with("a,b")(tmp_path / "table")


def records(*ids, report="Clear.", images=1):
    return [{"id": name, "report": report, "image_path": [f"{name}/{n}.png" for n in range(images)]} for name in ids]


@pytest.mark.parametrize(
    ("there", "may_grow", "outcome"),
    [
        (None, False, "written"),
        ("", False, "written"),
        ({"train": records("a", "b"), "val": records("c")}, False, "unchanged"),
        ({"train": records("a"), "val": records("c")}, True, "written"),
        ({"train": records("a"), "val": records("c")}, False, None),
        ({"train": records("a", "c"), "val": records("b")}, True, None),  # another split
        ({"train": records("a", report="Other."), "val": []}, True, None),
        ({"train": records("z"), "val": []}, True, None),
        ({"train": [records("a")[0] | {"label": 1}], "val": []}, True, None),  # somebody's own field
        ({"train": records("a", images=2), "val": []}, True, None),
        ([1], True, None),
        ({"train": 3}, True, None),
        ("no JSON", True, None),
    ],
)
def test_an_annotation_with_other_content_stays(tmp_path, there, may_grow, outcome):
    path = tmp_path / "annotation.json"
    if there is not None:
        path.write_text(there if isinstance(there, str) else json.dumps(there, indent=3))
    before = path.read_bytes() if path.exists() else b""
    new = {"train": records("a", "b"), "val": records("c")}
    if outcome is None:
        with pytest.raises(InputError, match="annotation.json: is there with other content .*another --out.*; see"):
            write_annotation(path, new, may_grow=may_grow, hint="; see")
        assert path.read_bytes() == before
        return
    assert write_annotation(path, new, may_grow=may_grow) == outcome
    assert json.loads(path.read_bytes()) == new
    assert (path.read_bytes() == before) is (outcome == "unchanged")


def test_a_studys_late_image_makes_its_record_longer(tmp_path):
    path = tmp_path / "annotation.json"
    write_annotation(path, {"train": records("a")})
    assert write_annotation(path, {"train": records("a", images=2)}, may_grow=True) == "written"
    assert len(json.loads(path.read_text())["train"][0]["image_path"]) == 2


@pytest.mark.parametrize(
    ("script", "flag", "inside"),
    [
        ("make_phantom", "--annotation", "annotation.json"),
        ("make_demo_data", "--findings", "findings.csv"),
        ("make_demo_data", "--reports", "annotation.json"),
        ("make_phantom", "--coding", "notes.txt"),
    ],
)
def test_nothing_is_drawn_over_what_is_read(files, tmp_path, monkeypatch, script, flag, inside):
    more = {
        "--reports": ("--findings", shutil.copy(files / "findings.csv", tmp_path / "copy.csv")),
        "--coding": ("--annotation", shutil.copy(files / "annotation.json", tmp_path / "copy.json")),
    }.get(flag, ())
    before = content(files)
    (tmp_path / "link").symlink_to(files)
    for out in (files, tmp_path / "link"):
        with pytest.raises(InputError, match=f"{flag} .*{inside}: lies in --out .*copy it elsewhere"):
            run(monkeypatch, script, flag, files / inside, *more, "--out", out, "--workers", 1)
    assert content(files) == before


def test_somebodys_own_tables_stay(tmp_path, monkeypatch, capsys):
    from scripts import run_experiments
    from tests.experiment_support import MODELS, write_files

    files = write_files(tmp_path)
    monkeypatch.setattr(run_experiments, "available_models", lambda: MODELS)
    command = (
        "run_experiments",
        files / "rows.csv",
        "--datasets",
        files / "datasets.json",
        "--dataset",
        "tiny",
        "--out",
        tmp_path / "paper",
    )
    (tmp_path / "paper").mkdir()
    own = tmp_path / "paper" / "table.tex"
    own.write_bytes(TEXT)
    for more in ((), ("--table_only",), ("--table_only",)):
        with pytest.raises(InputError, match=r"--out .*paper: its table.tex would be replaced"):
            run(monkeypatch, *command, *more)
        assert [path.name for path in own.parent.iterdir()] == ["table.tex"] and own.read_bytes() == TEXT
    (tmp_path / "paper" / "base" / "seed1").mkdir(parents=True)  # of a version that left nothing else
    assert not run(monkeypatch, *command, "--table_only")
    shutil.rmtree(tmp_path / "paper")
    for _ in range(2):  # a table without a run is ours too
        assert not run(monkeypatch, *command, "--table_only")
    assert own.read_text().startswith("% ")
