"""Options beyond the paper, each against its equation."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_backbone import gradients, make_objective, tiny_batch

from modules.checkpoint import load_checkpoint
from modules.config import Config
from modules.errors import InputError
from modules.flags import resolve_config
from modules.losses import clip_scores, contrastive_loss, modified_scores, normalise, own_scores
from modules.negatives import ithn
from modules.objective import Objective

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7], [6, 3, 12, 5]
entropy = torch.nn.functional.cross_entropy


@pytest.fixture
def batch():
    return tiny_batch(LENGTHS, NEGATIVE_LENGTHS)


def embeddings(objective, batch):
    """z, z-, u, u- as the objective sees them."""
    pairs = [batch.positive, batch.negative]
    return objective._embed(pairs, objective._outputs(pairs))


# ---- harder_term column: -log exp(s_ii) / (sum_j exp(s_ij) + exp(<z_i, u~_i> / tau)), s = S_1 / tau


def test_candidates_beyond_the_batch_by_hand():
    scores, more = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([[0.5, -torch.inf], [1.5, 2.5]])
    rows = math.log(math.exp(2) + math.exp(1) + math.exp(0.5)) - 2
    rows += math.log(math.exp(0) + math.exp(3) + math.exp(1.5) + math.exp(2.5)) - 3
    columns = math.log(math.exp(2) + math.exp(0)) - 2 + math.log(math.exp(1) + math.exp(3)) - 3
    assert contrastive_loss(scores, for_images=more).item() == pytest.approx((rows + columns) / 4, rel=1e-6)
    assert contrastive_loss(scores.T, for_reports=more).item() == pytest.approx((rows + columns) / 4, rel=1e-6)
    # One sample alone has the further candidate to be told from, and a row that is left out has nothing.
    alone = contrastive_loss(torch.tensor([[2.0]]), for_images=torch.tensor([[1.0]]))
    assert alone.item() == pytest.approx((math.log(math.exp(2) + math.exp(1)) - 2) / 2, rel=1e-6)
    none = contrastive_loss(scores, rows=torch.zeros(2, dtype=torch.bool), for_images=torch.full((2, 1), torch.nan))
    assert none == 0


def test_the_column_is_one_more_candidate_of_its_row(batch):
    objective = make_objective(harder_term="column", alpha=0.3)
    terms = objective(batch, 5)
    z, _, u, negative_u = embeddings(objective, batch)
    harder = normalise(ithn(z, u, negative_u, 1 - math.exp(-0.3 * 4))).detach()
    scale = objective.temp_1.exp()
    scores, target = scale * z @ u.T, torch.arange(4)
    extra = torch.stack([scale * z[i] @ harder[i] for i in range(4)]).unsqueeze(1)
    expected = (entropy(torch.cat([scores, extra], 1), target) + entropy(scores.T, target)) / 2
    torch.testing.assert_close(terms["contrastive"], expected.detach())
    without = make_objective(harder_term="column", alpha=0.3, contrastive_weight=0.0)
    rest, ours = gradients(without, without(batch, 5)["loss"]), gradients(objective, terms["loss"])
    for name, gradient in gradients(objective, expected).items():
        whole = rest[name] + (0.0 if gradient is None else 0.1 * gradient)
        torch.testing.assert_close(ours[name], whole, msg=name)
    left_out = replace(batch, has_negative=torch.tensor([True, True, False, True]))
    kept = torch.tensor([0, 1, 3])
    fewer, rest = scores[kept][:, kept], torch.arange(3)
    expected = (entropy(torch.cat([fewer, extra[kept]], 1), rest) + entropy(fewer.T, rest)) / 2
    torch.testing.assert_close(objective(left_out, 5)["contrastive"], expected.detach())


def descend(term: str, steps: int = 60) -> dict[str, torch.Tensor]:
    """Gradient descent on L_CP alone over free features, from nearly where every image opposes every report."""
    generator, batch, scale = torch.Generator().manual_seed(0), 16, 1 / 0.07
    direction = torch.eye(32, dtype=torch.float64)[0]
    noise = 0.1 * torch.randn(4, batch, 32, generator=generator, dtype=torch.float64) / math.sqrt(32)
    sides = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(4, 1, 1)  # z, z-, u, u-
    free = (sides * direction + noise).requires_grad_()
    found = {}
    for _ in range(steps):
        z, negative_z, u, negative_u = normalise(free)
        harder = normalise(ithn(z, u, negative_u, 0.1)).detach()
        if term == "column":
            loss = contrastive_loss(clip_scores(z, u, scale), for_images=own_scores(z, harder, scale))
        else:
            loss = contrastive_loss(modified_scores(z, u, negative_z, negative_u, harder, scale))
        found.setdefault("first loss", loss.detach())
        (slope,) = torch.autograd.grad(loss, free)
        free = (free - 1.0 * slope).detach().requires_grad_()
    z, _, u, _ = normalise(free)
    return found | {"loss": loss.detach(), "cosine": (z * u).sum(1).mean().detach(),
                    "accuracy": ((z @ u.T).argmax(1) == torch.arange(batch)).double().mean()}


def test_with_a_column_the_opposed_configuration_is_no_minimum():
    """Beside test_equation_11_has_a_second_minimum_...: there Eq. 11 stays, here the loss is large and leads away."""
    paper, column = descend("paper"), descend("column")
    assert paper["first loss"] < 0.01 and paper["cosine"] < -0.9
    assert column["first loss"] == pytest.approx((math.log(17) + math.log(16)) / 2, rel=0.1)
    assert column["loss"] < 0.01
    assert column["cosine"] > 0.1 and column["accuracy"] == 1


# ---- mask_same_labels


def test_reports_with_the_same_labels_are_no_negatives_of_each_other(batch):
    labelled = replace(batch, label_key=torch.tensor([3, 1, 3, 2]), report_key=torch.tensor([5, 6, 7, 6]))
    by_label = make_objective(mask_same_labels=True)(labelled, 3)["contrastive"]
    by_key = make_objective(mask_identical=True)(replace(batch, report_key=torch.tensor([3, 1, 3, 2])), 3)
    assert by_label == by_key["contrastive"]
    z, _, u, _ = embeddings(make_objective(), batch)
    scores = (z @ u.T).detach()
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[0, 2] = excluded[2, 0] = excluded[1, 3] = excluded[3, 1] = True
    both = make_objective(mask_same_labels=True, mask_identical=True, strategy="contrastive")
    expected = contrastive_loss(both.temp_1.exp().detach() * scores, excluded=excluded)
    torch.testing.assert_close(both(labelled, 3)["contrastive"], expected)


# ---- hardness_schedule retrieval: lambda = max_hardness * a, a <- 0.99 a + 0.01 (accuracy of the batch)


def test_hardness_follows_the_smoothed_retrieval_accuracy(batch):
    objective = make_objective(hardness_schedule="retrieval", max_hardness=0.5)
    found = [objective(batch, 7) for _ in range(3)]
    accuracy = found[0]["retrieval_accuracy"].item()
    assert accuracy > 0
    expected = [0.0, 0.01 * accuracy, 0.01 * accuracy + 0.99 * 0.01 * accuracy]
    for terms, smoothed in zip(found, expected, strict=True):
        assert terms["hardness"].item() == pytest.approx(0.5 * smoothed)
    epoch_of_that = 1 - math.log(1 - found[2]["hardness"].item()) / 0.01
    z, _, u, negative_u = embeddings(objective, batch)
    harder = ithn(z, u, negative_u, -math.expm1(-0.01 * (epoch_of_that - 1)))
    cosine = (z * normalise(harder)).sum(1).mean()
    torch.testing.assert_close(found[2]["cos_harder"], cosine.detach())
    objective.eval()(batch, 7)
    # Two accumulated batches count as one step.
    other = make_objective(hardness_schedule="retrieval", max_hardness=0.5)
    other.load_state_dict(objective.state_dict())
    objective.train()(batch, 7)
    for _ in range(2):
        other(batch, 7, share=0.5)
    torch.testing.assert_close(other.smoothed_accuracy, objective.smoothed_accuracy)
    assert not any("accuracy" in name for name in objective.published_state_dict())
    assert "smoothed_accuracy" not in make_objective().state_dict()


# ---- temperature


def test_the_temperature_starts_where_it_is_told_and_may_stay(batch):
    backbone = make_objective().backbone
    for variant in ("paper", "released"):
        objective = Objective(backbone, embedding_dim=5, variant=variant, contrastive_temperature=0.2,
                              learn_temperature=False).double()
        assert objective.temp_1.item() == pytest.approx(math.log(5))
        terms = objective(batch, 2)
        assert terms["temperature"].item() == pytest.approx(0.2)
        terms["loss"].backward()
        assert objective.temp_1.grad is None and objective.img_projection.linear1.weight.grad.any()
    assert Objective(backbone).temp_1 == math.log(1 / 0.07)


# ---- flags


@pytest.mark.parametrize(("flags", "message"), [
    ({"ithn": "off", "harder_term": "column"}, "--harder_term column has no effect with --ithn off"),
    ({"ithn": "off", "mask_same_labels": True}, "--mask_same_labels true has no effect with --ithn off"),
    ({"dataset_name": "coco", "mask_same_labels": True}, "--mask_same_labels true: there are no clinical labels"),
    ({"strategy": "contrastive", "harder_term": "column"}, "--harder_term column: not with --strategy contrastive"),
    ({"ithn_variant": "released", "harder_term": "column"}, "--harder_term column: not with --ithn_variant released"),
    ({"strategy": "prior", "hardness_schedule": "retrieval"}, "--strategy prior has no hardness"),
    ({"max_hardness": 0.5}, "--max_hardness 0.5: needs --hardness_schedule retrieval"),
    ({"contrastive_temperature": 0.0}, "--contrastive_temperature 0.0: must be at least 0.01"),
])
def test_what_does_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        Config(**flags)


def test_settings_of_an_older_checkpoint_have_the_paper_s_options():
    config = resolve_config({}, {"strategy": "mochi"})
    assert (config.harder_term, config.hardness_schedule, config.mask_same_labels) == ("paper", "epoch", False)
    assert (config.contrastive_temperature, config.learn_temperature, config.max_hardness) == (0.07, True, 1.0)


def test_a_run_with_all_of_them_goes_on_as_it_began(train, demo_index):
    """Through the real entry point; the labels are those of the rules."""
    flags = ("--negative_index", demo_index, "--harder_term", "column", "--mask_same_labels", "true",
             "--hardness_schedule", "retrieval", "--contrastive_temperature", 0.1, "--learn_temperature", "false")
    folder = train(*flags)
    assert "by rules; the commonest has" in (folder / "train.log").read_text()
    state = load_checkpoint(folder / "current_checkpoint.pth")
    assert state["objective"]["smoothed_accuracy"] > 0
    assert state["state_dict"]["temp_1"].item() == pytest.approx(math.log(10))
    assert "smoothed_accuracy" not in state["state_dict"]
    with pytest.raises(InputError, match="--hardness_schedule epoch: the run of --resume .* began with retrieval"):
        train("--resume", folder / "current_checkpoint.pth", "--epochs", 2, "--hardness_schedule", "epoch")
    train("--resume", folder / "current_checkpoint.pth", "--epochs", 2)
    again = load_checkpoint(folder / "current_checkpoint.pth")
    assert again["config"]["harder_term"] == "column" and len(again["history"]) == 2
    assert again["history"][1]["train_hardness"] > state["history"][0]["train_hardness"] > 0
