"""Rivals of ITHN by their flags: the objective against the equations written out, and two processes against one."""

from dataclasses import replace

import pytest
import torch

from modules.ithn.synthesis import STRATEGIES
from modules.runtime import distributed
from tests.gloo_support import run_together
from tests.tiny_backbone import make_objective, rows_of, tiny_batch

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7, 3, 8], [6, 3, 12, 5, 4, 4]
IDF = torch.linspace(0, 2, 11, dtype=torch.float64)
RIVALS = {
    "negatives as columns": {"strategy": "columns"},
    "ITHN's as columns": {"strategy": "ithn", "negatives_as": "columns"},
    "MoCHi's as columns": {"strategy": "mochi", "negatives_as": "columns", "mask_identical": True},
    "sigmoid": {"strategy": "contrastive", "contrastive_form": "sigmoid"},
    "sigmoid with columns": {"strategy": "columns", "contrastive_form": "sigmoid"},
    "debiased": {"strategy": "contrastive", "contrastive_form": "debiased"},
    "hardness-weighted": {"strategy": "columns", "contrastive_form": "hardness_weighted"},
    "triplet": {"strategy": "columns", "contrastive_form": "triplet"},
    "the paper's triplet": {"strategy": "ithn", "contrastive_form": "paper_triplet"},
    "soft targets of labels": {"strategy": "contrastive", "contrastive_targets": "labels", "target_temperature": 0.5},
    "soft targets of words": {"strategy": "columns", "contrastive_targets": "text"},
    "equal labels count twice": {"strategy": "contrastive", "same_label_weight": 2.0},
    "equal labels are left out": {"strategy": "ithn", "same_label_weight": 0.0},
    "MoCHi as published": {"strategy": "mochi_queue", "queue_size": 9, "queue_hardest": 8},
}
ON_ENCODER = [
    name for name, chosen in RIVALS.items() if name.endswith("columns") or chosen["strategy"] == "contrastive"
]


def build(**settings):
    return make_objective(alpha=0.5, idf=IDF if settings.get("contrastive_targets") == "text" else None, **settings)


def labelled(batch):
    """With labels that some studies share, and a study without a negative."""
    labels = torch.zeros_like(batch.positive.labels)
    labels[[0, 2, 5], 1] = 1
    labels[[1, 2], 3] = 1
    batch.has_negative[4] = False
    return replace(batch, positive=replace(batch.positive, labels=labels))


@pytest.fixture
def batch():
    return labelled(tiny_batch(LENGTHS, NEGATIVE_LENGTHS))


@pytest.mark.parametrize("strategy", ["columns", "ithn", "mochi"])
def test_columns_by_hand(batch, strategy):
    """Each image against all reports and all harder negatives, each report against all images and mined ones."""
    objective = build(strategy=strategy, negatives_as="columns")
    loss = objective(batch, 4)
    z, negative_z, u, negative_u = objective._features(
        [batch.positive, batch.negative], objective._passes([batch.positive, batch.negative])
    )
    hardness = 1 - 2.718281828459045 ** (-0.5 * 3)
    harder = STRATEGIES[strategy].synthesise(z, u, negative_u, hardness).detach()
    harder = harder / harder.norm(dim=1, keepdim=True)
    total, scale = 0.0, objective.temp_1.exp()
    for anchors, partners, further in ((z, u, harder), (u, z, negative_z)):
        for i in range(6):
            others = [partners[j] for j in range(6)] + [further[j] for j in range(6) if j != 4]
            denominator = sum(torch.exp(scale * (anchors[i] @ other)) for other in others)
            total = total - torch.log(torch.exp(scale * (anchors[i] @ partners[i])) / denominator)
    expected = total / 12
    torch.testing.assert_close(loss["contrastive"], expected.detach(), rtol=0, atol=1e-10)
    weighted = loss["nll"] + 0.1 * expected + 0.2 * loss["cosine"]
    torch.testing.assert_close(loss["loss"], weighted, rtol=0, atol=1e-10)


def test_the_papers_triplet_is_the_hinge_of_eq_4(batch):
    objective = build(strategy="ithn", contrastive_form="paper_triplet", triplet_margin=0.7)
    found = objective(batch, 4)["contrastive"]
    z, _, u, negative_u = objective._features(
        [batch.positive, batch.negative], objective._passes([batch.positive, batch.negative])
    )
    harder = STRATEGIES["ithn"].synthesise(z, u, negative_u, 1 - 2.718281828459045 ** (-0.5 * 3))
    harder = harder / harder.norm(dim=1, keepdim=True)
    hinges = [
        max(float((z[i] - u[i]) @ (z[i] - u[i]) - (z[i] - harder[i]) @ (z[i] - harder[i])) + 0.7, 0) for i in range(6)
    ]
    assert float(found) == pytest.approx((sum(hinges) - hinges[4]) / 5, abs=1e-10)


@pytest.mark.parametrize("rival", RIVALS)
def test_every_rival_reaches_every_parameter(batch, rival):
    objective = build(**RIVALS[rival])
    objective(batch, 4)  # fills the queue
    terms = objective(rows_of(batch, [3, 1, 0, 2]), 4)
    assert objective.temp_1.requires_grad == ("triplet" not in rival)  # hinges know no temperature
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            [gradient] = torch.autograd.grad(terms["loss"], [parameter], retain_graph=True)
            assert gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("rival", ON_ENCODER)
def test_rivals_on_the_encoders_features(batch, rival):
    objective = build(**RIVALS[rival], contrastive_features="encoder")
    terms = objective(batch, 4)
    assert terms["loss"].isfinite()
    for projection in (objective.img_projection, objective.text_projection):
        [gradient] = torch.autograd.grad(terms["loss"], [projection.linear1.weight], retain_graph=True)
        assert gradient.any()


def test_rivals_differ(batch):
    values = {}
    for rival, chosen in RIVALS.items():
        objective = build(**chosen)
        objective(batch, 4)
        values[rival] = round(float(objective(rows_of(batch, [3, 1, 0, 2, 5]), 4)["contrastive"]), 9)
    assert len(set(values.values())) == len(values), values


def second_steps() -> dict:
    """Terms and gradients of every rival's second step on this process's rows."""
    found, share = {}, len(LENGTHS) // distributed.world_size()
    for rival, chosen in RIVALS.items():
        parallel = distributed.data_parallel(objective := build(**chosen))
        whole = labelled(tiny_batch(LENGTHS, NEGATIVE_LENGTHS))
        own = rows_of(whole, slice(distributed.rank() * share, (distributed.rank() + 1) * share))
        for epoch in (3, 4):
            objective.zero_grad()
            terms = parallel(own, epoch)
            terms["loss"].backward()
        found[rival] = {
            "contrastive": terms["contrastive"],
            **{name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None},
        }
    return found


def test_two_processes_equal_one(tmp_path):
    found, expected = run_together(second_steps, 2, tmp_path), second_steps()
    for result in found:
        for rival, values in expected.items():
            for name, value in values.items():
                torch.testing.assert_close(result[rival][name], value, rtol=1e-10, atol=1e-10, msg=f"{rival}: {name}")
