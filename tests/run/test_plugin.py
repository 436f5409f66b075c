"""ITHN is a plug-in: every backbone with every strategy, and a backbone made here that nobody has prepared for."""

import json
from pathlib import Path

import pytest
import torch

from models import MODELS
from modules.flags import parse_flags, resolve_config
from modules.ithn.objective import Objective
from modules.ithn.synthesis import NEEDING_NEGATIVES, STRATEGIES
from modules.ithn.weights import published_state
from modules.run.build import build_objective, decoding_options, load_weights, prepare_device
from modules.run.data import build_dataset, build_split_loader, read_data
from modules.training.checkpoint import load_checkpoint
from modules.training.optimizers import build_optimizer
from modules.training.settings import OptimSettings
from tests.conftest import TINY

OF_FLAGS = ("off", *STRATEGIES)
ON_ENCODER = "contrastive on the encoder"
OWN_FLAGS = {
    "r2gencmn": [],
    "hf": [],
    "r2gen": ["--rm_d_model", "16", "--rm_num_heads", "2"],
    "visualgpt": ["--gpt2_layers", "1", "--gpt2_positions", "32"],
    "xpronet": [
        "--num_cluster",
        "14",
        "--num_protype",
        "3",
        "--d_img_ebd",
        "4",
        "--d_txt_ebd",
        "4",
        "--init_protypes_path",
        "",
    ],
}

# A decoder that reads the visual tokens before the text, the smallest.
LLAMA = json.dumps(
    {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
)


def build(demo: Path, index: Path, *flags: str):
    given, _ = parse_flags(
        [
            "--ann_path",
            str(demo / "annotation.json"),
            "--image_dir",
            str(demo / "images"),
            "--label_path",
            str(demo / "labels.csv"),
            "--negative_index",
            str(index),
            "--alpha",
            "0.5",
            "--num_neighbours",
            "3",
            *TINY,
            *flags,
        ],
        "main_train.py",
        "",
    )
    config = resolve_config(given)
    device = prepare_device(config)
    data = read_data(config)
    objective = build_objective(config, data, device, pretrained=True)
    dataset = build_dataset(
        config,
        data,
        "train",
        augment=True,
        negatives=data.index is not None,
        extractor=objective.backbone.visual_extractor,
    )
    loader = build_split_loader(config, dataset, device, shuffle=True)
    return config, data, objective, loader


def generate(objective: Objective, config, batch) -> torch.Tensor:
    objective.eval()
    pair = batch.positive
    return objective.backbone.generate(pair.images, view_mask=pair.view_mask, decoding=decoding_options(config))


@pytest.mark.parametrize("views", ["paired", "separate"])
@pytest.mark.parametrize("strategy", (*OF_FLAGS, ON_ENCODER))
@pytest.mark.parametrize("backbone", MODELS)
def test_every_backbone_with_every_strategy(demo, demo_index, tmp_path, backbone, strategy, views):
    """One training step moves the weights, reports are generated, and a checkpoint brings the same reports back."""
    features = ["--contrastive_features", "encoder"] if strategy == ON_ENCODER else []
    strategy = strategy.removesuffix(" on the encoder")
    chosen = ["--ithn", "off"] if strategy == "off" else ["--strategy", strategy, *features]
    flags = ["--model_name", backbone, "--views", views, *chosen, *OWN_FLAGS[backbone]]
    config, data, objective, loader = build(demo, demo_index, *flags)
    assert objective.strategy == strategy
    loader.set_epoch(2)
    batch = next(iter(loader)).to("cpu")
    assert batch.positive.images.shape[1] == (2 if views == "paired" else 1)
    optimizer = build_optimizer(objective, OptimSettings(lr_ve=1e-3, lr_ed=1e-3, weight_decay=0.0))
    before = {name: value.clone() for name, value in objective.named_parameters()}
    terms = objective(batch, 2)
    terms["loss"].backward()
    optimizer.step()
    objective.after_step()
    assert all(torch.isfinite(value) for value in terms.values())
    assert ("contrastive" in terms) == (strategy != "off")
    assert ("hardness" in terms) == (strategy in NEEDING_NEGATIVES)
    still = [name for name, value in objective.named_parameters() if torch.equal(value, before[name])]
    # A relu's dead unit, or a key's bias (which softmax cancels), may stand still; whole modules may not.
    assert len(still) < 0.2 * len(before), still
    reports = generate(objective, config, batch)
    assert reports.shape == (len(batch.ids), config.max_seq_length)

    torch.save({"state_dict": published_state(objective)}, tmp_path / "saved.pth")
    torch.manual_seed(1)
    fresh = build_objective(config, data, torch.device("cpu"), pretrained=True)
    load_weights(fresh, load_checkpoint(tmp_path / "saved.pth")["state_dict"], "saved.pth")
    assert torch.equal(generate(fresh, config, batch), reports)


@pytest.mark.parametrize("strategy", OF_FLAGS)
def test_adapters_learn_with_every_strategy(demo, demo_index, strategy):
    """Of the decoder only adapters and what pretrained weights lack; the rest of the network as always."""
    chosen = ["--ithn", "off"] if strategy == "off" else ["--strategy", strategy]
    _, _, objective, loader = build(demo, demo_index, "--model_name", "hf", "--lora_rank", "2", *chosen)
    loader.set_epoch(2)
    objective(next(iter(loader)).to("cpu"), 2)["loss"].backward()
    decoder = dict(objective.backbone.decoder.named_parameters())
    learning = {name for name, value in decoder.items() if value.grad is not None}
    new = ("lora_", "crossattention", "ln_cross_attn", "wte.weight", "lm_head.weight")
    assert learning == {name for name in decoder if any(part in name for part in new)}
    assert all(value.grad is not None for name, value in objective.named_parameters() if "backbone.decoder" not in name)


@pytest.mark.thorough
def test_a_backbone_of_ones_own_gets_labels(train, demo_index, demo_labels, monkeypatch):
    monkeypatch.setitem(MODELS, "labelled", "tests.bag_of_patches.LabelledPatches")
    folder = train("--model_name", "labelled", "--negative_index", demo_index, "--label_path", demo_labels)
    assert json.loads((folder / "history.json").read_text())[0]["train_shown"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["ithn", "mochi"])
def test_a_backbone_of_ones_own_gets_ithn(train, demo_index, monkeypatch, strategy):
    monkeypatch.setitem(MODELS, "bag", "tests.bag_of_patches.BagOfPatches")
    folder = train(
        "--model_name",
        "bag",
        "--negative_index",
        demo_index,
        "--strategy",
        strategy,
        "--num_neighbours",
        3,
        "--epochs",
        2,
    )
    history = json.loads((folder / "history.json").read_text())
    assert history[1]["train_hardness"] > 0 and history[1]["train_loss"] < history[0]["train_loss"]
    weights = load_checkpoint(folder / "model_best.pth")["state_dict"]
    assert {"logit.weight", "img_projection.linear1.weight", "temp_1"} <= set(weights)
