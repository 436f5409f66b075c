"""The objective around a hand-made backbone: Eq. 13 sample by sample, the ablations, and the edges of a batch."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_backbone import PAD, TinyBackbone, rows_of, tiny_batch

from modules.errors import InputError
from modules.objective import Objective

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7], [6, 3, 12, 5]
STRATEGIES = ["ithn", "mochi", "prior", "unconstrained"]


def make(seed: int = 0, auxiliary_weight: float = 0.0, **options) -> Objective:
    torch.manual_seed(seed)
    objective = Objective(TinyBackbone(auxiliary_weight=auxiliary_weight), embedding_dim=5, **options).double()
    if objective.strategy != "off":
        objective.temp_1.data.fill_(1.7)
    return objective


@pytest.fixture
def batch():
    return tiny_batch(LENGTHS, NEGATIVE_LENGTHS)


def gradients(objective, loss):
    names, parameters = zip(*objective.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same_gradients(actual, expected):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


def eq_13(objective, batch, hardness, detach=True):
    """The paper's equations for one study after the other, in the order of the text."""
    def features(pair, i):
        kept = int(pair.token_mask[i].sum())
        output = objective.backbone(pair.images[i : i + 1], pair.tokens[i : i + 1, : kept - 1],
                                    view_mask=pair.view_mask[i : i + 1], labels=pair.labels[i : i + 1])
        z = objective.img_projection.linear1.weight @ output.image_features[0]
        u = objective.text_projection.linear1.weight @ output.report_features[0].mean(0)
        nll = [-output.log_probs[0, t, pair.tokens[i, t + 1]] for t in range(kept - 1)]
        return z / z.norm(), u / u.norm(), nll

    size = len(batch.sample_index)
    z, u, nll = zip(*(features(batch.positive, i) for i in range(size)), strict=True)
    negative_z, negative_u, _ = zip(*(features(batch.negative, i) for i in range(size)), strict=True)
    harder = []
    for i in range(size):
        line = u[i] - negative_u[i]
        p = negative_u[i] + (z[i] - negative_u[i]) @ line / (line @ line) * line
        mixed = (1 - hardness) * negative_u[i] + hardness * p
        mixed = mixed / mixed.norm()
        harder.append(mixed.detach() if detach else mixed)
    scores = torch.stack([torch.stack([
        (z[i] @ u[j] + negative_z[i] @ negative_u[j] + (-1 if i == j else 1) * z[i] @ harder[j]) / 3
        for j in range(size)]) for i in range(size)]) * objective.temp_1.exp()
    target = torch.arange(size)
    entropy = torch.nn.functional.cross_entropy
    l_cp = (entropy(scores, target) + entropy(scores.T, target)) / 2
    l_cs = torch.stack([a @ b for a, b in zip(z, negative_z, strict=True)]).mean()
    words = torch.stack([term for report in nll for term in report])
    return {"nll": words.mean(), "contrastive": l_cp, "cosine": l_cs, "loss": words.mean() + 0.1 * l_cp + 0.2 * l_cs}


# ---- Eq. 13


@pytest.mark.parametrize("detach", [True, False])
def test_loss_and_gradients_are_those_of_eq_13(batch, detach):
    objective = make(detach_negative=detach, alpha=0.3)
    expected = eq_13(objective, batch, 1 - math.exp(-0.3 * 4), detach)
    terms = objective(batch, 5)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].detach(), value.detach(), rtol=1e-10, atol=1e-12, msg=name)
    assert_same_gradients(gradients(objective, terms["loss"]), gradients(objective, expected["loss"]))


def test_weights_of_the_terms(batch):
    terms = make(ce_weight=0.5, contrastive_weight=2.0, cosine_weight=3.0)(batch, 3)
    torch.testing.assert_close(terms["loss"], 0.5 * terms["nll"] + 2 * terms["contrastive"] + 3 * terms["cosine"])


def test_hardness_counts_epochs_from_one():
    paper, released = make(alpha=0.1), make(alpha=0.1, variant="released")
    assert paper.hardness(1) == 0
    assert paper.hardness(11) == released.hardness(10) == pytest.approx(1 - math.exp(-1))


def test_only_the_loss_has_a_gradient(batch):
    terms = make()(batch, 2)
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    assert {"nll", "contrastive", "cosine", "hardness", "temperature", "cos_positive", "cos_negative", "cos_harder",
            "retrieval_accuracy"} < set(terms)
    assert terms["temperature"].item() == pytest.approx(math.exp(-1.7))


def test_diagnostics_at_hardness_zero_and_of_perfect_features(batch):
    first = make()(batch, 1)
    assert first["hardness"] == 0
    torch.testing.assert_close(first["cos_harder"], first["cos_negative"])
    later = make(alpha=1.0)(batch, 9)
    assert later["cos_harder"] > first["cos_harder"], "the synthesised negative comes nearer to the image"


# ---- one network pass, and nothing seen of the padding


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_one_batch_equals_two_calls(batch, variant):
    joint, separate = make(variant=variant, joint_pass=True), make(variant=variant, joint_pass=False)
    ours, theirs = joint(batch, 7), separate(batch, 7)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)
    assert_same_gradients(gradients(joint, ours["loss"]), gradients(separate, theirs["loss"]))
    assert [len(tokens) for tokens in joint.backbone.calls] == [8]
    assert [tokens.shape for tokens in separate.backbone.calls] == [(4, 8), (4, 11)], "positives first"
    assert (joint.backbone.calls[0][:4, 9:] == joint.backbone.pad_id).all()


def wider(pair):
    pad = torch.nn.functional.pad
    return replace(pair, tokens=pad(pair.tokens, (0, 4), value=PAD), token_mask=pad(pair.token_mask, (0, 4)))


def test_padding_changes_nothing(batch):
    objective = make()
    expected = objective(batch, 4)
    widened = replace(batch, positive=wider(batch.positive), negative=wider(batch.negative))
    for name, value in objective(widened, 4).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_released_text_feature_averages_padding_in(batch):
    objective = make(variant="released")
    pairs = [wider(batch.positive), batch.negative]
    outputs = objective._outputs(pairs)
    _, _, u, _ = objective._embed(pairs, outputs)
    torch.testing.assert_close(u, objective.text_projection(outputs[0].report_features.mean(1)))
    assert objective(replace(batch, positive=pairs[0]), 4)["contrastive"] != objective(batch, 4)["contrastive"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_order_of_the_batch_does_not_matter(batch, strategy, variant):
    objective = make(strategy=strategy, variant=variant)
    objective.eval()
    for name, value in objective(rows_of(batch, [2, 0, 3, 1]), 6).items():
        torch.testing.assert_close(value, objective(batch, 6)[name], msg=name)


# ---- ablations


def test_off_is_the_plain_backbone():
    objective = make(strategy="off", auxiliary_weight=0.5)
    terms = objective(tiny_batch(LENGTHS, None), 3)
    assert set(terms) == {"loss", "nll", "label"}
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["label"])
    assert all(name.startswith("backbone.") for name, _ in objective.named_parameters())
    objective.after_step()


def test_contrastive_is_s1_alone_and_needs_no_negatives():
    objective, batch = make(strategy="contrastive"), tiny_batch(LENGTHS, None)
    terms = objective(batch, 3)
    z, u = objective._embed([batch.positive], objective._outputs([batch.positive]))
    scores, target = z @ u.T * objective.temp_1.exp(), torch.arange(4)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(scores, target) + entropy(scores.T, target)) / 2
    torch.testing.assert_close(terms["contrastive"], expected.detach())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.1 * terms["contrastive"])
    assert "cosine" not in terms and "hardness" not in terms


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"contrastive_form": "decoupled"}, {"renormalise_negative": False},
                                     {"detach_negative": False}, {"mask_identical": True}, {"variant": "released"}])
def test_every_combination_reaches_every_parameter(batch, strategy, options):
    objective = make(strategy=strategy, **options)
    terms = objective(batch, 10)
    assert terms["loss"].isfinite()
    for name, gradient in gradients(objective, terms["loss"]).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_options_have_an_effect(batch):
    plain = make(alpha=0.5)(batch, 10)["contrastive"]
    same_text = replace(batch, report_key=torch.tensor([3, 3, 4, 5]))
    variations = {"decoupled": make(alpha=0.5, contrastive_form="decoupled")(batch, 10),
                  "plain product": make(alpha=0.5, renormalise_negative=False)(batch, 10),
                  "segment": make(alpha=0.5, clamp_segment=True)(batch, 10),
                  "masked": make(alpha=0.5, mask_identical=True)(same_text, 10),
                  **{name: make(alpha=0.5, strategy=name)(batch, 10) for name in STRATEGIES[1:]}}
    values = [plain.item(), *(terms["contrastive"].item() for terms in variations.values())]
    assert len({round(value, 9) for value in values}) == len(values), variations.keys()
    assert make(alpha=0.5)(same_text, 10)["contrastive"] == plain, "identical texts are not masked by default"


def test_the_clamp_of_the_temperature(batch):
    for variant, stays in (("paper", math.log(100)), ("released", 6.0)):
        objective = make(variant=variant)
        objective.temp_1.data.fill_(6.0)
        objective(batch, 2)
        objective.after_step()
        assert objective.temp_1.item() == pytest.approx(stays)


# ---- rows that do not take part, batch of one, half precision


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_without_a_negative_stay_out_of_the_contrastive_part(batch, strategy):
    objective, rows = make(strategy=strategy), [0, 2, 3]
    some = replace(batch, has_negative=torch.tensor([True, False, True, True]))
    actual, kept = objective(some, 4), objective(rows_of(batch, rows), 4)
    for name in ("contrastive", "cosine", "cos_positive", "cos_negative", "cos_harder"):
        torch.testing.assert_close(actual[name], kept[name], msg=name)
    torch.testing.assert_close(actual["nll"], objective(batch, 4)["nll"])


def test_no_row_with_a_negative(batch):
    objective = make()
    terms = objective(replace(batch, has_negative=torch.zeros(4, dtype=torch.bool)), 4)
    assert terms["contrastive"] == 0 and terms["cosine"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("form", ["standard", "decoupled"])
def test_batch_of_one(variant, form):
    objective = make(variant=variant, contrastive_form=form)
    terms = objective(tiny_batch([5], [4]), 8)
    assert terms["contrastive"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


def test_negatives_equal_to_the_positives_are_finite(batch):
    same = replace(batch, negative=batch.positive)
    objective = make(detach_negative=False)
    terms = objective(same, 8)
    torch.testing.assert_close(terms["cosine"], torch.tensor(1.0, dtype=torch.float64))
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_are_float32_under_autocast(dtype):
    objective = make().float()
    batch = tiny_batch(LENGTHS, NEGATIVE_LENGTHS, dtype=torch.float32)
    pairs = [batch.positive, batch.negative]
    exact = objective(batch, 9)
    with torch.autocast("cpu", dtype=dtype):
        terms = objective(batch, 9)
        outputs = objective._outputs(pairs)
        # The network's rounded features, taken on in float32 with no further rounding.
        with torch.autocast("cpu", enabled=False):
            alone = objective._contrast(batch, objective._embed(pairs, outputs), 9)
    assert outputs[0].image_features.dtype == dtype
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert terms["contrastive"] == alone["contrastive"]
    torch.testing.assert_close(terms["loss"], exact["loss"], rtol=0.02, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


# ---- accumulation, auxiliary losses


def test_two_batches_of_a_step_add_up(batch):
    """Cross entropy and auxiliary losses as one batch; the contrastive part is the mean of the two batches'."""
    objective = make(auxiliary_weight=0.7)
    halves = [rows_of(batch, slice(0, 2)), rows_of(batch, slice(2, 4))]
    count = batch.positive.token_mask[:, 1:].sum()
    parts = [objective(half, 5, token_count=count, share=0.5) for half in halves]
    whole = objective(batch, 5)
    rest = sum(0.5 * (0.1 * part["contrastive"] + 0.2 * part["cosine"]) for part in parts)
    torch.testing.assert_close(sum(part["loss"] for part in parts), whole["nll"] + whole["label"] + rest)
    # What is logged are the batch's own means.
    tokens = [half.positive.token_mask[:, 1:].sum() for half in halves]
    mean = sum(part["nll"] * n for part, n in zip(parts, tokens, strict=True)) / count
    torch.testing.assert_close(mean, whole["nll"])


@pytest.mark.parametrize("joint_pass", [True, False])
def test_auxiliary_losses_are_those_of_the_positives(batch, joint_pass):
    terms = make(auxiliary_weight=0.7, joint_pass=joint_pass)(batch, 5)
    plain = make(auxiliary_weight=0.7, strategy="off")(batch, 5)
    torch.testing.assert_close(terms["label"], plain["label"])
    torch.testing.assert_close(terms["loss"], plain["loss"] + 0.1 * terms["contrastive"] + 0.2 * terms["cosine"])


def test_nll_sum(batch):
    objective = make()
    expected = objective(batch, 1)["nll"] * sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(objective.nll_sum(batch.positive).detach(), expected)


# ---- the harder negative of the epoch before


def test_synthesis_goes_on_from_the_epoch_before(batch):
    objective = make(previous_epoch_start=True, n_samples=10, alpha=0.5)
    batch = replace(batch, sample_index=torch.tensor([7, 1, 4, 9]))
    first, second = objective(batch, 2), objective(batch, 3)
    plain = make(alpha=0.5)
    torch.testing.assert_close(first["loss"], plain(batch, 2)["loss"])
    assert objective.previous.known.nonzero().flatten().tolist() == [1, 4, 7, 9]
    # Two steps lead nearer to the foot of the perpendicular than one: distance (1 - l2)(1 - l3) instead of 1 - l3.
    assert second["cos_harder"] != plain(batch, 3)["cos_harder"]
    pairs = [batch.positive, batch.negative]
    z, _, u, negative_u = plain._embed(pairs, plain._outputs(pairs))
    line = u - negative_u
    p = negative_u + ((z - negative_u) * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True) * line
    rest = (1 - plain.hardness(2)) * (1 - plain.hardness(3))
    kept = objective.previous.harder[[7, 1, 4, 9]]
    torch.testing.assert_close(kept, p + rest * (negative_u - p), rtol=1e-6, atol=1e-6)


def test_what_is_kept_belongs_to_the_checkpoint(batch):
    objective = make(previous_epoch_start=True, n_samples=4, alpha=0.5)
    objective(batch, 4)
    other = make(seed=1, previous_epoch_start=True, n_samples=4, alpha=0.5)
    other.load_state_dict(objective.state_dict())
    torch.testing.assert_close(other(batch, 5)["loss"], objective(batch, 5)["loss"])
    assert not any("previous" in name for name in objective.published_state_dict())


def test_what_is_not_kept(batch):
    objective = make(previous_epoch_start=True, n_samples=4)
    some = replace(batch, has_negative=torch.tensor([True, True, False, True]))
    some.positive.images[3] = float("nan")
    objective.eval()(some, 4)
    assert not objective.previous.known.any(), "outside training"
    objective.train()(some, 4)
    assert objective.previous.known.tolist() == [True, True, False, False]
    assert objective.previous.harder.isfinite().all()


# ---- mistakes


@pytest.mark.parametrize(("options", "message"), [
    ({"strategy": "hard"}, "strategy 'hard': must be one of ithn, unconstrained, mochi, prior, off, contrastive"),
    ({"strategy": "released"}, "strategy 'released': must be one of"),
    ({"variant": "original"}, "variant 'original': must be one of paper, released"),
    ({"contrastive_form": "dcl"}, "contrastive_form 'dcl': must be one of standard, decoupled"),
    ({"clamp_segment": True, "strategy": "mochi"}, "clamp_segment acts on strategy 'ithn'"),
    ({"clamp_segment": True, "variant": "released"}, "clamp_segment acts on strategy 'ithn' of variant 'paper'"),
    ({"previous_epoch_start": True}, "the number of training samples"),
    ({"previous_epoch_start": True, "strategy": "mochi", "n_samples": 3}, "strategy ithn or unconstrained"),
])
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Objective(TinyBackbone(), **options)
