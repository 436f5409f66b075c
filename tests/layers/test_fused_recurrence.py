"""R2Gen's recurrence as a GPU computes it, with what torch's fused kernels compute written out: they need a GPU."""

import pytest
import torch
from torch import Tensor

from modules.layers import fused_recurrence
from modules.layers.fused_recurrence import FusedRecurrence, by_head, by_part, is_possible
from modules.layers.relational_memory import Recurrence, RelationalMemory

torch.set_num_threads(1)
LENGTH, BATCH, SLOTS, HEADS, WIDTH = 5, 4, 3, 2, 8


def cell(known: Tensor, made: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_thnn_fused_lstm_cell: hidden state, cell state, and the gates after sigmoid and tanh."""
    i, f, g, o = (known + made).chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    after = f * memory + i * g
    return o * after.tanh(), after, torch.cat([i, f, g, o], dim=1)


def cell_backward(d_hidden, d_after, memory, after, gates, has_bias):
    """aten::_thnn_fused_lstm_cell_backward_impl: gradients of the gates before sigmoid and tanh, and of the memory."""
    assert not has_bias
    i, f, g, o = gates.chunk(4, dim=1)
    squashed, d_hidden = after.tanh(), torch.zeros_like(after) if d_hidden is None else d_hidden
    total = d_after + d_hidden * o * (1 - squashed**2)
    d_i, d_f, d_o = total * g * i * (1 - i), total * memory * f * (1 - f), d_hidden * squashed * o * (1 - o)
    return torch.cat([d_i, d_f, total * i * (1 - g**2), d_o], dim=1), total * f, None


class Attention:
    """aten::_scaled_dot_product_efficient_attention with the dropout ``kept`` (T, s, s+1, B, h) as factors, or None."""

    def __init__(self, kept: Tensor | None):
        self.kept, self.calls = kept, 0

    def compute(self, query, key, value, t: int) -> Tensor:
        probs = (query @ key.transpose(-2, -1) / query.size(-1) ** 0.5).softmax(-1)  # (1, B*h, s, s+1)
        if self.kept is not None:
            probs = probs * self.kept[t].permute(2, 3, 0, 1).flatten(0, 1)
        return probs @ value

    def forward(self, query, key, value, bias, with_sums, dropout):
        assert bias is None and with_sums and dropout == 0.1
        seed, offset = torch.tensor(self.calls), torch.tensor(0)
        self.calls += 1
        # As the kernel allocates it: heads beside each other.
        attended = self.compute(query, key, value, int(seed)).transpose(1, 2).contiguous().transpose(1, 2)
        return attended, torch.empty(0), seed, offset

    def backward(self, grad, query, key, value, bias, attended, sums, seed, offset, dropout, wanted):
        assert bias is None and dropout == 0.1 and wanted == [True, True, True, False]
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in (query, key, value)]
            again = self.compute(*given, int(seed))
        torch.testing.assert_close(attended, again.detach())
        return *torch.autograd.grad(again, given, grad), None


def stand_in(patch: pytest.MonkeyPatch, kept: Tensor | None) -> Attention:
    """Replace the kernels of a GPU; the attention drops out what ``kept`` says."""
    attention = Attention(kept)
    for name, replaced in (
        ("cell", cell),
        ("cell_backward", cell_backward),
        ("attention", attention.forward),
        ("attention_backward", attention.backward),
    ):
        patch.setattr(fused_recurrence, name, replaced)
    return attention


def memory_and_arguments(slots: int = SLOTS, batch: int = BATCH):
    torch.manual_seed(0)
    memory = RelationalMemory(WIDTH, slots, HEADS).double()
    tokens = torch.randn(LENGTH, batch, WIDTH, dtype=torch.float64, requires_grad=True)
    return memory, tokens, (tokens, memory.token_gates(tokens), memory.initial(tokens[0]), HEADS)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("slots, batch", [(SLOTS, BATCH), (1, 1)])
def test_fused_steps_have_the_values_and_gradients_of_the_plain_ones(monkeypatch, dropped, slots, batch):
    memory, tokens, given = memory_and_arguments(slots, batch)
    kept = None
    if dropped:
        factors = torch.ones(LENGTH, slots, slots + 1, batch, HEADS, dtype=torch.float64)
        kept = torch.nn.functional.dropout(factors, 0.4)
    attention = stand_in(monkeypatch, kept)
    fused, plain = (
        FusedRecurrence.apply(*given, 0.1, *memory.weights()),
        Recurrence.apply(*given, kept, *memory.weights()),
    )
    assert attention.calls == LENGTH
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-14)
    direction, wanted = torch.randn_like(plain), [tokens, *memory.parameters()]
    untouched = direction.clone()
    actual, expected = (torch.autograd.grad(out, wanted, direction, retain_graph=True) for out in (fused, plain))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.equal(direction, untouched), "the gradient belongs to autograd"


def test_the_open_output_gate_changes_nothing():
    for dtype in (torch.float32, torch.float64):
        assert torch.tensor(fused_recurrence.SATURATED, dtype=dtype).sigmoid() == 1


def test_projections_by_head_and_back():
    weight = torch.randn(3 * WIDTH, WIDTH)
    x = torch.randn(2, WIDTH)
    together = (x @ by_head(weight, HEADS).t()).view(2, HEADS, 3, WIDTH // HEADS)
    for part, own in zip(together.unbind(2), weight.chunk(3), strict=True):
        torch.testing.assert_close(part.flatten(1), x @ own.t())
    assert torch.equal(by_part(by_head(weight, HEADS), HEADS), weight)


def test_other_devices_precisions_and_narrow_heads_take_the_plain_steps():
    class OnGPU:
        """What a tensor of a GPU says of itself."""

        is_cuda = True

        def __init__(self, width=16, batch=3, dtype=torch.float32):
            self.shape, self.dtype = (2, batch, width), dtype

        def size(self, dim):
            return self.shape[dim]

    assert not is_possible(torch.empty(2, 3, 16), 2)
    assert is_possible(OnGPU(), 2) and not is_possible(OnGPU(width=12), 2)
    assert not is_possible(OnGPU(dtype=torch.float64), 2) and not is_possible(OnGPU(batch=2**15), 2)
