"""The edges of the objective: rows left out, one sample, half precision, accumulation, memory of an epoch, mistakes."""

from dataclasses import replace

import pytest
import torch

from modules.ithn.settings import ITHNSettings
from modules.ithn.synthesis import NEEDING_NEGATIVES, STRATEGIES
from modules.ithn.weights import published_state
from modules.runtime.errors import InputError
from tests.tiny_backbone import gradients, make_objective, rows_of, tiny_batch

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7], [6, 3, 12, 5]
AVERAGED = tuple(name for name in NEEDING_NEGATIVES if not STRATEGIES[name].as_columns)


@pytest.fixture
def batch():
    return tiny_batch(LENGTHS, NEGATIVE_LENGTHS)


# ---- rows that do not take part, batch of one, half precision


@pytest.mark.parametrize("strategy", AVERAGED)
def test_rows_without_a_negative_stay_out_of_the_contrastive_part(batch, strategy):
    objective, rows = make_objective(strategy=strategy), [0, 2, 3]
    some = replace(batch, has_negative=torch.tensor([True, False, True, True]))
    actual, kept = objective(some, 4), objective(rows_of(batch, rows), 4)
    for name in ("contrastive", "cosine", "cos_positive", "cos_negative", "cos_harder"):
        torch.testing.assert_close(actual[name], kept[name], msg=name)
    torch.testing.assert_close(actual["nll"], objective(batch, 4)["nll"])


def test_no_row_with_a_negative(batch):
    objective = make_objective()
    terms = objective(replace(batch, has_negative=torch.zeros(4, dtype=torch.bool)), 4)
    assert terms["contrastive"] == 0 and terms["cosine"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("form", ["standard", "decoupled"])
def test_batch_of_one(variant, form):
    objective = make_objective(ithn_variant=variant, contrastive_form=form)
    terms = objective(tiny_batch([5], [4]), 8)
    assert terms["contrastive"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


def test_negatives_equal_to_the_positives_are_finite(batch):
    same = replace(batch, negative=batch.positive)
    objective = make_objective(detach_negative=False)
    terms = objective(same, 8)
    torch.testing.assert_close(terms["cosine"], torch.tensor(1.0, dtype=torch.float64))
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarities_are_float32_under_autocast(dtype):
    objective = make_objective().float()
    batch = tiny_batch(LENGTHS, NEGATIVE_LENGTHS, dtype=torch.float32)
    pairs = [batch.positive, batch.negative]
    exact = objective(batch, 9)
    with torch.autocast("cpu", dtype=dtype):
        terms = objective(batch, 9)
        outputs = objective._passes(pairs)
        # The network's rounded features, taken on in float32 with no further rounding.
        with torch.autocast("cpu", enabled=False):
            alone = objective._contrastive_terms(batch, objective._features(pairs, outputs), objective.hardness(9))
    assert outputs[0].image_features.dtype == dtype
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert terms["contrastive"] == alone["contrastive"]
    torch.testing.assert_close(terms["loss"], exact["loss"], rtol=0.02, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(objective, terms["loss"]).values())


# ---- accumulation, auxiliary losses


def test_two_batches_of_a_step_add_up(batch):
    """Cross entropy and auxiliary losses as one batch; the contrastive part is the mean of the two batches'."""
    objective = make_objective(auxiliary_weight=0.7)
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
    terms = make_objective(auxiliary_weight=0.7, joint_pass=joint_pass)(batch, 5)
    plain = make_objective(auxiliary_weight=0.7, strategy="off")(batch, 5)
    torch.testing.assert_close(terms["label"], plain["label"])
    torch.testing.assert_close(terms["loss"], plain["loss"] + 0.1 * terms["contrastive"] + 0.2 * terms["cosine"])


def test_report_nll(batch):
    objective = make_objective()
    expected = objective(batch, 1)["nll"] * sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(objective.report_nll(batch.positive).detach().sum(), expected)


# ---- the harder negative of the epoch before


def test_synthesis_goes_on_from_the_epoch_before(batch):
    objective = make_objective(previous_epoch_start=True, n_samples=10, alpha=0.5)
    batch = replace(batch, sample_index=torch.tensor([7, 1, 4, 9]))
    first, second = objective(batch, 2), objective(batch, 3)
    plain = make_objective(alpha=0.5)
    torch.testing.assert_close(first["loss"], plain(batch, 2)["loss"])
    assert objective.previous.known.nonzero().flatten().tolist() == [1, 4, 7, 9]
    # Two steps lead nearer to the foot of the perpendicular than one: distance (1 - l2)(1 - l3) instead of 1 - l3.
    assert second["cos_harder"] != plain(batch, 3)["cos_harder"]
    pairs = [batch.positive, batch.negative]
    z, _, u, negative_u = plain._features(pairs, plain._passes(pairs))
    line = u - negative_u
    p = negative_u + ((z - negative_u) * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True) * line
    rest = (1 - plain.hardness(2)) * (1 - plain.hardness(3))
    kept = objective.previous.harder[[7, 1, 4, 9]]
    torch.testing.assert_close(kept, p + rest * (negative_u - p), rtol=1e-6, atol=1e-6)


def test_what_is_kept_belongs_to_the_checkpoint(batch):
    objective = make_objective(previous_epoch_start=True, n_samples=4, alpha=0.5)
    objective(batch, 4)
    other = make_objective(seed=1, previous_epoch_start=True, n_samples=4, alpha=0.5)
    other.load_state_dict(objective.state_dict())
    torch.testing.assert_close(other(batch, 5)["loss"], objective(batch, 5)["loss"])
    assert not any("previous" in name for name in published_state(objective))


def test_what_is_not_kept(batch):
    objective = make_objective(previous_epoch_start=True, n_samples=4)
    some = replace(batch, has_negative=torch.tensor([True, True, False, True]))
    some.positive.images[3] = float("nan")
    objective.eval()(some, 4)
    assert not objective.previous.known.any(), "outside training"
    objective.train()(some, 4)
    assert objective.previous.known.tolist() == [True, True, False, False]
    assert objective.previous.harder.isfinite().all()


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "hard"}, "--strategy hard: must be one of ithn, mochi, prior, columns, "),
        ({"strategy": "released"}, "--strategy released: must be one of"),
        ({"ithn_variant": "original"}, "--ithn_variant original: must be one of paper, released"),
        ({"contrastive_form": "dcl"}, "--contrastive_form dcl: must be one of standard, decoupled"),
        ({"clamp_segment": True, "strategy": "mochi"}, "--clamp_segment true: needs --strategy ithn"),
        (
            {"clamp_segment": True, "ithn_variant": "released"},
            "paper's variant, not --strategy ithn --ithn_variant rel",
        ),
        ({"previous_epoch_start": True, "strategy": "mochi"}, "needs --strategy ithn or unconstrained, not mochi"),
        ({"negatives_as": "columns", "strategy": "contrastive"}, "--strategy contrastive has no negatives besides"),
        ({"negatives_as": "columns", "ithn_variant": "released"}, "it has no negatives as columns"),
        (
            {"contrastive_features": "encoder", "strategy": "mochi"},
            "needs --strategy mochi_queue or contrastive, --negatives_as columns or --contrastive_form paper_triplet",
        ),
        ({"contrastive_form": "paper_triplet", "strategy": "contrastive"}, "with its own hard negative alone"),
        ({"contrastive_targets": "labels", "contrastive_form": "sigmoid"}, "give --contrastive_form standard"),
        ({"same_label_weight": 2.0, "contrastive_form": "triplet"}, "of --contrastive_form standard or decoupled;"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ITHNSettings(**options)
