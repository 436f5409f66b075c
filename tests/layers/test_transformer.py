"""Norm, masks, positions and the memory's sparse attention against their plain definitions."""

import math

import pytest
import torch
from torch import Tensor

from modules.layers import cross_modal_memory as memory
from modules.layers.cross_modal_memory import topk_attention
from modules.layers.transformer import LayerNorm, PositionalEncoding, decoder_mask, normalise

torch.set_num_threads(1)


def plain_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return scale * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) + shift


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-6])
def test_norm_has_the_unbiased_std_and_eps_outside_the_root(spread):
    torch.manual_seed(0)
    x = (spread * torch.randn(3, 4, 6, dtype=torch.double)).requires_grad_()
    scale, shift = (torch.randn(6, dtype=torch.double, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(x)
    expected, actual = plain_norm(x, scale, shift, 1e-6), normalise(x, scale, shift)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad(actual, (x, scale, shift), grad),
        torch.autograd.grad(expected, (x, scale, shift), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)


def test_norm_of_a_constant_row_is_the_shift_with_a_finite_gradient():
    norm = LayerNorm(8)
    torch.nn.init.constant_(norm.b_2, 0.5)
    x = torch.full((2, 8), 3.0, requires_grad=True)
    y = norm(x)
    assert torch.equal(y, torch.full((2, 8), 0.5))
    (y * torch.randn(2, 8)).sum().backward()
    assert x.grad.isfinite().all()


def test_norm_of_half_precision_is_computed_in_float32():
    x = (1000 * torch.randn(2, 64)).half()
    y = LayerNorm(64)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, LayerNorm(64)(x.float()))


def test_positions_are_sinusoidal_and_need_not_be_in_a_file():
    positions = PositionalEncoding(6, dropout=0.1).eval()
    at_three = positions(torch.zeros(1, 5, 6))[0, 3]
    expected = [f(3 / 10000 ** (i / 6)) for i in (0, 2, 4) for f in (math.sin, math.cos)]
    torch.testing.assert_close(at_three, torch.tensor(expected))
    torch.testing.assert_close(positions(torch.zeros(1, 2, 6), position=3)[0], at_three.expand(2, -1))
    table = positions.pe.clone()
    positions.load_state_dict({})
    assert torch.equal(positions.pe, table)
    positions.load_state_dict({"pe": table + 1})
    assert torch.equal(positions.pe, table + 1)


def test_decoder_mask_hides_padding_and_the_future_but_never_the_first_position():
    mask = decoder_mask(torch.tensor([[0, 5, 0, 7]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]
    assert mask[0, 0].int().tolist() == expected


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    """The definition: weights of all slots but the k best are 0."""
    scores = torch.einsum("rhw,mhw->rhm", query, keys) / query.size(-1) ** 0.5
    kth = scores.sort(dim=-1, descending=True).values[..., k - 1 : k]
    weights = scores.masked_fill(scores < kth, -torch.inf).softmax(dim=-1)
    return torch.einsum("rhm,mhw->rhw", weights, values)


@pytest.mark.parametrize("num_slots", [21, 200])
def test_sparse_attention_equals_the_dense_definition(num_slots, monkeypatch):
    monkeypatch.setitem(memory.SCORES_AT_ONCE, "cpu", 5 * num_slots * 2)  # five queries at a time
    torch.manual_seed(0)
    query, keys, values = (
        torch.randn(n, 2, 8, dtype=torch.double, requires_grad=True) for n in (13, num_slots, num_slots)
    )
    grad = torch.randn(13, 2, 8, dtype=torch.double)
    actual, expected = topk_attention(query, keys, values, 5), dense_attention(query, keys, values, 5)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(
        torch.autograd.grad(actual, (query, keys, values), grad),
        torch.autograd.grad(expected, (query, keys, values), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_slots_of_equal_score_share_the_weight():
    query, keys = torch.zeros(1, 1, 64), torch.randn(64, 1, 64)  # every score is 0
    out = topk_attention(query, keys, torch.eye(64).unsqueeze(1), 8)  # exactly k slots, an eighth each
    assert sorted(out.flatten().tolist()) == [0.0] * 56 + [0.125] * 8


def test_memory_dropout_keeps_the_mean():
    torch.manual_seed(0)
    query, keys, values = torch.randn(2000, 1, 4), torch.randn(32, 1, 4), torch.ones(32, 1, 4)
    out = topk_attention(query, keys, values, 4, dropout=0.1)
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert out.std() > 0.1
