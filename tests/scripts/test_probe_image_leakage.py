"""probe_image_leakage.py: whose image a report's feature follows, for a decoder that looks at it or does not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from scripts.research.probe_image_leakage import measure
from tests.tiny_backbone import TinyBackbone, tiny_batch

ROOT = Path(__file__).resolve().parents[2]


def make() -> Objective:
    torch.manual_seed(0)
    return Objective(TinyBackbone(), ITHNSettings(embedding_dim=5, strategy="contrastive")).double().eval()


def test_a_decoder_that_does_not_look_makes_features_of_the_report_alone():
    batch, objective = tiny_batch([5, 3, 6, 4], None), make()
    with torch.no_grad():
        objective.backbone.look.weight.zero_()
    found = measure(objective, [batch], torch.device("cpu"))
    with torch.no_grad():
        own = objective.embed(batch.positive)
    cosines = own.report @ own.image.T
    assert found["cos_own"] == pytest.approx(float(cosines.diagonal().mean()))
    assert found["cos_under"] == pytest.approx(float(cosines.diagonal(-1).sum() + cosines[0, -1]) / 4)
    assert found["read_under"] == float((own.report * own.image.roll(1, 0)).sum(1).gt(cosines.diagonal()).sum()) / 4
    assert found["retrieval"] == float((cosines.T.argmax(1) == torch.arange(4)).sum()) / 4 and found["samples"] == 4


def test_a_decoder_that_looks_and_does_not_read_makes_features_of_the_image_alone():
    batch, objective = tiny_batch([5, 3, 6, 4], None), make()
    with torch.no_grad():
        objective.backbone.words.weight.zero_()
    found = measure(objective, [batch, tiny_batch([4], None)], torch.device("cpu"))  # one alone has no other image
    with torch.no_grad():
        own = objective.embed(batch.positive)
    # Hidden states are those of the image before: under another image the feature is that image's.
    assert found["cos_under"] == pytest.approx(float((own.report * own.image).sum(1).mean()))
    assert found["cos_own"] == pytest.approx(float((own.report.roll(1, 0) * own.image).sum(1).mean()))
    assert found["samples"] == 4


def test_a_checkpoint_that_is_not_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "scripts/research/probe_image_leakage.py", "--load", "nowhere.pth"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "nowhere.pth" in done.stderr
