"""The loss functions against arithmetic written out with plain numbers."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from modules.ithn.losses import clip_scores, contrastive_loss, cosine_loss, modified_scores, normalise, token_nll

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(*shape, seed=0, dtype=torch.float64):
    return normalise(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def test_token_nll_divides_by_the_kept_tokens_of_the_whole_batch():
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], [[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]]])
    targets = torch.tensor([[1, 0], [2, 1]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = -(math.log(0.3) + math.log(0.1) + math.log(0.5)) / 3
    assert token_nll(probabilities.log(), targets, mask).item() == pytest.approx(expected, rel=1e-6)
    # As part of a batch of 10 tokens.
    assert token_nll(probabilities.log(), targets, mask, 10).item() == pytest.approx(expected * 3 / 10, rel=1e-6)


def test_token_nll_of_two_halves_adds_up_with_the_count_of_both():
    log_probs = torch.randn(4, 6, 9, dtype=torch.float64).log_softmax(-1)
    targets = torch.randint(0, 9, (4, 6))
    mask = torch.arange(6) < torch.tensor([[6], [2], [5], [1]])
    halves = [token_nll(log_probs[i:j], targets[i:j], mask[i:j], mask.sum()) for i, j in ((0, 2), (2, 4))]
    assert torch.allclose(sum(halves), token_nll(log_probs, targets, mask), rtol=1e-12)


def test_token_nll_does_not_see_what_is_masked():
    log_probs = torch.randn(1, 3, 4).log_softmax(-1)
    log_probs[0, 2] = float("nan")
    log_probs.requires_grad_()
    loss = token_nll(log_probs, torch.tensor([[1, 2, 3]]), torch.tensor([[True, True, False]]))
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()


def test_token_nll_of_nothing_is_zero():
    targets, mask = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool)
    assert token_nll(torch.zeros(1, 2, 3), targets, mask) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_summed_in_float32(dtype):
    log_probs = torch.full((1, 5000, 2), -1.0, dtype=dtype)
    mask = torch.ones(1, 5000, dtype=torch.bool)
    loss = token_nll(log_probs, torch.zeros(1, 5000, dtype=torch.long), mask, 1)
    assert loss.dtype == torch.float32 and loss.item() == 5000  # neither 2048-spaced nor infinite


def test_cosine_loss_is_a_mean_over_the_rows_that_take_part():
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    negative = torch.tensor([[0.0, 1.0], [-0.6, -0.8], [0.6, 0.8]])
    assert cosine_loss(image, negative).item() == pytest.approx((0 - 1 + 0.8) / 3)
    assert cosine_loss(image, negative, absolute=True).item() == pytest.approx((0 + 1 + 0.8) / 3)
    assert cosine_loss(image, negative, torch.tensor([True, False, True])).item() == pytest.approx(0.4)
    assert cosine_loss(image, negative, torch.tensor([False] * 3)) == 0


def test_modified_scores_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    u = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    negative_z = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    negative_u = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    harder = torch.tensor([[0.5, 0.5], [0.25, 1.0]])
    # S1 = [[.8 .6][.6 .8]], S2 = [[.8 1][.6 0]], S3 = [[.5 .25][.5 1]] -> S3' = [[-.5 .25][.5 -1]]
    expected = 2 * torch.tensor([[1.1, 1.85], [1.7, -0.2]]) / 3
    torch.testing.assert_close(modified_scores(z, u, negative_z, negative_u, harder, 2.0), expected)
    # The released code: a scale of its own for S3, zero off its diagonal.
    expected = torch.tensor([[3.2 - 2.0, 3.2], [2.4, 1.6 - 4.0]]) / 3
    released = modified_scores(z, u, negative_z, negative_u, harder, 2.0, 4.0, keep_off_diagonal=False)
    torch.testing.assert_close(released, expected)


def test_contrastive_loss_by_hand():
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    rows = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    columns = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    assert contrastive_loss(scores).item() == pytest.approx((rows + columns) / 4, rel=1e-6)
    # Decoupled: -S_ii + the only other entry.
    assert contrastive_loss(scores, "decoupled").item() == pytest.approx((1 - 2 + 0 - 3 + 0 - 2 + 1 - 3) / 4, rel=1e-6)


def test_standard_form_is_the_mean_of_two_cross_entropies():
    scores = 5 * torch.randn(6, 6, dtype=torch.float64)
    target = torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(contrastive_loss(scores), (entropy(scores, target) + entropy(scores.T, target)) / 2)


@pytest.mark.parametrize("form", ["standard", "decoupled"])
def test_left_out_rows_are_as_if_they_were_not_there(form):
    scores = torch.randn(5, 5, dtype=torch.float64)
    rows = torch.tensor([True, False, True, True, False])
    poisoned = scores.clone()
    poisoned[~rows] = float("nan")
    poisoned[:, ~rows] = float("inf")
    poisoned.requires_grad_()
    loss = contrastive_loss(poisoned, form, rows)
    loss.backward()
    torch.testing.assert_close(loss, contrastive_loss(scores[rows][:, rows], form))
    assert poisoned.grad.isfinite().all()
    assert not poisoned.grad[~rows].any() and not poisoned.grad[:, ~rows].any()


def test_excluded_pairs_leave_the_denominators_but_never_the_positive():
    scores = torch.randn(3, 3, dtype=torch.float64)
    key = torch.tensor([7, 7, 8])
    loss = contrastive_loss(scores, excluded=key.unsqueeze(0) == key.unsqueeze(1))
    lowered = scores.clone()
    lowered[0, 1] = lowered[1, 0] = -1e9
    torch.testing.assert_close(loss, contrastive_loss(lowered))


@pytest.mark.parametrize("form", ["standard", "decoupled"])
@pytest.mark.parametrize("case", ["one sample", "no row", "all identical"])
def test_nothing_to_compare_gives_a_finite_gradient(form, case):
    size = 1 if case == "one sample" else 3
    scores = torch.randn(size, size, requires_grad=True)
    rows = torch.zeros(size, dtype=torch.bool) if case == "no row" else None
    excluded = torch.ones(size, size, dtype=torch.bool) if case == "all identical" else None
    loss = contrastive_loss(scores, form, rows, excluded)
    loss.backward()
    assert loss.item() == 0 and scores.grad.isfinite().all()


@pytest.mark.parametrize("form", ["standard", "decoupled"])
def test_gradients_of_the_whole_chain(form):
    z, u, negative_z, negative_u, harder = (features(4, 3, seed=seed).requires_grad_() for seed in range(5))
    t = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def loss(z, u, negative_z, negative_u, harder, t):
        scores = modified_scores(*map(normalise, (z, u, negative_z, negative_u, harder)), t.exp())
        return contrastive_loss(scores, form) + cosine_loss(normalise(z), normalise(negative_z))

    assert gradcheck(loss, (z, u, negative_z, negative_u, harder, t))


@pytest.mark.parametrize("form", ["standard", "decoupled"])
def test_order_of_the_batch_does_not_matter(form):
    scores = torch.randn(7, 7, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(contrastive_loss(scores[order][:, order], form), contrastive_loss(scores, form))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_half_precision_features_are_float32(dtype):
    z, u = features(8, 512, dtype=dtype), features(8, 512, seed=1, dtype=dtype)
    scores = clip_scores(z, u, 100.0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), 100 * (z.double() @ u.double().T), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalise_has_unit_length_and_survives_zero(dtype):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [60000.0, 60000.0]]).to(dtype).requires_grad_()
    y = normalise(x)
    y.sum().backward()
    torch.testing.assert_close(y[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(y[2].norm(), torch.tensor(1.0))  # the squares overflow float16
    assert not y[1].any() and x.grad.isfinite().all()


def test_unknown_form_names_the_choices():
    with pytest.raises(ValueError, match="'dcl' is unknown: one of standard, decoupled"):
        contrastive_loss(torch.zeros(2, 2), "dcl")


def test_equation_11_has_a_second_minimum_where_images_oppose_all_reports():
    """What docs/ABLATIONS.md warns of: with S_3' of Eq. 11 no image need know its report for a small L_CP."""
    batch, scale = 16, 1 / 0.07
    own = torch.eye(2 * batch, dtype=torch.float64)[:batch]
    far = torch.eye(2 * batch, dtype=torch.float64)[batch:]
    aligned = contrastive_loss(modified_scores(own, own, far, far, far, scale))  # S_1 = S_2 = I, S_3 = 0
    one = normalise(torch.ones(batch, 4, dtype=torch.float64))
    opposed = contrastive_loss(modified_scores(one, -one, one, -one, -one, scale))  # every cosine is -1
    torch.testing.assert_close(opposed, aligned)
    assert aligned.item() == pytest.approx(math.log(1 + (batch - 1) * math.exp(-2 / 3 * scale)))
    assert contrastive_loss(clip_scores(one, -one, scale)).item() == pytest.approx(math.log(batch))
