"""Contrastive features of the encoder: z can teach it, u says what the report says, and the decoder is left alone."""

import dataclasses

import pytest
import torch

from models.base import VisualFeatures
from modules.config import Config
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.run.predictor import load_predictor
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.tiny_backbone import TinyBackbone, gradients, make_objective, tiny_batch

LENGTHS = [5, 3, 6, 4]


@pytest.fixture
def batch():
    return tiny_batch(LENGTHS, None)


def make(features: str = "encoder", **settings) -> Objective:
    return make_objective(auxiliary_weight=0.1, strategy="contrastive", contrastive_features=features, **settings)


def embedded(objective: Objective, batch) -> list[torch.Tensor]:
    return objective._features([batch.positive], objective._passes([batch.positive]))


def test_a_report_feature_does_not_depend_on_the_image_that_it_is_compared_with(batch):
    images = batch.positive.images.clone()
    images[1] += 3
    changed = dataclasses.replace(batch, positive=dataclasses.replace(batch.positive, images=images))
    for features, moved in (("extractor", {1}), ("encoder", {2})):  # the row after reads under it
        objective = make(features)
        (z, u), (new_z, new_u) = embedded(objective, batch), embedded(objective, changed)
        assert {row for row in range(4) if not torch.equal(u[row], new_u[row])} == moved
        assert {row for row in range(4) if not torch.equal(z[row], new_z[row])} == {1}  # z is the image


def test_generation_is_trained_as_before(batch):
    published, encoder = make("extractor")(batch, 2), make()(batch, 2)
    for name in ("nll", "label"):
        torch.testing.assert_close(published[name], encoder[name], rtol=1e-12, atol=1e-12)
    assert published["contrastive"] != encoder["contrastive"]
    alone, plain = (make(features, contrastive_weight=0.0) for features in ("encoder", "extractor"))
    for objective in (alone, plain):
        objective(batch, 2)["loss"].backward()
    for one, two in zip(alone.backbone.parameters(), plain.backbone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)


def test_the_contrastive_terms_train_the_encoder_and_no_decoder(batch):
    objective = make(ce_weight=0.0)
    objective.backbone.auxiliary_weight = 0.0
    found = gradients(objective, objective(batch, 3)["loss"])
    # The tiny backbone's encoder is its view of the image; words and output layer are the decoder's.
    for name in ("backbone.look.weight", "img_projection.linear1.weight", "text_projection.linear1.weight"):
        assert found[name].abs().sum() > 0
    for name in ("backbone.words.weight", "backbone.logit.weight"):
        assert found[name] is None or not found[name].any()


def test_a_view_that_is_not_there_goes_along_with_its_image(batch):
    objective = make()
    seen = []
    extract = objective.backbone.extract
    objective.backbone.extract = lambda images, view_mask=None, features=None: (
        seen.append((view_mask.clone(), features)) or extract(images, view_mask, features)
    )
    objective._pass_on_encoder(batch.positive)
    read_mask, read = seen[-1]
    assert torch.equal(read_mask, batch.positive.view_mask.roll(1, 0))
    torch.testing.assert_close(read.pooled, seen[1][1].pooled.roll(1, 0))


def test_the_encoder_s_mean_is_that_of_the_views_that_are_there():
    passes, tokens = Objective(TinyBackbone(width=3)), torch.randn(2, 6, 3)
    passes.backbone.encode = lambda features: (features.patches,)
    there = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    torch.testing.assert_close(
        passes._encoded(VisualFeatures(tokens, there, None)), torch.stack([tokens[0].mean(0), tokens[1, :3].mean(0)])
    )
    torch.testing.assert_close(passes._encoded(VisualFeatures(tokens, None, None)), tokens.mean(1))
    passes.backbone.encode = lambda features: (torch.stack([features.patches + 1, features.patches], 1),)
    torch.testing.assert_close(passes._encoded(VisualFeatures(tokens, None, None)), tokens.mean(1))  # the last level


def test_the_features_before_projection_are_the_encoders(batch):
    objective = make()
    found = objective.embed(batch.positive)
    seen = objective.backbone.extract(batch.positive.images, batch.positive.view_mask)
    z = objective.img_projection(objective.backbone.encode(seen)[0].mean(1))
    torch.testing.assert_close(found.image, z)
    own = objective.embed(batch.positive, own_image=True)
    assert torch.equal(own.image, found.image) and not torch.allclose(own.report, found.report)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ithn": "off"}, "--contrastive_features encoder has no effect with --ithn off"),
        ({"ithn_variant": "released"}, "needs --strategy mochi_queue or contrastive, --negatives_as columns or"),
        ({"strategy": "ithn"}, "needs --strategy mochi_queue or contrastive, --negatives_as columns or"),
    ],
)
def test_what_does_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        Config(**({"contrastive_features": "encoder", "strategy": "contrastive"} | flags))


def test_unknown_and_impossible_choices_are_refused():
    with pytest.raises(InputError, match="contrastive_features none: must be one of extractor, encoder"):
        ITHNSettings(contrastive_features="none")
    assert not Objective(TinyBackbone(), ITHNSettings(strategy="off", contrastive_features="encoder")).on_encoder


@pytest.mark.thorough
def test_a_run_goes_on_with_the_features_it_began_with(train):
    folder = train("--strategy", "contrastive", "--contrastive_features", "encoder")
    with pytest.raises(InputError, match="--contrastive_features extractor: the run of --resume .* began with encoder"):
        train("--resume", folder / "current_checkpoint.pth", "--epochs", 2, "--contrastive_features", "extractor")
    load_predictor(str(folder / "model_best.pth"), {"device": "cpu"})  # which needs none of ITHN's settings
    train("--resume", folder / "current_checkpoint.pth", "--epochs", 2)
    again = load_checkpoint(folder / "current_checkpoint.pth")
    assert again["config"]["contrastive_features"] == "encoder" and len(again["history"]) == 2
