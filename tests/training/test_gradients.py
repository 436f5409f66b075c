"""Every trainable parameter has a gradient after a backward pass, whatever is switched off: processes wait for it."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks.host_cases import MORE, NARROW
from benchmarks.host_path import STRATEGIES
from models import MODELS, backbone_class, settings_class
from modules.data.batches import Batch, Pair
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime import distributed
from tests.gloo_support import run_together

WORDS, ROWS, LENGTH = 11, 3, 6
SMALL = {"d_model": 8, "d_ff": 8, "num_heads": 2, "num_layers": 1}
SMALLER = {
    "r2gen": {"rm_d_model": 8, "rm_num_heads": 2},
    "r2gencmn": {"cmm_dim": 8, "cmm_size": 8, "topk": 2},
    "xpronet": {"topk": 2, "d_img_ebd": 4, "d_txt_ebd": 4},
    "visualgpt": {"gpt2_layers": 1},
    "hf": {},
}
SWITCHES = {
    "xpronet": (
        {"label_loss_weight": 0.0, "xpronet_labels": "reference"},
        {"weight_img_con_loss": 0.0},
        {"weight_txt_con_loss": 0.0},
        {
            "label_loss_weight": 0.0,
            "xpronet_labels": "reference",
            "weight_img_con_loss": 0.0,
            "weight_txt_con_loss": 0.0,
        },
    )
}
SAMPLED = 23  # each of so many cases: two or three of a backbone, a dozen of XProNet's
WEIGHTS = ({}, {"contrastive_weight": 0.0}, {"cosine_weight": 0.0})


def extractor(frozen):
    """A new one at every call, because its caller trains it: gradients and statistics would reach the next test."""
    own = VisualExtractor("resnet18", image_size=32, frozen=frozen)
    own.model = nn.Sequential(nn.Conv2d(3, 12, 16, stride=16), nn.BatchNorm2d(12)).requires_grad_(not frozen)
    own.width = 12
    return own


def pair():
    tokens = torch.randint(1, WORDS, (ROWS, LENGTH))
    tokens[:, 0] = tokens[:, -1] = 0
    views = torch.tensor([[True, True], [True, False], [True, True]])
    labels = torch.eye(14)[:ROWS]
    return Pair(torch.randn(ROWS, 2, 3, 32, 32), views, tokens, torch.ones(ROWS, LENGTH, dtype=torch.bool), labels)


def objective(backbone, strategy, own, **switch):
    """An objective of ``backbone`` around the extractor ``own`` with the ITHN settings ``strategy``."""
    settings = settings_class(backbone)(**SMALL, **NARROW.get(backbone, {}) | SMALLER[backbone], **switch)
    more = MORE.get(backbone, {})
    model = backbone_class(backbone)(visual_extractor=own, num_ids=WORDS, settings=settings, **more)
    return Objective(model, ITHNSettings(**strategy, embedding_dim=4), n_samples=ROWS).train()


def combinations(backbone):
    """Every strategy by name, loss weight, whether the extractor is frozen, and the backbone's own switch."""
    return list(itertools.product(STRATEGIES, WEIGHTS, (False, True), ({}, *SWITCHES.get(backbone, ()))))


def cases(backbone, every=1):
    """An objective for each of the ``combinations``, or for each ``every``-th of them, and what it is."""
    torch.manual_seed(0)
    extractors = {frozen: extractor(frozen) for frozen in (False, True)}  # most of an objective's time
    for name, weights, frozen, switch in combinations(backbone)[::every]:
        own = objective(backbone, {**STRATEGIES[name], **weights}, extractors[frozen], **switch)
        yield f"{backbone} {name} {weights} frozen={frozen} {switch}", own


def batch():
    rows = torch.arange(ROWS)
    return Batch(pair(), pair(), torch.ones(ROWS, dtype=torch.bool), rows, rows, [""] * ROWS, [""] * ROWS)


@pytest.mark.parametrize("backbone", MODELS)
def test_no_trainable_parameter_is_without_a_gradient(backbone):
    given, idle = batch(), {}
    for case, own in cases(backbone):
        own(given, 2)["loss"].backward()
        missing = [name for name, value in own.named_parameters() if value.requires_grad and value.grad is None]
        idle |= {case: missing} if missing else {}
        own.zero_grad()
    assert idle == {}


def two_steps_each(every: int) -> int:
    """Steps that this process has taken: the second of a case fails where a parameter had no gradient in the first."""
    given, taken = batch(), 0
    for backbone in MODELS:
        for _, own in cases(backbone, every):
            parallel = distributed.data_parallel(own)
            for _ in range(2):
                parallel(given, 2)["loss"].backward()
                taken += 1
    return taken


@pytest.mark.thorough
def test_two_processes_train_a_sample_of_them(tmp_path):
    """Of each backbone; every strategy, weight and switch is in the sample of some backbone."""
    sample = [combination for backbone in MODELS for combination in combinations(backbone)[::SAMPLED]]
    for values, all_values in zip(
        zip(*sample, strict=True), (STRATEGIES, WEIGHTS, (False, True), ({}, *SWITCHES["xpronet"])), strict=True
    ):
        assert all(value in values for value in all_values)
    first, second = run_together(two_steps_each, 2, tmp_path, SAMPLED)
    assert first == second == 2 * len(sample)


@pytest.mark.slow
def test_two_processes_train_all_of_them(tmp_path):
    first, second = run_together(two_steps_each, 2, tmp_path, 1)
    assert first == second == 2 * 9 * 3 * 2 * (len(MODELS) + 4)
