"""Nothing that a file says causes a request or starts a program; only a flag that the user types does."""

import contextlib
import json
import sys

import pytest
import torch
from PIL import Image

from modules.flags import resolve_config
from modules.run.serving import report_writer
from modules.runtime import settings
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.conftest import TINY
from tests.hostile_support import run

LOOK = {"mean": [0.5], "std": [0.5], "size": 32}
TIMM = json.dumps({"library": "timm", "architecture": "resnet18", "args": {}, **LOOK})
VIT = json.dumps({"library": "transformers", "config": {"model_type": "vit", "_name_or_path": "evil/model"}, **LOOK})
EVENTS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto", "subprocess.Popen")
STARTS = ("os.system", "os.exec", "os.posix_spawn")
HARMLESS = {"git", "uname", "ldconfig", "gcc", "cc", "ld", "sh", "/bin/sh"}  # provenance, shared libraries
_SEEN: list[str] | None = None


def _watch(event, arguments):
    """A resolver that records, and answers nothing; programs are recorded, and not started."""
    if _SEEN is None or event not in EVENTS + STARTS:
        return
    asked = str(arguments[1] if event == "socket.connect" else arguments[0])
    if event.startswith("socket") or asked not in (*HARMLESS, sys.executable):
        _SEEN.append(f"{event} {asked}")
        raise OSError(101, f"not in a test: {event} {asked}")


sys.addaudithook(_watch)


@pytest.fixture
def seen(monkeypatch):
    """What was asked of the network, and which programs were started."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys.modules[__name__], "_SEEN", found := [])
    yield found
    settings._NAMED_BY_FILES.clear()


def claims(folder):
    """Settings that a hostile checkpoint may hold."""
    evil = {"chexbert_path": str(folder / "chexbert.pth"), "chexbert_encoder": "evil/bert"}
    return {
        "an extractor of the hub": {"visual_extractor": "hf_hub:evil/model"},
        "an extractor of the hub, another way": {"visual_extractor": "hf-hub:evil/model"},
        "an extractor of the hub, loudly": {"visual_extractor": "HF-HUB:evil/model"},
        "a vision model of the hub": {"visual_extractor": "hf:evil/model"},
        "a vision model that is described": {"visual_extractor": "hf:evil/model", "visual_extractor_config": VIT},
        "a vision model of another's name": {
            "visual_extractor": "hf:evil/model",
            "visual_extractor_config": json.dumps(json.loads(TIMM) | {"architecture": "hf_hub:evil/model"}),
        },
        "an extractor with weights": {"visual_extractor": "resnet18.a1_in1k", "visual_extractor_pretrained": True},
        "an extractor in a folder": {"visual_extractor": f"local-dir:{folder}"},
        "weights at an address": {"visual_extractor_weights": "https://evil.example/w.pth"},
        "a language model": {"model_name": "visualgpt", "gpt2_path": "evil/gpt2", "tokenizer": "bpe"},
        "a language model for words": {"gpt2_path": "evil/gpt2", "tokenizer": "auto"},
        "a labeler's encoder": evil,
        "a labeler alone": {"chexbert_path": evil["chexbert_path"]},
        "an encoder of scores": {"bertscore_path": "evil/encoder"},
        "shards at an address": {"shards": "https://evil.example/shards"},
        "shards in a bucket": {"shards": "s3://evil/shards"},
        "shards through a chain": {"shards": "simplecache::https://evil.example/shards"},
        "images at an address": {"image_dir": "https://evil.example/images"},
        "an annotation at an address": {"ann_path": "https://evil.example/annotation.json"},
        "an annotation on a share": {"ann_path": "//evil.example/share/annotation.json"},
        "features at an address": {"detection_features": "https://evil.example/f.hdf5"},
        "a cache at an address": {"image_cache": "https://evil.example/cache", "feature_cache": ""},
        "a program": {"radgraph_path": str(folder), "radgraph_python": str(folder / "program")},
        "processes": {"n_gpu": 64},
        "a server of curves": {"tensorboard": True, "exp_name": "https://evil.example"},
    }


ASKING = ("an extractor of the hub", "a language model", "a labeler's encoder", "shards at an address", "a program")
NAMES = tuple(claims(__import__("pathlib").Path("x")))


@pytest.fixture(scope="module")
def hostile(trained, tmp_path_factory):
    """Paths of checkpoints by what their settings claim, and "all" with most of it."""
    folder = tmp_path_factory.mktemp("hostile")
    content = load_checkpoint(trained / "model_best.pth")
    torch.save({"model_state_dict": {"w": torch.ones(1)}}, folder / "chexbert.pth")
    (folder / "weights.th").write_bytes(b"")
    (folder / "program").write_text("#!/bin/sh\n")
    (folder / "program").chmod(0o700)
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_features": 512}))
    paths = {}
    for number, (name, claim) in enumerate(claims(folder).items()):
        paths[name] = folder / f"{number}.pth"
        torch.save(content | {"config": content["config"] | claim}, paths[name])
    return paths


@pytest.mark.thorough
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "program"),
    [
        *((name, program) for name in NAMES for program in ("main_test", "scripts.predict")),
        *((name, f"main_train {flag}") for name in ASKING for flag in ("--load", "--resume")),
    ],
)
def test_a_checkpoints_settings_ask_for_nothing(name, program, hostile, seen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # an address is also the name of a folder
    Image.effect_noise((64, 64), 60).save(tmp_path / "a.png")
    program, _, flag = program.partition(" ")
    flags = [flag or "--load", hostile[name]]
    if program == "scripts.predict":
        flags += ["--quiet", tmp_path / "a.png"]
    else:
        flags += ["--save_dir", tmp_path / "new", "--record_dir", tmp_path / "records", "--epochs", 1]
    if program == "main_test":
        flags = flags[:-2]
    for work in ("modules.training.trainer.Trainer.train", "modules.run.testing.test_and_write"):
        monkeypatch.setattr(work, lambda *_, **__: None)
    monkeypatch.setattr("modules.run.training._test_best", lambda *_: None)
    code, said = run(monkeypatch, capsys, program, *flags)
    assert seen == [] and code in (0, 2) and "Traceback" not in said
    if name == "an extractor of the hub" or ("shards" in name and program != "scripts.predict"):
        assert "named by a checkpoint" in said


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_no_other_program_asks_either(hostile, demo, seen, tmp_path, monkeypatch, capsys):
    Image.effect_noise((64, 64), 60).save(tmp_path / "a.png")
    data = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images"]
    for number, name in enumerate(("an extractor of the hub", "a language model", "a labeler's encoder", "a program")):
        path, out = hostile[name], tmp_path / str(number)
        for program, flags in (
            ("scripts.plot_attention", ["--load", path, tmp_path / "a.png", "--out", out / "figures"]),
            ("scripts.export", [path, "--out", out / "folder"]),
            *([("scripts.export", [path, "--program", out / "program"])] if number == 0 else []),
            ("scripts.export", [out / "folder", "--out", out / "back.pth"]),
            ("scripts.index_reports", ["--load", path, *data, "--out", out / "index.safetensors"]),
            ("scripts.convert_checkpoint", [path, "--to", "published", "--out", out / "published.pth"]),
        ):
            code, said = run(monkeypatch, capsys, program, *flags)
            assert seen == [] and code in (0, 2) and "Traceback" not in said, (program, said)
        with contextlib.suppress(InputError):
            report_writer(str(path), {}, None)
        assert seen == []


@pytest.mark.timeout(120)
def test_no_annotation_asks(demo, seen, tmp_path, monkeypatch, capsys):
    content = json.loads((demo / "annotation.json").read_text())
    for place, record in enumerate(record for split in content.values() for record in split):
        record["report"] += " see https://evil.example/x and http://127.0.0.1:9/ ."
        record["url"] = record["coco_url"] = "https://evil.example/image.png"
        if place % 5 == 0:
            record["image_path"] = ["https:", "https://evil.example/a.png", "s3://evil/a", "file:x"][place % 4 :]
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    data = ["--ann_path", tmp_path / "annotation.json", "--image_dir", demo / "images"]
    for program, flags in (
        ("scripts.check_data", [*data, "--num_workers", 0]),
        ("scripts.mine_hard_negatives", [*data[:2], "--out", tmp_path / "n.safetensors", "--text_encoder", "tfidf"]),
        ("scripts.label_reports", [tmp_path / "annotation.json", "--out", tmp_path / "labels.csv"]),
        ("scripts.make_shards", [*data, "--out", tmp_path / "shards"]),
        ("main_train", [*data, *TINY, "--epochs", 1, "--save_dir", tmp_path / "run", "--on_bad_image", "skip"]),
    ):
        code, said = run(monkeypatch, capsys, program, *flags)
        assert seen == [] and code in (0, 1, 2) and "Traceback" not in said, (program, said)


def test_a_typed_flag_does_ask(hostile, demo, seen, tmp_path, monkeypatch, capsys):
    """What shows that requests are seen here, and that the user's word counts."""
    data = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images", "--save_dir", tmp_path / "run"]
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    for flags in (
        [*data, *TINY, "--visual_extractor", "hf_hub:evil/model"],
        [*data, *TINY, "--backbone", "visualgpt", "--gpt2_path", "evil/gpt2"],
    ):
        seen.clear()
        code, said = run(monkeypatch, capsys, "main_train", *flags)
        assert code == 2 and seen, said
        assert "huggingface" in seen[0] or "evil.example" in seen[0]


def test_whose_word_it_was_is_decided_by_each_command_line():
    saved = {"chexbert_encoder": "evil/bert", "gpt2_path": "", "radgraph_python": "/tmp/program"}
    assert resolve_config({}, saved).radgraph_python == ""
    assert settings.is_local_only("evil/bert")
    assert resolve_config({"radgraph_python": "python3", "chexbert_encoder": "evil/bert"}, saved).radgraph_python
    assert not settings.is_local_only("evil/bert")
    resolve_config({}, {"threshold": 3})
    assert settings.is_local_only("bert-base-uncased")  # the default, for a labeler that the checkpoint names
    resolve_config({})
    assert not settings.is_local_only("bert-base-uncased")
