"""Options beyond the paper, each against its equation."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_backbone import gradients, make_objective, tiny_batch

from modules.annotations import read_annotation
from modules.checkpoint import load_checkpoint
from modules.clinical_files import write_table
from modules.clinical_rules import CLASSES
from modules.config import Config
from modules.errors import InputError
from modules.flags import resolve_config
from modules.losses import clip_scores, contrastive_loss, modified_scores, normalise, own_scores
from modules.negatives import ithn
from modules.negatives_queue import FeatureQueue
from modules.objective import Objective
from scripts.hard_negatives import same_labels

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


# ---- image_negatives: z~ = (1 - lambda) z- + lambda p, p the point of the line z z- that is nearest to u


def harder_images(z, negative_z, u, hardness):
    rows = []
    for image, negative, report in zip(z, negative_z, u, strict=True):
        line = image - negative
        p = negative + (report - negative) @ line / (line @ line) * line
        mixed = (1 - hardness) * negative + hardness * p
        rows.append((mixed / mixed.norm()).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("term", ["paper", "column"])
def test_negatives_of_images_mirror_those_of_reports(batch, term):
    objective = make_objective(image_negatives=True, harder_term=term, alpha=0.3)
    hardness = 1 - math.exp(-0.3 * 4)
    terms = objective(batch, 5)
    z, negative_z, u, negative_u = embeddings(objective, batch)
    harder_u, harder_z = normalise(ithn(z, u, negative_u, hardness)).detach(), harder_images(z, negative_z, u, hardness)
    scale, target, sign = objective.temp_1.exp(), torch.arange(4), 1 - 2 * torch.eye(4, dtype=torch.float64)
    if term == "paper":
        rows = columns = scale * (z @ u.T + negative_z @ negative_u.T + sign * (z @ harder_u.T)
                                  + sign * (harder_z @ u.T)) / 4
    else:
        rows = scale * torch.cat([z @ u.T, (z * harder_u).sum(1, keepdim=True)], 1)
        columns = scale * torch.cat([z @ u.T, (harder_z * u).sum(1).unsqueeze(0)], 0)
    expected = (entropy(rows, target) + entropy(columns.T, target)) / 2
    torch.testing.assert_close(terms["contrastive"], expected.detach())
    without = make_objective(image_negatives=True, harder_term=term, alpha=0.3, contrastive_weight=0.0)
    rest, ours = gradients(without, without(batch, 5)["loss"]), gradients(objective, terms["loss"])
    for name, gradient in gradients(objective, expected).items():
        whole = rest[name] + (0.0 if gradient is None else 0.1 * gradient)
        torch.testing.assert_close(ours[name], whole, msg=name)


def test_negatives_of_images_make_the_opposed_configuration_the_lower_one():
    """Averaged in with a negated diagonal they deepen the second minimum of Eq. 11: margin 1 there, 1/2 if aligned."""
    size, scale = 16, 1 / 0.07
    own, far = torch.eye(2 * size, dtype=torch.float64).chunk(2)
    aligned = contrastive_loss(modified_scores(own, own, far, far, far, scale, harder_image=far))
    one = normalise(torch.ones(size, 4, dtype=torch.float64))
    opposed = contrastive_loss(modified_scores(one, -one, one, -one, -one, scale, harder_image=one))
    assert aligned.item() == pytest.approx(math.log(1 + 15 * math.exp(-scale / 2)))
    assert opposed.item() == pytest.approx(math.log(1 + 15 * math.exp(-scale)))


# ---- negative_queue: row i has <z_i, u_q> / tau, column i <z_q, u_i> / tau of each q in the queue as candidates


def of_samples(seed, index):
    made = tiny_batch(LENGTHS, NEGATIVE_LENGTHS, seed=seed)
    return replace(made, sample_index=torch.tensor(index), report_key=torch.tensor(index) % 10)


@pytest.mark.parametrize("strategy", ["contrastive", "ithn"])
def test_past_features_are_further_candidates(strategy):
    objective, plain = (make_objective(strategy=strategy, negative_queue=size) for size in (6, 0))
    first, second, third = (of_samples(seed, index) for seed, index in
                            enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [12, 6, 8, 3])))
    terms = [objective(made, 3) for made in (first, second, third)]
    torch.testing.assert_close(terms[0]["contrastive"], plain(first, 3)["contrastive"])
    (*_, z1, z2, z3), (*_, u1, u2, u3) = ([embeddings(plain, made)[place].detach() for made in (first, second, third)]
                                          for place in (0, 2))
    queued_z, queued_u = torch.cat([z1[2:], z2]), torch.cat([u1[2:], u2])  # samples 2, 3, 4, 5, 6, 7: the last 6
    scale = objective.temp_1.exp().detach()
    for_images, for_reports = scale * z3 @ queued_u.T, scale * u3 @ queued_z.T
    for extra in (for_images, for_reports):
        extra[1, 4] = extra[3, 1] = -torch.inf  # samples 6 and 3 are no negatives of themselves
    if strategy == "contrastive":
        scores = scale * z3 @ u3.T
    else:
        z, negative_z, u, negative_u = (part.detach() for part in embeddings(plain, third))
        harder = normalise(ithn(z, u, negative_u, plain.hardness(3)))
        scores = modified_scores(z, u, negative_z, negative_u, harder, scale)
    expected = contrastive_loss(scores, for_images=for_images, for_reports=for_reports)
    torch.testing.assert_close(terms[2]["contrastive"], expected, rtol=1e-6, atol=1e-6)
    terms[2]["loss"].backward()  # what was queued since has not changed what the backward pass needs
    # Sample 12 has the report of sample 2, when that counts.
    masked = make_objective(strategy=strategy, negative_queue=6, mask_identical=True)
    masked.load_state_dict(plain.state_dict(), strict=False)
    for made in (first, second):
        masked(made, 3)
    for extra in (for_images, for_reports):
        extra[0, 0] = -torch.inf
    expected = contrastive_loss(scores, for_images=for_images, for_reports=for_reports)
    torch.testing.assert_close(masked(third, 3)["contrastive"], expected, rtol=1e-6, atol=1e-6)


def test_the_queue_belongs_to_the_checkpoint_and_to_training():
    batches = [of_samples(seed, list(range(4 * seed, 4 * seed + 4))) for seed in range(4)]
    whole, begun = (make_objective(negative_queue=6) for _ in range(2))
    expected = [whole(made, 3)["loss"] for made in batches]
    for made in batches[:2]:
        begun(made, 3)
    resumed = make_objective(seed=1, negative_queue=6)
    resumed.load_state_dict(begun.state_dict())
    assert [resumed(made, 3)["loss"] for made in batches[2:]] == expected[2:]
    assert not any(name.startswith("queue") for name in whole.published_state_dict())
    torch.testing.assert_close(whole.eval()(batches[0], 3)["loss"], make_objective()(batches[0], 3)["loss"])


def test_what_is_not_finite_leaves_its_place_empty(batch):
    queue = FeatureQueue(3, 2)
    keys = torch.arange(5).unsqueeze(1).expand(5, 3)
    features = torch.arange(10.0).view(5, 2)
    queue.push(features[:2], features[:2], keys[:2])
    assert queue.keys[:, 0].tolist() == [0, 1, -1]
    queue.push(torch.tensor([[torch.nan, 0.0]]), features[:1], keys[2:3])
    queue.push(features[3:], features[3:], keys[3:])
    assert queue.keys[:, 0].tolist() == [3, 4, -1] and queue.image.isfinite().all()
    queue.push(features, features, keys)  # more than there is room for
    assert sorted(queue.keys[:, 0].tolist()) == [2, 3, 4]
    _, _, strangers = queue.past(torch.tensor([[3, 9, 2], [7, 8, 8]]), [2])
    assert sorted(strangers[0].tolist()) == [False, False, True] and strangers[1].all()


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


def test_labels_come_from_the_file_where_there_is_one(demo, demo_labels):
    studies = read_annotation(demo / "annotation.json").splits["train"]
    by_rules = same_labels(Config(label_path=Config.label_path), studies, None)
    assert same_labels(Config(label_path=str(demo_labels)), studies, None).tolist() == by_rules.tolist()
    rows = [[study.id, "1", *[""] * 13] for study in studies]
    write_table(demo_labels.with_name("alike.csv"), ["id", *CLASSES], rows)
    assert not same_labels(Config(label_path=str(demo_labels.with_name("alike.csv"))), studies, None).any()
    with pytest.raises(InputError, match="--label_path .*nowhere.csv: cannot be read"):
        same_labels(Config(label_path="nowhere.csv"), studies, None)


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
    ({"ithn": "off", "negative_queue": 8}, "--negative_queue 8 has no effect with --ithn off"),
    ({"strategy": "contrastive", "image_negatives": True}, "--image_negatives true: not with --strategy contrastive"),
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
    assert (config.image_negatives, config.negative_queue) == (False, 0)
    assert (config.contrastive_temperature, config.learn_temperature, config.max_hardness) == (0.07, True, 1.0)


def test_a_run_with_all_of_them_goes_on_as_it_began(train, demo_index, tmp_path):
    """Through the real entry point; the labels are those of the rules."""
    flags = ("--negative_index", demo_index, "--harder_term", "column", "--mask_same_labels", "true",
             "--image_negatives", "true", "--negative_queue", 20, "--mask_identical", "true",
             "--hardness_schedule", "retrieval", "--contrastive_temperature", 0.1, "--learn_temperature", "false")
    folder = train(*flags)
    assert "by rules; the commonest has" in (folder / "train.log").read_text()
    state = load_checkpoint(folder / "current_checkpoint.pth")
    assert state["objective"]["smoothed_accuracy"] > 0
    assert sorted(state["objective"]["queue.keys"][:, 0].tolist()) == [-1] * 6 + list(range(14))
    assert state["state_dict"]["temp_1"].item() == pytest.approx(math.log(10))
    assert not any(name.startswith(("smoothed", "queue")) for name in state["state_dict"])
    with pytest.raises(InputError, match="--hardness_schedule epoch: the run of --resume .* began with retrieval"):
        train("--resume", folder / "current_checkpoint.pth", "--epochs", 2, "--hardness_schedule", "epoch")
    train("--resume", folder / "current_checkpoint.pth", "--epochs", 2)
    again = load_checkpoint(folder / "current_checkpoint.pth")
    assert again["config"]["harder_term"] == "column" and len(again["history"]) == 2
    assert again["history"][1]["train_hardness"] > state["history"][0]["train_hardness"] > 0
    whole = load_checkpoint(train(*flags, "--epochs", 2, "--save_dir", tmp_path / "whole") / "current_checkpoint.pth")
    for name, value in whole["objective"].items():
        assert torch.equal(value, again["objective"][name]), name
