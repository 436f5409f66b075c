"""The probe of a trained model's places: what it reads, and models that it cannot read."""

import sys

import numpy as np
import pytest
import torch

from modules.runtime.errors import InputError
from scripts.research import probe_decoder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["probe_decoder.py", *map(str, arguments)])
    probe_decoder.main()


@pytest.mark.parametrize("levels", [(), (3,)])
def test_patches_of_absent_views_are_left_out_of_the_mean(levels):
    states = torch.randn(2, *levels, 4, 5)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    found = probe_decoder.mean_of_present(states, mask)
    assert torch.allclose(found[0], states[0, ..., :2, :].reshape(-1, 5).mean(0))
    assert torch.allclose(found[1], probe_decoder.mean_of_present(states, None)[1])


@pytest.mark.thorough
@pytest.mark.parametrize("backbone", ["r2gencmn", "hf"])
def test_every_place_is_probed_under_one_text(backbone, train, demo_labels, monkeypatch, capsys):
    checkpoint = train("--model_name", backbone, "--ithn", "off", "--views", "paired") / "model_best.pth"
    annotation, found = probe_decoder.features_of(str(checkpoint), {})
    assert tuple(found) == probe_decoder.PLACES
    for by_split in found.values():
        assert {split: len(rows) for split, rows in by_split.items()} == {
            split: len(studies) for split, studies in annotation.splits.items()
        }
        # Only the image tells studies apart, and it does at every place.
        assert len(np.unique(by_split["train"].round(6), axis=0)) == len(by_split["train"])
    monkeypatch.setattr("scripts.research.probe_images.NEEDED", {"train": 1, "val": 1, "test": 1})
    call(monkeypatch, "--load", checkpoint, "--label_path", demo_labels)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| class | patches | encoder | cross-attention | decoder |" and len(lines) == 2 + 14


@pytest.mark.thorough
def test_what_has_no_cross_attention_is_refused(train, demo_labels, monkeypatch):
    from models import MODELS

    monkeypatch.setitem(MODELS, "bag", "tests.bag_of_patches.BagOfPatches")
    checkpoint = train("--model_name", "bag", "--ithn", "off") / "model_best.pth"
    with pytest.raises(InputError, match="--model_name bag has no cross-attention"):
        call(monkeypatch, "--load", checkpoint, "--label_path", demo_labels)
