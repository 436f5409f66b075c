"""Every form, further columns, weights and soft targets against double loops written out, value and gradient."""

import math

import pytest
import torch

from modules.ithn.contrastive_forms import FORMS, FormOptions, paper_triplet
from modules.ithn.losses import FurtherColumns, contrastive_loss, equal_rows, mean_over, normalise, soft_targets, tf_idf

B, M, SCALE = 5, 4, 7.0
BIAS = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
OPTIONS = FormOptions(bias=BIAS, positive_prior=0.1, hardness_beta=0.3, margin=0.25)
OF_ANCHORS = [name for name, form in FORMS.items() if form.of_anchor]


def draw(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def anchor_by_hand(form, own, negatives, scale, options=OPTIONS):
    """What one anchor pays, from a score and a list of scores."""
    if form == "standard":
        return -torch.log(own.exp() / (own.exp() + sum(s.exp() for s in negatives)))
    if form == "decoupled":
        return -own + torch.log(sum(s.exp() for s in negatives))
    if form == "sigmoid":
        no = [torch.log(1 + torch.exp(s + options.bias)) for s in negatives]
        return torch.log(1 + torch.exp(-(own + options.bias))) + sum(no)
    if form in ("debiased", "hardness_weighted"):
        n, prior = len(negatives), options.positive_prior
        beta = options.hardness_beta if form == "hardness_weighted" else 0.0
        importance = [torch.exp(beta * s) for s in negatives]
        mean = sum(importance) / n
        total = sum(weight / mean * s.exp() for weight, s in zip(importance, negatives, strict=True))
        against = torch.maximum((total - n * prior * own.exp()) / (1 - prior), n * torch.exp(-scale))
        return -torch.log(own.exp() / (own.exp() + against))
    assert form == "triplet"
    return torch.clamp(options.margin - own / scale + max(s / scale for s in negatives), min=0)


def loss_by_hand(form, scores, scale, *, rows=None, excluded=None, further=None, log_weights=None):
    takes_part = [True] * B if rows is None else rows.tolist()
    total = 0.0
    for of_images in (True, False):
        for i in range(B):
            if not takes_part[i]:
                continue
            negatives = []
            for j in range(B):
                if j != i and takes_part[j] and not (excluded is not None and excluded[i, j]):
                    score = scores[i, j] if of_images else scores[j, i]
                    negatives.append(score if log_weights is None else score + log_weights[i, j])
            if further is not None:
                more = further.of_images if of_images else further.of_reports
                negatives += [more[i, j] for j in range(M) if further.count[j]]
            if negatives:
                total = total + anchor_by_hand(form, scores[i, i], negatives, scale)
    return total / (2 * sum(takes_part))


def symmetric(seed):
    drawn = draw(B, B, seed=seed)
    return drawn + drawn.T


CASES = {
    "plain": {},
    "rows": {"rows": torch.tensor([True, False, True, True, False])},
    "excluded": {"excluded": symmetric(3) > 0},
    "weights": {"log_weights": symmetric(4)},
    "columns": {"further": "drawn"},
    "all": {"excluded": symmetric(5) > 0.3, "further": "drawn", "log_weights": symmetric(6)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", OF_ANCHORS)
def test_a_double_loop(form, case):
    scores = (SCALE * draw(B, B, seed=1)).requires_grad_()
    of_images, of_reports = (((SCALE * draw(B, M, seed=seed)).requires_grad_()) for seed in (7, 8))
    given = dict(CASES[case])
    if "further" in given:
        given["further"] = FurtherColumns(of_images, of_reports, torch.tensor([True, True, False, True]))
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=FORMS[form].temperature)
    found = contrastive_loss(scores, form, scale=scale, options=OPTIONS, **given)
    expected = loss_by_hand(form, scores, scale, **given)
    inputs = [scores, of_images, of_reports, BIAS, *([scale] if scale.requires_grad else [])]
    grads = [torch.autograd.grad(value, inputs, allow_unused=True) for value in (found, expected)]
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    for own, by_hand in zip(*grads, strict=True):
        assert (own is None) == (by_hand is None)
        if own is not None:
            torch.testing.assert_close(own, by_hand, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", OF_ANCHORS)
def test_a_sample_without_anything_to_compare_costs_nothing(form):
    scores = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(scores, form, scale=SCALE, options=OPTIONS)
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [[0.0]]


@pytest.mark.parametrize("form", OF_ANCHORS)
def test_scores_of_the_largest_scale_are_finite(form):
    """exp(100) is infinite in float32."""
    scores = (100 * draw(B, B, seed=9)).float().requires_grad_()
    loss = contrastive_loss(scores, form, scale=100.0, options=OPTIONS)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("form", OF_ANCHORS)
def test_a_sample_that_takes_no_part_leaves_gradients_finite_at_any_scale(form):
    """The released variant has no cap of 1/tau: the score of a study without a negative may exceed 88."""
    scores = torch.full((3, 3), 100.0, requires_grad=True)
    rows = torch.tensor([True, True, False])
    loss = contrastive_loss(scores, form, rows, scale=300.0, options=OPTIONS)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("form", "options"),
    [("debiased", FormOptions(positive_prior=0.0)), ("hardness_weighted", FormOptions(0.0, 0.0, 0.0))],
)
def test_limits_are_the_standard_loss(form, options):
    scores = SCALE * draw(B, B, seed=2)
    expected = contrastive_loss(scores)
    torch.testing.assert_close(contrastive_loss(scores, form, scale=SCALE, options=options), expected)


def test_more_limits_are_the_standard_loss():
    scores = SCALE * draw(B, B, seed=2)
    expected = contrastive_loss(scores)
    nothing = FurtherColumns(scores[:, :2], scores[:, :2], torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(contrastive_loss(scores, further=nothing), expected)
    torch.testing.assert_close(contrastive_loss(scores, log_weights=torch.zeros(B, B)), expected)
    cold = soft_targets(draw(B, 3, seed=3), 1e-3)
    torch.testing.assert_close(contrastive_loss(scores, targets=cold), expected)


def test_weight_2_counts_a_pair_twice_and_a_small_weight_leaves_it_out():
    scores, alike = SCALE * draw(B, B, seed=2), symmetric(3) > 0.5
    twice = contrastive_loss(scores, log_weights=alike.double() * math.log(2))
    by_hand = 0.0
    for s in (scores, scores.T):
        for i in range(B):
            others = sum((2 if alike[i, j] else 1) * s[i, j].exp() for j in range(B) if j != i)
            by_hand += torch.log(s[i, i].exp() + others) - s[i, i]
    assert twice.item() == pytest.approx(by_hand.item() / (2 * B), abs=1e-10)
    gone = contrastive_loss(scores, log_weights=alike.double() * math.log(1e-30))
    torch.testing.assert_close(gone, contrastive_loss(scores, excluded=alike))


def test_soft_targets_by_hand():
    scores = (SCALE * draw(B, B, seed=1)).requires_grad_()
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    excluded = equal_rows(labels)
    assert excluded.nonzero().tolist() == [[0, 3], [3, 0]]
    targets = soft_targets(labels, 0.5)
    rows = []
    for i in range(B):
        likeness = [1.0 if i == j else float(a @ b / max(a.norm() * b.norm(), 1e-9)) for j, (a, b) in _pairs(labels, i)]
        total = sum(math.exp(value / 0.5) for value in likeness)
        rows.append([math.exp(value / 0.5) / total for value in likeness])
    torch.testing.assert_close(targets, torch.tensor(rows, dtype=torch.float64), atol=1e-10, rtol=0)
    for left_out in (None, excluded):
        found = contrastive_loss(scores, targets=targets, excluded=left_out)
        by_hand = 0.0
        for s in (scores, scores.T):
            for i in range(B):
                kept = [j for j in range(B) if left_out is None or not left_out[i, j]]
                total = torch.log(sum(s[i, j].exp() for j in kept))
                weight = sum(rows[i][j] for j in kept)
                by_hand = by_hand - sum(rows[i][j] / weight * (s[i, j] - total) for j in kept)
        by_hand = by_hand / (2 * B)
        assert found.item() == pytest.approx(by_hand.item(), abs=1e-10)
        own, expected = (torch.autograd.grad(value, scores)[0] for value in (found, by_hand))
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)


def _pairs(labels, i):
    return [(j, (labels[i], labels[j])) for j in range(len(labels))]


def test_soft_targets_of_reports_by_hand():
    idf = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    tokens, mask = torch.tensor([[0, 1, 2, 2, 0], [0, 3, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = [[0, 1.0, 2 * (1 + math.log(2)), 0], [0, 0, 0, 0.5]]
    torch.testing.assert_close(tf_idf(tokens, mask.bool(), idf), torch.tensor(expected, dtype=torch.float64))


def test_the_papers_triplet_by_hand():
    z, u, harder = (normalise(draw(B, 3, seed=seed)).requires_grad_() for seed in (1, 2, 3))
    rows = torch.tensor([True, True, False, True, True])
    found = mean_over(paper_triplet(z, u, harder, 0.4), rows)
    total = 0.0
    for i in (0, 1, 3, 4):
        near = sum((z[i, d] - u[i, d]) ** 2 for d in range(3))
        far = sum((z[i, d] - harder[i, d]) ** 2 for d in range(3))
        total = total + torch.clamp(near - far + 0.4, min=0)
    assert found.item() == pytest.approx(total.item() / 4, abs=1e-10) and found.item() > 0
    for own, expected in zip(
        *(torch.autograd.grad(value, (z, u, harder)) for value in (found, total / 4)), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)


def test_a_form_without_anchors_is_no_form_of_scores():
    with pytest.raises(ValueError, match="'paper_triplet' is unknown"):
        contrastive_loss(torch.eye(2), "paper_triplet")
