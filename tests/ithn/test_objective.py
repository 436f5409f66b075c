"""The objective around a hand-made backbone: Eq. 13 sample by sample, and the ablations."""

import math
from dataclasses import replace

import pytest
import torch

from modules.ithn.synthesis import NEEDING_NEGATIVES, STRATEGIES
from tests.tiny_backbone import PAD, gradients, make_objective, rows_of, tiny_batch

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7], [6, 3, 12, 5]
# Those whose negatives enter Eq. 11; tests/ithn/test_rivals.py has the others.
AVERAGED = tuple(name for name in NEEDING_NEGATIVES if not STRATEGIES[name].as_columns)


@pytest.fixture
def batch():
    return tiny_batch(LENGTHS, NEGATIVE_LENGTHS)


def assert_same_gradients(actual, expected):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


def eq_13(objective, batch, hardness, detach=True):
    """The paper's equations for one study after the other, in the order of the text."""

    def features(pair, i):
        kept = int(pair.token_mask[i].sum())
        output = objective.backbone(
            pair.images[i : i + 1],
            pair.tokens[i : i + 1, : kept - 1],
            view_mask=pair.view_mask[i : i + 1],
            labels=pair.labels[i : i + 1],
        )
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
    scores = (
        torch.stack(
            [
                torch.stack(
                    [
                        (z[i] @ u[j] + negative_z[i] @ negative_u[j] + (-1 if i == j else 1) * z[i] @ harder[j]) / 3
                        for j in range(size)
                    ]
                )
                for i in range(size)
            ]
        )
        * objective.temp_1.exp()
    )
    target = torch.arange(size)
    entropy = torch.nn.functional.cross_entropy
    l_cp = (entropy(scores, target) + entropy(scores.T, target)) / 2
    l_cs = torch.stack([a @ b for a, b in zip(z, negative_z, strict=True)]).mean()
    words = torch.stack([term for report in nll for term in report])
    return {"nll": words.mean(), "contrastive": l_cp, "cosine": l_cs, "loss": words.mean() + 0.1 * l_cp + 0.2 * l_cs}


# ---- Eq. 13


@pytest.mark.parametrize("detach", [True, False])
def test_loss_and_gradients_are_those_of_eq_13(batch, detach):
    objective = make_objective(detach_negative=detach, alpha=0.3)
    expected = eq_13(objective, batch, 1 - math.exp(-0.3 * 4), detach)
    terms = objective(batch, 5)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].detach(), value.detach(), rtol=1e-10, atol=1e-12, msg=name)
    assert_same_gradients(gradients(objective, terms["loss"]), gradients(objective, expected["loss"]))


def test_weights_of_the_terms(batch):
    terms = make_objective(ce_weight=0.5, contrastive_weight=2.0, cosine_weight=3.0)(batch, 3)
    torch.testing.assert_close(terms["loss"], 0.5 * terms["nll"] + 2 * terms["contrastive"] + 3 * terms["cosine"])


def test_hardness_counts_epochs_from_one():
    paper, released = make_objective(alpha=0.1), make_objective(alpha=0.1, ithn_variant="released")
    assert paper.hardness(1) == 0
    assert paper.hardness(11) == released.hardness(10) == pytest.approx(1 - math.exp(-1))


def test_only_the_loss_has_a_gradient(batch):
    terms = make_objective()(batch, 2)
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    assert {
        "nll",
        "contrastive",
        "cosine",
        "hardness",
        "temperature",
        "cos_positive",
        "cos_negative",
        "cos_harder",
        "retrieval_accuracy",
    } < set(terms)
    assert terms["temperature"].item() == pytest.approx(math.exp(-1.7))


def test_diagnostics_at_hardness_zero_and_of_perfect_features(batch):
    first = make_objective()(batch, 1)
    assert first["hardness"] == 0
    torch.testing.assert_close(first["cos_harder"], first["cos_negative"])
    later = make_objective(alpha=1.0)(batch, 9)
    assert later["cos_harder"] > first["cos_harder"], "the synthesised negative comes nearer to the image"


# ---- one network pass, and nothing seen of the padding


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_one_batch_equals_two_calls(batch, variant):
    joint, separate = (make_objective(ithn_variant=variant, joint_pass=joint_pass) for joint_pass in (True, False))
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
    objective = make_objective()
    expected = objective(batch, 4)
    widened = replace(batch, positive=wider(batch.positive), negative=wider(batch.negative))
    for name, value in objective(widened, 4).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_released_text_feature_averages_padding_in(batch):
    objective = make_objective(ithn_variant="released")
    pairs = [wider(batch.positive), batch.negative]
    outputs = objective._passes(pairs)
    _, _, u, _ = objective._features(pairs, outputs)
    torch.testing.assert_close(u, objective.text_projection(outputs[0].report_features.mean(1)))
    assert objective(replace(batch, positive=pairs[0]), 4)["contrastive"] != objective(batch, 4)["contrastive"]


@pytest.mark.parametrize("strategy", AVERAGED)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_order_of_the_batch_does_not_matter(batch, strategy, variant):
    objective = make_objective(strategy=strategy, ithn_variant=variant)
    objective.eval()
    for name, value in objective(rows_of(batch, [2, 0, 3, 1]), 6).items():
        torch.testing.assert_close(value, objective(batch, 6)[name], msg=name)


# ---- ablations


def test_off_is_the_plain_backbone():
    # The options of a checkpoint that was trained with ITHN and is only tested have no say.
    objective = make_objective(strategy="off", auxiliary_weight=0.5, previous_epoch_start=True, clamp_segment=True)
    terms = objective(tiny_batch(LENGTHS, None), 3)
    assert set(terms) == {"loss", "nll", "label"}
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["label"])
    assert all(name.startswith("backbone.") for name, _ in objective.named_parameters())
    objective.after_step()


def test_contrastive_is_s1_alone_and_needs_no_negatives():
    objective, batch = make_objective(strategy="contrastive"), tiny_batch(LENGTHS, None)
    terms = objective(batch, 3)
    z, u = objective._features([batch.positive], objective._passes([batch.positive]))
    scores, target = z @ u.T * objective.temp_1.exp(), torch.arange(4)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(scores, target) + entropy(scores.T, target)) / 2
    torch.testing.assert_close(terms["contrastive"], expected.detach())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.1 * terms["contrastive"])
    assert "cosine" not in terms and "hardness" not in terms


@pytest.mark.parametrize("strategy", AVERAGED)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"contrastive_form": "decoupled"},
        {"renormalise_negative": False},
        {"detach_negative": False},
        {"mask_identical": True},
        {"ithn_variant": "released"},
    ],
)
def test_every_combination_reaches_every_parameter(batch, strategy, options):
    objective = make_objective(strategy=strategy, **options)
    terms = objective(batch, 10)
    assert terms["loss"].isfinite()
    for name, gradient in gradients(objective, terms["loss"]).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_options_have_an_effect(batch):
    plain = make_objective(alpha=0.5)(batch, 10)["contrastive"]
    same_text = replace(batch, report_key=torch.tensor([3, 3, 4, 5]))
    variations = {
        "decoupled": make_objective(alpha=0.5, contrastive_form="decoupled")(batch, 10),
        "plain product": make_objective(alpha=0.5, renormalise_negative=False)(batch, 10),
        "segment": make_objective(alpha=0.5, clamp_segment=True)(batch, 10),
        "masked": make_objective(alpha=0.5, mask_identical=True)(same_text, 10),
        **{name: make_objective(alpha=0.5, strategy=name)(batch, 10) for name in AVERAGED[1:]},
    }
    values = [plain.item(), *(terms["contrastive"].item() for terms in variations.values())]
    assert len({round(value, 9) for value in values}) == len(values), variations.keys()
    assert make_objective(alpha=0.5)(same_text, 10)["contrastive"] == plain, "identical texts are not masked by default"


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("strategy", AVERAGED)
def test_the_harder_negative_is_held_constant(batch, strategy, renormalise, monkeypatch):
    """Its gradient is that of a constant, although a strategy may return the negative itself."""
    objective = make_objective(strategy=strategy, renormalise_negative=renormalise, alpha=0.3)
    found = gradients(objective, objective(batch, 5)["loss"])
    synthesise = objective.synthesise
    monkeypatch.setattr(objective, "synthesise", lambda *features: synthesise(*features).detach().clone())
    assert_same_gradients(found, gradients(objective, objective(batch, 5)["loss"]))


def test_the_clamp_of_the_temperature(batch):
    for variant, stays in (("paper", math.log(100)), ("released", 6.0)):
        objective = make_objective(ithn_variant=variant)
        objective.temp_1.data.fill_(6.0)
        objective(batch, 2)
        objective.after_step()
        assert objective.temp_1.item() == pytest.approx(stays)
