"""probe_gradients.py: which parts the contrastive terms reach, against gradients by hand."""

import sys

import pytest
import torch

from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.training.checkpoint import load_checkpoint
from scripts.research import probe_gradients
from scripts.research.probe_gradients import VALUES, compared, part_of_name
from scripts.research.probe_numbers import read_numbers
from tests.tiny_backbone import TinyBackbone, tiny_batch


def make(**settings):
    torch.manual_seed(0)
    return Objective(TinyBackbone(), ITHNSettings(embedding_dim=5, **settings)).double().eval()


def test_parts_of_the_backbones():
    assert part_of_name("backbone.visual_extractor.model.7.0.conv1.weight") == "extractor"
    assert part_of_name("backbone.encoder_decoder.model.encoder.layers.0.norm.a_2") == "encoder"
    assert part_of_name("backbone.encoder_decoder.att_embed.0.weight") == "encoder"
    assert part_of_name("backbone.encoder_decoder.model.decoder.norm.a_2") == "decoder"
    assert part_of_name("backbone.encoder_decoder.logit.weight") == "decoder"
    for name in ("memory_matrix", "cmn.linears.0.weight", "protypes", "dim_reduction.weight"):
        assert part_of_name(f"backbone.encoder_decoder.{name}") == "memory"
    assert part_of_name("backbone.encoder_decoder.fuse_feature.weight") == "encoder"
    assert part_of_name("backbone.encoder_decoder.model.fuse_feature.weight") == "decoder"
    assert part_of_name("backbone.label_head.weight") == "encoder"
    assert part_of_name("backbone.projection.weight") == "encoder"
    assert part_of_name("backbone.decoder.model.bert.encoder.layer.0.output.dense.weight") == "decoder"
    assert part_of_name("temp_1") == part_of_name("img_projection.head.weight") == "projections"


@pytest.mark.parametrize("strategy", ["ithn", "columns"])
def test_shares_ratios_and_cosines_are_those_of_separate_passes(strategy):
    batch, objective = tiny_batch([5, 3, 6, 4], [4, 4, 3, 5]), make(strategy=strategy, contrastive_weight=0.7)
    found = compared(objective, batch, 3)
    assert {term for term, _ in found} == {"contrastive", "cosine"}
    extractor = list(objective.backbone.visual_extractor.parameters())

    def of(**weights):
        alone = make(strategy=strategy, **weights)
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    alone(batch, 3)["loss"], list(alone.backbone.visual_extractor.parameters())
                )
            ]
        )

    entropy = of(contrastive_weight=0, cosine_weight=0)
    own = of(contrastive_weight=0.7, cosine_weight=0, ce_weight=0)
    share, ratio, cosine = found["contrastive", "extractor"]
    assert ratio == pytest.approx(float(own.norm() / entropy.norm())) and len(extractor) == 2
    assert cosine == pytest.approx(float(own @ entropy / (own.norm() * entropy.norm())))
    for term in ("contrastive", "cosine"):
        assert sum(found[term, part][0] for part in probe_gradients.PARTS) == pytest.approx(1)
    # L_CS compares images: it reaches no decoder.
    assert found["cosine", "decoder"] == (0.0, 0.0, 0.0) and 0 < share < 1


def test_features_of_the_encoder_train_no_decoder():
    batch = tiny_batch([5, 3, 6, 4], None)
    objective = make(strategy="contrastive", contrastive_features="encoder")
    own = compared(objective, batch, 1)
    objective = make(strategy="contrastive")
    published = compared(objective, batch, 1)
    words = [name for name, _ in objective.named_parameters() if name == "backbone.words.weight"]
    assert words and part_of_name(words[0]) == "decoder"
    assert own["contrastive", "decoder"][0] < published["contrastive", "decoder"][0]


@pytest.mark.thorough
def test_the_script(train, demo_index, tmp_path, monkeypatch, capsys):
    folder = train("--negative_index", demo_index)
    capsys.readouterr()
    numbers = tmp_path / "numbers.json"
    argv = ["probe_gradients.py", "--load", str(folder / "model_best.pth"), "--batches", "2", "--numbers", str(numbers)]
    monkeypatch.setattr(sys, "argv", argv)
    probe_gradients.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 * len(probe_gradients.PARTS)
    assert lines[2].split(" | ")[2:4] == ["L_CP", "extractor"]
    kept = read_numbers(numbers, "probe_gradients")
    assert [row["part"] for row in kept] == 2 * list(probe_gradients.PARTS)
    assert lines[2].strip("| ").split(" | ")[4:] == [f"{kept[0][name]:.3f}" for name in VALUES]


@pytest.mark.thorough
def test_the_queue_is_that_of_the_checkpoint(train, monkeypatch, capsys):
    folder, known = train("--ithn", "on", "--strategy", "mochi_queue", "--queue_size", "16"), []
    argv = ["probe_gradients.py", "--load", str(folder / "model_best.pth"), "--batches", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    measured = probe_gradients.compared

    def spy(objective, batch, epoch):
        known.append(int(objective.queue.known.sum()))
        return measured(objective, batch, epoch)

    monkeypatch.setattr(probe_gradients, "compared", spy)
    probe_gradients.main()
    content = load_checkpoint(folder / "model_best.pth")
    assert known == [int(content["objective"]["queue.known"].sum())] != [0]
