"""Every result says what made it: code, command, flags, versions, device, seed, and hashes of what it was made from."""

import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import safe_open

from modules.labels.study_labels import read_labels
from modules.mining.index import HardNegativeIndex
from modules.run import results
from modules.runtime.environment import file_sha256, git_state
from modules.training.checkpoint import load_checkpoint
from tests.hostile_support import run


def complete(found):
    """Whether ``found`` has what goes with every result, and it is true."""
    state = found["git"]
    assert (state is None) == (git_state() is None)
    assert state is None or (len(state["commit"]) == 40 and state["dirty"] == bool(state["diff_sha256"]))
    assert found["argv"] and found["created"].endswith("+00:00")
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] and found["python"].startswith("3.")
    assert found["device"] == "cpu" and found["device_name"] and found["platform"]
    return True


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"text" * 100_000)
    assert file_sha256(tmp_path / "file") == sha256(tmp_path / "file")
    assert file_sha256(tmp_path) == file_sha256("") == file_sha256(tmp_path / "none") == ""


@pytest.mark.parametrize("step", ["_write_files", "write_page"])
def test_a_test_that_ends_while_it_writes_does_not_count_as_done(tmp_path, monkeypatch, step):
    def killed(*_):
        raise KeyboardInterrupt

    tested = SimpleNamespace(provenance={"checkpoint_sha256": ""}, as_json=dict)
    for name in ("training_free_reports", "_training_reports", "_provenance", "_log", "_keep_others", "_write_files"):
        monkeypatch.setattr(results, name, lambda *_: {})
    monkeypatch.setattr(results, "Tested", lambda **_: tested)
    monkeypatch.setattr(results, step, killed)
    names = ("config", "data", "objective", "device", "tester", "loader", "scoring", "weights", "history", "best_epoch")
    with pytest.raises(KeyboardInterrupt):
        results.test_and_write(**{name: MagicMock() for name in names}, folder=tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.thorough
def test_training_and_test(train, demo, demo_index, tmp_path, monkeypatch, capsys):
    flags = ("--negative_index", demo_index, "--seed", 11, "--floors", "false", "--report_samples", 0)
    folder = train(*flags)
    first = json.loads((folder / "results.json").read_text())
    checkpoint = load_checkpoint(folder / "model_best.pth")
    assert complete(checkpoint["provenance"]) and checkpoint["config"]["seed"] == 11
    assert checkpoint["annotation_sha256"] == sha256(demo / "annotation.json")
    code, _ = run(
        monkeypatch,
        capsys,
        "main_test",
        "--load",
        folder / "model_best.pth",
        "--save_dir",
        tmp_path / "again",
        "--record_dir",
        tmp_path / "records",
    )
    assert code == 0
    second = json.loads((tmp_path / "again" / "results.json").read_text())
    for result in (first, second):
        found = result["provenance"]
        assert complete(found) and found["seed"] == 11
        assert found["annotation_sha256"] == sha256(demo / "annotation.json")
        assert found["vocabulary_sha256"] == checkpoint["vocabulary_sha256"]
        assert found["negative_index_sha256"] == sha256(demo_index)
        assert found["checkpoint_sha256"] == sha256(folder / "model_best.pth")
        assert result["config"]["negative_index"] == str(demo_index) and result["config"]["d_model"] == 16
    assert second["provenance"]["argv"][1:3] == ["--load", str(folder / "model_best.pth")]
    page = (tmp_path / "again" / "report.html").read_text()
    assert first["provenance"]["annotation_sha256"] in page and second["provenance"]["checkpoint_sha256"] in page


def test_index_labels_prototypes_and_clinical_scores(demo, demo_index, demo_labels, tmp_path, monkeypatch, capsys):
    index = HardNegativeIndex.load(demo_index).metadata
    assert complete(index) and index["annotation_sha256"] == sha256(demo / "annotation.json")
    assert index["flags"]["text_encoder"] == "tfidf" and index["encoder"]
    labels = json.loads(demo_labels.with_suffix(".provenance.json").read_text())
    assert complete(labels["provenance"]) and labels["labeler"] == "rule"
    assert labels["input_sha256"] == sha256(demo / "annotation.json") and labels["output_sha256"] == sha256(demo_labels)
    assert read_labels(demo_labels).sha256 == sha256(demo_labels)
    code, _ = run(
        monkeypatch,
        capsys,
        "scripts.build_prototypes",
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--label_path",
        demo_labels,
        "--out",
        tmp_path / "p.safetensors",
        "--num_protype",
        2,
        "--text_encoder",
        "tfidf",
        "--visual_extractor",
        "resnet18",
        "--visual_extractor_pretrained",
        "false",
        "--image_size",
        32,
        "--num_workers",
        0,
        "--device",
        "cpu",
        "--seed",
        4,
    )
    assert code == 0
    with safe_open(tmp_path / "p.safetensors", framework="numpy") as file:
        made = json.loads(file.metadata()["metadata"])
    assert complete(made) and made["labels_sha256"] == sha256(demo_labels) and made["flags"]["seed"] == 4
    assert made["annotation_sha256"] == sha256(demo / "annotation.json")
    code, _ = run(
        monkeypatch,
        capsys,
        "scripts.compute_ce",
        "--gts",
        demo_labels,
        "--res",
        demo_labels,
        "--labeler",
        "rule",
        "--out",
        tmp_path / "ce.json",
    )
    assert code == 0
    scores = json.loads((tmp_path / "ce.json").read_text())
    assert complete(scores["provenance"]) and scores["labeler"] == "rule"
    assert scores["files_sha256"] == {"gts": sha256(demo_labels), "res": sha256(demo_labels)}


def test_changed_templates_are_part_of_the_code(tmp_path):
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "page.html.j2").write_text("<p>")
    assert git_state(tmp_path)["dirty"] is True
