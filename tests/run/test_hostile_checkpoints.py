"""Checkpoints whose settings or tensors ask for more than they hold: one line, before anything is allocated."""

import json

import pytest
import torch
from PIL import Image

from modules.run.build import StoredWeights, require_fitting
from modules.run.predictor import load_predictor
from modules.run.vocabulary import tokenizer_from_state
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.hostile_support import run
from tests.runtime.test_hostile_images import little_memory

ENOUGH = 500_000  # kB: the file's 90 MB are read, hashed and compared; each claim is of gigabytes
WIDE = {"d_model": 10**6, "cmm_dim": 10**6}


def described(library, **entries):
    text = json.dumps({"library": library, "mean": [0.5], "std": [0.5], "size": 32, **entries})
    return {"visual_extractor": "hf:evil/model", "visual_extractor_config": text}


CLAIMS = {
    "a wide model": WIDE,
    "a wider model": {"d_model": 2 * 10**9, "cmm_dim": 2 * 10**9},
    "a wide feed-forward layer": {"d_ff": 10**9},
    "a deep model": {"num_layers": 10**9},
    "a deep model of many heads": {"num_layers": 10**9, "num_heads": 16},
    "a large memory": {"cmm_size": 10**12},
    "a number that torch cannot hold": {"d_ff": 10**30},
    "a relational memory": {"model_name": "r2gen", "rm_num_slots": 10**6, "rm_d_model": 16, "rm_num_heads": 2},
    "prototypes": {"model_name": "xpronet", "num_protype": 10**9, "xpronet_labels": "predicted"},
    "a language model": {"model_name": "visualgpt", "gpt2_layers": 10**9, "gpt2_path": ""},
    "positions": {"model_name": "visualgpt", "gpt2_positions": 10**12, "gpt2_path": ""},
    "another extractor": {"visual_extractor": "vgg16"},
    "an extractor of gigabytes": {"visual_extractor": "vit_giant_patch14_reg4_dinov2"},
    "a view of terabytes": {"image_size": 10**7},
    "a view of gigabytes": {"image_size": 30_000},
    "a million beams": {"beam_size": 10**6},
    "a long report": {"max_seq_length": 10**9},
    "samples": {"sample_method": "sample", "sample_n": 10**9},
    "processes": {"num_workers": 10**6},
    "a batch": {"batch_size": 10**12},
    "regions": {"detection_features": "x.hdf5", "max_detections": 10**12},
    "a vision model that is wide": described("transformers", config={"model_type": "vit", "hidden_size": 12 * 10**8}),
    "a vision model that is deep": described("transformers", config={"model_type": "vit", "num_hidden_layers": 10**9}),
    "a vision model of a million layers": described(
        "transformers", config={"model_type": "vit", "num_hidden_layers": 10**6}
    ),
    "a timm model that is deep": described("timm", architecture="vit_tiny_patch16_224", args={"depth": 10**9}),
    "a timm model that reads a file": described(
        "timm", architecture="resnet18", args={"checkpoint_path": "/etc/passwd"}
    ),
    "a vision model of code": described("transformers", config={"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}),
    "a setting below 0": {"d_model": -16},
    "another backbone": {"model_name": "r2gen", "rm_d_model": 16},
}


@pytest.fixture(scope="module")
def content(trained):
    return load_checkpoint(trained / "model_best.pth")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("program", ["main_test", "main_train --resume", "scripts.predict"])
@pytest.mark.parametrize("name", CLAIMS)
def test_settings_that_ask_for_more(name, program, content, tmp_path, monkeypatch, capsys):
    if program != "scripts.predict" and list(CLAIMS).index(name) % 4:
        return  # a sample: all of them build the model by the same function
    torch.save(content | {"config": content["config"] | CLAIMS[name]}, tmp_path / "x.pth")
    Image.effect_noise((64, 64), 60).save(tmp_path / "a.png")
    for work in ("modules.training.trainer.Trainer.train", "modules.run.testing.test_and_write"):
        monkeypatch.setattr(work, lambda *_, **__: None)
    monkeypatch.setattr("modules.run.training._test_best", lambda *_: None)
    program, _, flag = program.partition(" ")
    last = [tmp_path / "a.png"] if program == "scripts.predict" else ["--save_dir", tmp_path / "new"]
    with little_memory(ENOUGH):
        code, said = run(monkeypatch, capsys, program, flag or "--load", tmp_path / "x.pth", *last)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    # What only training or testing has a use for does no harm to a program that only writes reports.
    assert "Traceback" not in said and (
        len(errors) == 1 and code == 2 or CLAIMS[name].keys() <= {"num_workers", "batch_size"}
    )
    assert all(len(line) < 700 for line in errors)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: torch.zeros((1,) * value.dim()).expand(value.shape) for name, value in weights.items()},
        lambda weights: {name: torch.zeros(value.shape, device="meta") for name, value in weights.items()},
        lambda weights: weights | {"more": torch.zeros(1).expand(10**12)},
        lambda weights: weights | {f"more{number}": torch.zeros(1) for number in range(50)},
        lambda weights: weights | {next(iter(weights)): torch.zeros(2)},
        lambda weights: dict(list(weights.items())[:-1]),
        lambda weights: {name: value.flatten() for name, value in weights.items()},
        lambda weights: {name.upper(): value for name, value in weights.items()},
        lambda weights: {1: torch.zeros(2)},
        lambda weights: {"a": [torch.zeros(2)]},
        lambda weights: {},
    ],
)
def test_tensors_that_are_none(change, content, tmp_path):
    torch.save(content | {"state_dict": change(content["state_dict"])}, tmp_path / "x.pth")
    with little_memory(ENOUGH), pytest.raises(InputError) as error:
        load_predictor(str(tmp_path / "x.pth"), {})
    assert "x.pth" in str(error.value) and len(str(error.value)) < 700


def test_the_unchanged_one_fits_and_takes_no_memory_for_it(content, trained):
    from modules.flags import resolve_config
    from modules.run.predictor import UNUSED

    config = resolve_config({}, content["config"] | UNUSED)
    of = StoredWeights(content["state_dict"], "x")
    with little_memory():
        require_fitting(config, tokenizer_from_state(content["vocabulary"]), of)
    load_predictor(str(trained / "model_best.pth"), {})


def test_a_larger_file_allows_no_larger_model(content, tmp_path):
    """Whoever writes a large tensor into the file gets a model of its size at most, and no more layers than tensors."""
    weights = content["state_dict"] | {"more": torch.zeros(5_000_000)}
    for settings in ({"d_ff": 5_000_000}, {"num_layers": 5_000_000}, WIDE):
        torch.save(content | {"config": content["config"] | settings, "state_dict": weights}, tmp_path / "x.pth")
        with little_memory(ENOUGH), pytest.raises(InputError):
            load_predictor(str(tmp_path / "x.pth"), {})


@pytest.mark.parametrize("entry", ["config", "vocabulary", "history", "epoch", "strategy"])
def test_a_program_that_writes_reports_names_the_entry_that_is_missing(entry, content, tmp_path):
    for edited in (
        {name: value for name, value in content.items() if name != entry},
        content | {entry: None},
        content | {"vocabulary_sha256": "0" * 64},
    ):
        torch.save(edited, tmp_path / "x.pth")
        with pytest.raises(InputError, match=rf"x\.pth: its (entry '{entry}'|vocabulary was changed)"):
            load_predictor(str(tmp_path / "x.pth"), {})


@pytest.mark.parametrize("name", ["running_var", "logit.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(name, value, content, tmp_path):
    name = next(known for known in content["state_dict"] if known.endswith(name))
    changed = content["state_dict"][name].clone()
    changed[-1] = value
    torch.save(content | {"state_dict": content["state_dict"] | {name: changed}}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=rf"x\.pth: its tensor {name} holds NaN or infinity"):
        load_predictor(str(tmp_path / "x.pth"), {})


def test_a_buffer_that_is_no_statistic_may_hold_infinity(content, tmp_path):
    name = next(known for known in content["state_dict"] if known.endswith(".pe"))
    changed = content["state_dict"][name].clone()
    changed[0, -1] = -float("inf")
    torch.save(content | {"state_dict": content["state_dict"] | {name: changed}}, tmp_path / "x.pth")
    load_predictor(str(tmp_path / "x.pth"), {})
