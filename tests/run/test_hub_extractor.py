"""A vision model of a folder in a run: the checkpoint describes it, so that nothing is read or asked for it again."""

import json
import shutil

import pytest
import torch

from modules.config import EXPORTED
from modules.flags import parse_flags
from modules.inference.hub_format import write_hub_folder
from modules.run.descriptions import with_descriptions
from modules.run.predictor import load_predictor
from modules.run.testing import run_testing
from modules.run.training import run_training
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.layers.test_hub_encoders import save


@pytest.fixture
def encoder(tmp_path):
    """Folder of a DINOv2 of the smallest size."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    save(folder, "dinov2", image_size=64)
    return folder


@pytest.fixture
def trained_on_it(train, encoder, monkeypatch):
    """Results folder of a run with the encoder, which is gone since; a request for a model fails the test."""
    folder = train("--visual_extractor", f"hf:{encoder}", "--ithn", "off")
    shutil.rmtree(encoder)

    def refuse(*given, **options):
        raise AssertionError("asked for a model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    return folder


def test_a_run_its_test_and_its_resumption_need_the_folder_once(trained_on_it, demo, tmp_path):
    given, _ = parse_flags(["--load", str(trained_on_it / "model_best.pth")], "main_test.py", "")
    run_testing(given, [])
    before = load_checkpoint(trained_on_it / "current_checkpoint.pth")
    assert before["config"]["image_size"] == 32 and "dinov2" in before["config"]["visual_extractor_config"]
    given, _ = parse_flags(["--save_dir", str(trained_on_it), "--resume", "auto", "--epochs", "2"], "main_train.py", "")
    run_training(given, [])
    after = load_checkpoint(trained_on_it / "current_checkpoint.pth")
    name = "visual_extractor.model.model.embeddings.patch_embeddings.projection.weight"
    assert after["epoch"] == 2 and not torch.equal(after["state_dict"][name], before["state_dict"][name])


def test_what_is_shared_does_not_name_the_folder(trained_on_it, tmp_path):
    content = load_checkpoint(trained_on_it / "model_best.pth")
    write_hub_folder(tmp_path / "out", content, "", EXPORTED)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["visual_extractor"] == "hf:encoder"
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    load_predictor(str(tmp_path / "out"), {})


def test_a_checkpoint_without_the_description_reads_no_folder(trained_on_it, tmp_path):
    content = load_checkpoint(trained_on_it / "model_best.pth")
    content["config"]["visual_extractor_config"] = ""
    torch.save(content, tmp_path / "edited.pth")
    with pytest.raises(InputError, match="named by a checkpoint that lacks its description"):
        load_predictor(str(tmp_path / "edited.pth"), {})


def test_the_models_own_image_size_is_used_unless_given(encoder):
    name = f"hf:{encoder}"
    assert with_descriptions({"visual_extractor": name}, None)["image_size"] == 32  # its crop
    assert with_descriptions({"visual_extractor": name, "image_size": 48}, None)["image_size"] == 48
    assert with_descriptions({"visual_extractor": "resnet18"}, None) == {"visual_extractor": "resnet18"}
    with pytest.raises(InputError, match="--visual_extractor hf:/nowhere: no such folder"):
        with_descriptions({"visual_extractor": "hf:/nowhere"}, None)


def test_a_cache_of_features_has_no_class_token(train, encoder, tmp_path):
    flags = ["--visual_extractor", f"hf:{encoder}", "--freeze_visual_extractor", "true", "--image_feature", "class"]
    with pytest.raises(InputError, match="--image_feature class: --feature_cache keeps patches alone"):
        train(*flags, "--feature_cache", tmp_path / "cache")
    train(*flags, "--ithn", "off")
