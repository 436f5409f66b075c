"""--unfreeze in a run: the frozen stages stay as they were, also after a resumption."""

import json
from pathlib import Path

import pytest
import torch

from modules.flags import parse_flags
from modules.run.testing import run_testing
from modules.run.training import run_training
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.conftest import TINY
from tests.gloo_support import run_together
from tests.layers.test_hub_encoders import save


@pytest.mark.thorough
def test_a_resumed_run_goes_on_with_the_same_part(train):
    folder = train("--unfreeze", "last:1", "--ithn", "off", "--lr_ve", 1e-2)
    before = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    argv = ["--save_dir", str(folder), "--resume", "auto", "--epochs", "2"]
    with pytest.raises(InputError, match="--unfreeze norm: the run of --resume .* began with last:1"):
        run_training(*parse_flags([*argv, "--unfreeze", "norm"], "main_train.py", ""))
    run_training(*parse_flags(argv, "main_train.py", ""))
    after = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "visual_extractor" in name}
    assert changed and all(name.startswith("visual_extractor.model.7.") for name in changed)


@pytest.mark.thorough
def test_the_last_stage_is_trained_on_stored_features_of_the_others(train, demo_index, tmp_path):
    """A resumption finds the file again, although trained weights have changed; scores are those without it."""
    cache = tmp_path / "cache"
    flags = ["--unfreeze", "last:1", "--feature_cache", cache, "--lr_ve", 1e-2, "--negative_index", demo_index]
    folder = train(*flags)
    before = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    argv = ["--save_dir", str(folder), "--resume", "auto", "--epochs", "2"]
    run_training(*parse_flags(argv, "main_train.py", ""))
    after = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "visual_extractor" in name}
    assert changed and all(name.startswith("visual_extractor.model.7.") for name in changed)
    assert len(list(cache.iterdir())) == 1
    with_cache = json.loads((folder / "results.json").read_text())
    run_testing(*parse_flags(["--load", str(folder / "model_best.pth"), "--feature_cache", ""], "main_test.py", ""))
    without = json.loads((folder / "results.json").read_text())
    assert with_cache["config"]["feature_cache"] and not without["config"]["feature_cache"]
    for row, scores in with_cache["test"].items():
        numbers = {name: value for name, value in scores.items() if value is not None}
        assert {name: without["test"][row][name] for name in numbers} == pytest.approx(numbers, rel=1e-4), row


@pytest.mark.thorough
def test_images_read_once_in_half_precision_and_resumed(train, tmp_path):
    """The weights are those of one run that reads the files, to the bit."""
    flags = ["--unfreeze", "last:1", "--precision", "bfloat16", "--lr_ve", 1e-2, "--ithn", "off", "--beam_size", 1]
    folder = train(*flags, "--image_cache", tmp_path / "cache")
    before = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    argv = ["--save_dir", str(folder), "--resume", "auto", "--epochs", "2"]
    run_training(*parse_flags(argv, "main_train.py", ""))
    after = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "visual_extractor" in name}
    assert changed and all(name.startswith("visual_extractor.model.7.") for name in changed)
    folder = train(*flags, "--epochs", 2, "--save_dir", tmp_path / "plain")
    torch.testing.assert_close(load_checkpoint(folder / "current_checkpoint.pth")["state_dict"], after, rtol=0, atol=0)


def trained_weights(argv):
    """The weights at the end of a training with the flags ``argv``, of this process."""
    run_training(*parse_flags(argv, "main_train.py", ""))
    content = load_checkpoint(Path(argv[argv.index("--save_dir") + 1]) / "current_checkpoint.pth")
    return {name: value for name, value in content["state_dict"].items() if value.is_floating_point()}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["last:1", "lora:2"])
def test_two_processes_train_as_one(demo, demo_index, tmp_path, part):
    """Stages on stored features, and adapters on encoder and decoder."""
    (tmp_path / "vit").mkdir()
    save(tmp_path / "vit", "vit", image_size=32)
    data = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images", "--negative_index", demo_index]
    same = "--optim SGD --dropout 0 --lr_ve 1e-2 --beam_size 1 --epochs 2 --model_name hf --device cpu".split()
    model = ["--visual_extractor", f"hf:{tmp_path / 'vit'}", "--unfreeze", part]
    found = {}
    for world in (1, 2):
        own = {"last:1": ["--feature_cache", tmp_path / f"cache{world}"], "lora:2": ["--lora_rank", 2]}[part]
        places = ["--save_dir", tmp_path / f"run{world}", "--record_dir", tmp_path / "records"]
        argv = [*data, *TINY, *same, *model, *own, *places, "--batch_size", 8 // world]
        argv = [str(word) for word in argv]
        found[world] = run_together(trained_weights, 2, tmp_path, argv)[0] if world == 2 else trained_weights(argv)
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=1e-5)
    if part == "last:1":
        [one], [two] = ((tmp_path / f"cache{world}").iterdir() for world in (1, 2))
        assert one.read_bytes() == two.read_bytes()
