"""Malicious files, through the real entry points: nothing in them runs, and each ends in one line and exit code 2."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

from modules.runtime.errors import InputError
from modules.runtime.input_files import load_tensors
from modules.training.checkpoint import load_checkpoint
from tests.hostile_support import HARMFUL, Touch, object_array, refused, run, training

BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "vocab_size": 6,
    "architectures": ["BertModel"],
}
XPRONET = ["--model_name", "xpronet", "--num_cluster", 14, "--num_protype", 2, "--d_img_ebd", 8, "--d_txt_ebd", 8]


@pytest.fixture
def canary(tmp_path):
    """A path at which there is a file only if something ran."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def test_the_canary_would_sing(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_ten_harmful_files_are_tried():
    assert len(HARMFUL) >= 10


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.timeout(60)
def test_harmful_file(name, canary, demo, demo_labels, tmp_path, monkeypatch, capsys):
    """One harmful file in the place of everything that a flag can name."""
    bad = tmp_path / ("bad.safetensors" if "header" in name else "bad.pth")
    bad.write_bytes(HARMFUL[name](canary))
    trained = training(demo, tmp_path, "--visual_extractor_pretrained", "true")
    data = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images"]
    labels, chexbert = ["--label_path", demo_labels], ["--chexbert_path", bad, "--chexbert_encoder", tmp_path]
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    for program, flags in (
        ("main_test", ["--load", bad, "--record_dir", tmp_path / "records", *data]),
        ("main_train", ["--resume", bad]),
        ("main_train", [*trained, "--visual_extractor_weights", bad]),
        ("main_train", [*trained, "--negative_index", bad]),
        ("main_train", [*training(demo, tmp_path), *XPRONET, "--label_path", bad, "--label_columns", "chexbert"]),
        ("main_train", [*training(demo, tmp_path), *XPRONET, *labels, "--init_protypes_path", bad]),
        ("main_train", [*training(demo, tmp_path), *chexbert]),
        ("scripts.label_reports", [demo / "annotation.json", "--out", tmp_path / "l.csv", *chexbert]),
        ("scripts.label_reports", [bad, "--out", tmp_path / "l.csv"]),
        ("scripts.compute_ce", ["--gts", bad, "--res", bad]),
        ("scripts.check_data", [*data, "--negative_index", bad, "--num_workers", 0]),
    ):
        if program == "scripts.check_data":
            code, said = run(monkeypatch, capsys, program, *flags)
            assert code == 2 and "Traceback" not in said
        else:
            said = refused(monkeypatch, capsys, program, *flags)
            assert "bad." in said
        assert not canary.exists(), (program, flags)


@pytest.mark.parametrize("content", ["pickle", "cut"])
def test_a_poisoned_download_folder_runs_nothing(content, canary, demo, tmp_path, monkeypatch, capsys):
    """torchvision takes what lies in its download folder without looking, pickles included."""
    from torchvision.models import ResNet18_Weights

    folder = tmp_path / "hub" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    if content == "pickle":
        file.write_bytes(HARMFUL["zip with a call"](canary))
    else:
        torch.save({"fc.weight": torch.zeros(2)}, file)
        file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which somebody's profile may well hold
    said = refused(
        monkeypatch, capsys, "main_train", *training(demo, tmp_path, "--visual_extractor_pretrained", "true")
    )
    assert "visual_extractor resnet18: its ImageNet weights could not be" in said


def test_a_poisoned_feature_cache_runs_nothing(canary, demo, tmp_path, monkeypatch, capsys):
    flags = training(
        demo,
        tmp_path,
        "--freeze_visual_extractor",
        "true",
        "--feature_cache",
        tmp_path / "features",
        "--floors",
        "false",
        "--report_samples",
        0,
        "--seed",
        5,
    )
    assert run(monkeypatch, capsys, "main_train", *flags)[0] == 0
    [cache] = (tmp_path / "features").glob("*.npy")
    whole = cache.read_bytes()
    other = np.lib.format.open_memmap(tmp_path / "other.npy", "w+", np.float64, (3, 3))
    other.flush()
    for content in (object_array(canary), whole[:-1], b"", (tmp_path / "other.npy").read_bytes()):
        cache.write_bytes(content)
        assert "delete it to have it made again" in refused(monkeypatch, capsys, "main_train", *flags)


def test_statistics_of_a_run_hold_no_objects(canary, tmp_path, monkeypatch, capsys):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    np.savez(run_folder / "statistics.npz", model=np.array([Touch(canary)], dtype=object))
    for name in ("results.json", "res.csv", "gts.csv"):
        (run_folder / name).write_text("{}" if name.endswith("json") else "a\n")
    refused(monkeypatch, capsys, "scripts.compare_runs", run_folder, run_folder)


@pytest.fixture
def code_folder(canary, tmp_path):
    """A model folder whose configuration names Python files beside it, as remote code does."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(f"import os\nos.system(\"touch '{canary}'\")\nclass C:\n    model_type = 'own'\n")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "own",
                "architectures": ["C"],
                "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C", "AutoTokenizer": ["code.C", "code.C"]},
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["code.C", "code.C"]}})
    )
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (folder / "pytorch_model.bin").write_bytes(HARMFUL["zip with a call"](canary))
    (folder / "weights.th").write_bytes(HARMFUL["zip with a call"](canary))
    shutil.copy(folder / "pytorch_model.bin", folder / "chexbert.pth")
    return folder


@pytest.mark.timeout(120)
def test_code_in_a_model_folder_is_not_run(code_folder, demo, tmp_path, monkeypatch, capsys):
    # Who would be asked whether to run the code says yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refused(
        monkeypatch,
        capsys,
        "scripts.mine_hard_negatives",
        "--ann_path",
        demo / "annotation.json",
        "--out",
        tmp_path / "n.safetensors",
        "--text_encoder",
        code_folder,
    )
    refused(monkeypatch, capsys, "main_train", *training(demo, tmp_path), "--bertscore_path", code_folder)
    # The same folder, said to be a plain BERT: its weights are a pickle that calls.
    own_code = {"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C"}}
    (code_folder / "config.json").write_text(json.dumps(BERT | own_code))
    refused(monkeypatch, capsys, "main_train", *training(demo, tmp_path), "--bertscore_path", code_folder)
    labelling = [
        demo / "annotation.json",
        "--out",
        tmp_path / "l.csv",
        "--chexbert_path",
        code_folder / "chexbert.pth",
        "--chexbert_encoder",
        code_folder,
    ]
    refused(monkeypatch, capsys, "scripts.label_reports", *labelling)
    torch.save({"model_state_dict": {"w": torch.ones(1)}}, code_folder / "chexbert.pth")
    (code_folder / "config.json").write_text(json.dumps(BERT | {"num_attention_heads": 3}))
    said = refused(monkeypatch, capsys, "scripts.label_reports", *labelling)
    assert "its config.json is not a BERT's" in said


@pytest.mark.timeout(120)
def test_links_and_pipes_in_the_place_of_files(demo, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "link", tmp_path / "loop", tmp_path):
        for flags in (
            ["--resume", path],
            ["--ann_path", path],
            ["--negative_index", path],
            ["--visual_extractor_weights", path, "--visual_extractor_pretrained", "true"],
            [*XPRONET, "--label_path", path],
            ["--chexbert_path", path],
            ["--detection_features", path],
            ["--load", path],
            [*XPRONET, "--init_protypes_path", path],
        ):
            refused(monkeypatch, capsys, "main_train", *training(demo, tmp_path), *flags)
        refused(monkeypatch, capsys, "scripts.predict", "--load", path, demo / "annotation.json")
        if path != tmp_path:
            refused(monkeypatch, capsys, "scripts.predict", "--load", demo / "annotation.json", path)
    (tmp_path / "shards.json").symlink_to("pipe")
    refused(monkeypatch, capsys, "main_train", *training(demo, tmp_path), "--shards", tmp_path)


def with_two_directories(path):
    """An archive that zipfile takes for one small member, and torch for compressed tensors of a thousand times that."""
    stored, packed = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(1_000_000)}}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), compress_type=zipfile.ZIP_DEFLATED)
    raw = packed.getvalue()
    end = raw.rfind(b"PK\5\6")
    size, start = struct.unpack_from("<II", raw, end + 12)
    name, data = b"archive/version", b"3\n"
    facts = (0, 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name))
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, *facts, 0) + name + data
    padding = size - 46 - len(name)
    offset = start + size - (size + len(local))
    directory = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, *facts, 0, padding, 0, 0, 0, offset)
    path.write_bytes(raw[: start + size] + local + directory + name + b" " * padding + raw[end:])


def test_an_archive_with_two_directories_is_refused(tmp_path):
    with_two_directories(path := tmp_path / "two.pth")
    with zipfile.ZipFile(path) as archive:
        assert [member.filename for member in archive.infolist()] == ["archive/version"]
    for load in (load_checkpoint, lambda path: load_tensors(path, "--init_protypes_path")):
        with pytest.raises(
            InputError, match="two.pth: damaged, the directory of its archive is not where its end says"
        ):
            load(path)
    torch.save({"a": torch.ones(3)}, tmp_path / "one.pt")
    assert load_tensors(tmp_path / "one.pt", "--init_protypes_path")["a"].sum() == 3
