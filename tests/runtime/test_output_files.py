"""What is there is not lost: outputs that are inputs, or files of another kind, are refused before the work."""

import contextlib
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
from modules.runtime.output_files import contains, write_annotation

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
    "research.probe_images",
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
        (MINE, "annotation.json", "--out annotation.json: is also --ann_path of this command"),
        (MINE, "images/../annotation.json", "is also --ann_path of this command"),
        (MINE, "link.json", "is also --ann_path of this command"),
        (MINE, "hard_link.json", "is also --ann_path"),
        (MINE, "notes.txt", "--out notes.txt: already exists and is not a hard-negative index; name another file"),
        (MINE, "config.json", "is not a hard-negative index"),
        (MINE, "model.pth", "is not a hard-negative index"),
        (MINE, "reports.safetensors", "is not a hard-negative index"),
        (MINE, "pipe", "is not a regular file"),
        (LABEL, "annotation.json", "is also the input of this command"),
        (LABEL, "labels.csv", "is not an unchanged output of this program (by labels.provenance.json)"),
        (LABEL, "report_labels.csv", "is not an unchanged output of this program"),  # corrected by hand, see below
        (LABEL, "..", "--out ..: is a folder"),
        (BUILD, "report_labels.csv", "is also --label_path of this command"),
        (BUILD, "negatives.safetensors", "is not a prototypes file"),
        (PROBE, "annotation.json", "is also --ann_path"),
        (PROBE, "config.json", "is not a table of this program"),
        (SCORE, "gts.csv", "is also --gts"),
        (SCORE, "res.csv", "is also --res"),
        (SCORE, "annotation.json", "is not a JSON file of"),
        ((*PREDICT, "--csv"), "image.png", "--csv image.png: is also an image of this command"),
        ((*PREDICT, "--csv"), "annotation.json", "is not a table of this program"),
        ((*PREDICT, "--csv"), "gts.csv", "is not a table of this program"),
        ((*PREDICT, "--json"), "annotation.json", "is not a JSON file of this program"),
        ((*PREDICT, "--json"), "model.pth", "--json model.pth: is also --load of this command"),
        ((*PREDICT, "--html"), "image.png", "is also an image"),
        ((*PREDICT, "--html"), "config.json", "not a page of this"),
        ((*PREDICT, "--csv", "new", "--json"), "new", "--csv new: is also --json of this command"),
        (INDEX, "negatives.safetensors", "is not an index of this program"),
        (INDEX, "model.pth", "is also --load"),
        (CHECK, "annotation.json", "is also --ann_path"),
        (CHECK, "config.json", "is not a JSON file of this program"),
        (
            ("research.inspect_negatives", "--load", "model.pth", "--out"),
            "./",
            "negatives.md: already exists and is not an output of this",
        ),
        (
            ("plot_attention", "--load", "model.pth", "image.png", "--out"),
            "./",
            "attention.html: already exists and is not a page",
        ),
        (
            ("plot_attention", "--load", "model.pth", "image.png", "--out"),
            "figures",
            "image.png.png: already exists and is not",
        ),
        (
            ("plot_attention", "--load", "model.pth", "--group", "folder", "figures", "--out"),
            "figures",
            "figures.png: is also an image of this command",
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


def test_a_file_is_recognised_by_what_its_program_writes(tmp_path):
    from safetensors.torch import save_file

    recognises = contains("ithn-hard-negatives")
    save_file({"a": torch.zeros(2)}, tmp_path / "ours", {"format": "ithn-hard-negatives-0"})
    assert recognises(tmp_path / "ours")  # written by another version: it may be replaced
    save_file({"a": torch.zeros(2)}, tmp_path / "other", {"format": "pt"})
    for path in (tmp_path / "other", tmp_path / "absent"):
        with contextlib.suppress(FileNotFoundError):
            assert not recognises(path)


def records(*ids, report="Clear.", images=1):
    return [{"id": name, "report": report, "image_path": [f"{name}/{n}.png" for n in range(images)]} for name in ids]


@pytest.mark.parametrize(
    ("there", "outcome"),
    [
        (None, "written"),
        ("", "written"),
        ({"train": records("a", "b"), "val": records("c")}, "unchanged"),
        ({"train": records("a"), "val": records("c")}, "written"),
        ({"train": records("a", "c"), "val": records("b")}, None),  # another split
        ({"train": records("a", report="Other."), "val": []}, None),
        ({"train": records("z"), "val": []}, None),
        ({"train": [records("a")[0] | {"label": 1}], "val": []}, None),  # somebody's own field
        ({"train": records("a", images=2), "val": []}, None),
        ([1], None),
        ({"train": 3}, None),
        ("no JSON", None),
    ],
)
def test_an_annotation_with_other_content_stays(tmp_path, there, outcome):
    path = tmp_path / "annotation.json"
    if there is not None:
        path.write_text(there if isinstance(there, str) else json.dumps(there, indent=3))
    before = path.read_bytes() if path.exists() else b""
    new = {"train": records("a", "b"), "val": records("c")}
    if outcome is None:
        with pytest.raises(
            InputError, match="annotation.json: already exists with other content.*another --out.*; see"
        ):
            write_annotation(path, new, "; see")
        assert path.read_bytes() == before
        return
    assert write_annotation(path, new) == outcome
    assert json.loads(path.read_bytes()) == new
    assert (path.read_bytes() == before) is (outcome == "unchanged")


def test_a_studys_late_image_makes_its_record_longer(tmp_path):
    path = tmp_path / "annotation.json"
    write_annotation(path, {"train": records("a")})
    assert write_annotation(path, {"train": records("a", images=2)}) == "written"
    assert len(json.loads(path.read_text())["train"][0]["image_path"]) == 2


@pytest.mark.parametrize(
    ("script", "flag", "inside"),
    [
        ("research.make_phantom", "--annotation", "annotation.json"),
        ("make_demo_data", "--findings", "findings.csv"),
        ("make_demo_data", "--reports", "annotation.json"),
        ("research.make_phantom", "--coding", "notes.txt"),
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
        with pytest.raises(InputError, match=f"{flag} .*{inside}: is inside --out .*copy it elsewhere"):
            run(monkeypatch, script, flag, files / inside, *more, "--out", out, "--workers", 1)
    assert content(files) == before


def test_somebodys_own_tables_stay(tmp_path, monkeypatch, capsys):
    from tests.experiment_support import write_files

    files = write_files(tmp_path)
    command = (
        "run_experiments",
        files / "rows.json",
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
