"""R2Gen's relational memory: slots that attend to themselves and to the newest token, then change through gates.

Chen et al., EMNLP 2020 (arXiv 2010.16056).

Shapes: B rows (studies, or their hypotheses), T tokens, s slots, d = d_model, h heads of width w. Inside the recurrence
slots come first, (s, B, d): the slots of all rows are one matrix, followed by the token's row.

The loop over tokens is sequential, so everything that can be computed outside it is: what depends on tokens alone is
one product for all of them. The backward loop carries only the memory's gradient, and each weight's gradient is one
product over all T * s * B rows after it. Autograd would accumulate it step by step: forward and backward took 0.60 s
instead of 0.39 s for B = 16, T = 59, s = 3, d = 512 on one core (benchmarks/r2gen_step.py). On a GPU, training
takes the same steps by fused_recurrence.py, where its kernels pass a check.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.layers.device_check import DeviceCheck, Difference, difference, seed
from modules.layers.fused_recurrence import FusedRecurrence, is_possible

aten = torch.ops.aten


class Weights(NamedTuple):
    """The weights of a step; queries, keys and values are one product."""

    qkv: Tensor  # (3d, d)
    output: Tensor  # (d, d)
    mlp_in: Tensor  # (d, d)
    mlp_out: Tensor  # (d, d)
    gates: Tensor  # (2d, d)
    qkv_bias: Tensor  # (3d,)
    output_bias: Tensor  # (d,)
    mlp_in_bias: Tensor  # (d,)
    mlp_out_bias: Tensor  # (d,)

    def transposed(self) -> "Weights":
        """The matrices as contiguous (in, out): a step has few rows, and its products are a third faster with them."""
        return Weights(*(x.t().contiguous() if x.dim() == 2 else x for x in self))


class Trace(NamedTuple):
    """What the steps computed; the leading dimension is time."""

    states: Tensor  # (T+1, s+1, B, d): memory before the step, then the token
    qkv: Tensor  # (T, s+1, B, 3d); the token has no query
    probs: Tensor  # (T, s, s+1, B, h) before dropout
    attended: Tensor  # (T, s*B, d)
    updated: Tensor  # (T, s*B, d) memory + attention
    mlp_hidden: Tensor  # (T, s*B, d) after its ReLU
    mlp_out: Tensor  # (T, s*B, d) after its ReLU
    squashed: Tensor  # (T, s*B, d) tanh of memory before the step
    candidate: Tensor  # (T, s*B, d) tanh of the new content
    gates: Tensor  # (T, s*B, 2d) input gate, forget gate

    @staticmethod
    def allocate(tokens: Tensor, slots: int, num_heads: int) -> "Trace":
        """Uninitialised tensors for the steps over ``tokens`` (T, B, d)."""
        length, batch, width = tokens.shape

        def new(*shape: int) -> Tensor:
            return tokens.new_empty(length, *shape)

        return Trace(
            tokens.new_empty(length + 1, slots + 1, batch, width),
            new(slots + 1, batch, 3 * width),
            new(slots, slots + 1, batch, num_heads),
            attended=new(slots * batch, width),
            updated=new(slots * batch, width),
            mlp_hidden=new(slots * batch, width),
            mlp_out=new(slots * batch, width),
            squashed=new(slots * batch, width),
            candidate=new(slots * batch, width),
            gates=new(slots * batch, 2 * width),
        )


def run(
    weights: Weights, tokens: Tensor, token_gates: Tensor, memory: Tensor, num_heads: int, kept: Tensor | None = None
) -> Trace:
    """Update ``memory`` (s, B, d) with ``tokens`` (T, B, d) one after the other; ``weights`` are transposed.

    ``token_gates`` (T, B, 2d) are the tokens' share of the gates, ``kept`` (T, s, s+1, B, h) the dropout of the
    attention as factors.
    """
    slots, batch, width = memory.shape
    rows = slots * batch
    trace = Trace.allocate(tokens, slots, num_heads)
    trace.states[:-1, slots] = tokens
    trace.states[0, :slots] = memory
    trace.qkv[:, slots, :, width:] = tokens @ weights.qkv[:, width:] + weights.qkv_bias[width:]
    for t in range(len(tokens)):
        _, qkv, _, attended, updated, hidden, mlp_out, squashed, candidate, gates = (x[t] for x in trace)
        memory = trace.states[t, :slots].view(rows, width)
        torch.addmm(weights.qkv_bias, memory, weights.qkv, out=qkv[:slots].view(rows, -1))
        attend(trace, t, kept)
        torch.addmm(weights.output_bias, attended, weights.output, out=updated).add_(memory)
        torch.addmm(weights.mlp_in_bias, updated, weights.mlp_in, out=hidden).relu_()
        torch.addmm(weights.mlp_out_bias, hidden, weights.mlp_out, out=mlp_out).relu_()
        torch.add(updated, mlp_out, out=candidate).tanh_()
        torch.tanh(memory, out=squashed)
        torch.mm(squashed, weights.gates, out=gates)
        gates.view(slots, batch, -1).add_(token_gates[t])
        write, keep = gates.sigmoid_().chunk(2, dim=-1)
        torch.addcmul(write * candidate, keep, memory, out=trace.states[t + 1, :slots].view(rows, width))
    return trace


def attend(trace: Trace, t: int, kept: Tensor | None) -> None:
    """Fill ``probs`` (s, s+1, B, h) and ``attended`` (s*B, d) of step ``t``: slots attend to all slots and the token.

    With so few keys, products and sums are as fast as batched matrix products, and take any layout.
    ``kept`` (T, s, s+1, B, h) or None is the dropout as factors.
    """
    probs = trace.probs[t]
    slots, _, batch, heads = probs.shape
    q, k, v = trace.qkv[t].view(slots + 1, batch, 3, heads, -1).unbind(2)  # (s+1, B, h, w) each
    scores = (q[:slots].unsqueeze(1) * k).sum(-1).mul_(k.size(-1) ** -0.5)
    torch.softmax(scores, dim=1, out=probs)
    dropped = probs if kept is None else probs * kept[t]
    torch.sum(dropped.unsqueeze(-1) * v, dim=1, out=trace.attended[t].view(slots, batch, heads, -1))


def memories(trace: Trace) -> Tensor:
    """The memory after each token, (B, T, s*d)."""
    return trace.states[1:, :-1].permute(2, 0, 1, 3).flatten(2)


class Recurrence(torch.autograd.Function):
    """``run`` with a backward pass."""

    @staticmethod
    def forward(ctx, tokens, token_gates, memory, num_heads, kept, *weights) -> Tensor:
        """The memory after each token, (B, T, s*d); arguments as for ``run``."""
        trace = run(Weights(*weights).transposed(), tokens, token_gates, memory, num_heads, kept)
        ctx.save_for_backward(kept, *weights, *trace)
        return memories(trace)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """``grad`` (B, T, s*d)."""
        kept, *saved = ctx.saved_tensors
        count = len(Weights._fields)
        d_tokens, d_token_gates, *d_weights = gradients(grad, kept, saved[:count], saved[count:])
        return d_tokens, d_token_gates, None, None, None, *d_weights


def gradients(grad: Tensor, kept: Tensor | None, weights: list[Tensor], trace: list[Tensor]) -> list[Tensor]:
    """Those of ``run``'s tokens, token_gates and weights, in this order; ``grad`` (B, T, s*d) is that of memories."""
    return _gradients(grad, kept, Weights(*weights), Trace(*trace))


def _gradients(grad: Tensor, kept: Tensor | None, weights: Weights, trace: Trace) -> list[Tensor]:
    length, rows, width = trace.updated.shape
    slots = trace.probs.size(1)
    grad = grad.unflatten(-1, (slots, width)).permute(1, 2, 0, 3).reshape(length, rows, width)
    # Gradients of what each product gave, for the products with the weights' inputs after the loop.
    d_qkv, d_output, d_in, d_out, d_gates = (
        torch.empty_like(x) for x in (trace.qkv, trace.updated, trace.updated, trace.updated, trace.gates)
    )
    d_qkv[:, slots, :, :width] = 0
    carried = torch.zeros_like(grad[0])
    for t in range(length - 1, -1, -1):
        d_memory = grad[t] + carried
        memory = trace.states[t, :slots].view(rows, width)
        write, keep = trace.gates[t].chunk(2, dim=-1)
        torch.mul(d_memory, trace.candidate[t], out=d_gates[t, :, :width])
        torch.mul(d_memory, memory, out=d_gates[t, :, width:])
        aten.sigmoid_backward(d_gates[t], trace.gates[t], grad_input=d_gates[t])
        d_new = aten.tanh_backward(d_memory * write, trace.candidate[t])
        aten.threshold_backward(d_new, trace.mlp_out[t], 0, grad_input=d_out[t])
        torch.mm(d_out[t], weights.mlp_out, out=d_in[t])
        aten.threshold_backward(d_in[t], trace.mlp_hidden[t], 0, grad_input=d_in[t])
        torch.addmm(d_new, d_in[t], weights.mlp_in, out=d_output[t])
        attend_backward(d_output[t] @ weights.output, trace, t, kept, d_qkv[t])
        carried = aten.tanh_backward(d_gates[t] @ weights.gates, trace.squashed[t])
        carried.add_(d_output[t]).addcmul_(d_memory, keep)
        carried.addmm_(d_qkv[t, :slots].view(rows, -1), weights.qkv)
    d_tokens = d_qkv[:, slots, :, width:] @ weights.qkv[width:]
    d_token_gates = d_gates.view(length, slots, -1, 2 * width).sum(dim=1)
    inputs = (trace.states[:-1], trace.attended, trace.updated, trace.mlp_hidden, trace.squashed)
    given = [x.view(-1, x.size(-1)) for x in (d_qkv, d_output, d_in, d_out, d_gates)]
    d_weights = [x.t() @ seen.view(-1, width) for x, seen in zip(given, inputs, strict=True)]
    return [d_tokens, d_token_gates, *d_weights, *(x.sum(dim=0) for x in given[:-1])]


def attend_backward(grad: Tensor, trace: Trace, t: int, kept: Tensor | None, d_qkv: Tensor) -> None:
    """Write the gradients of step ``t``'s queries, keys and values into ``d_qkv`` (s+1, B, 3d).

    ``grad`` (s*B, d) is the gradient of ``attended``; ``kept`` as in ``attend``.
    """
    probs = trace.probs[t]
    slots, _, batch, heads = probs.shape
    q, k, v = trace.qkv[t].view(slots + 1, batch, 3, heads, -1).unbind(2)
    d_q, d_k, d_v = d_qkv.view(slots + 1, batch, 3, heads, -1).unbind(2)
    grad = grad.view(slots, 1, batch, heads, -1)
    dropped = probs if kept is None else probs * kept[t]
    torch.sum(dropped.unsqueeze(-1) * grad, dim=0, out=d_v)
    d_probs = (grad * v).sum(-1)
    weighted = d_probs * dropped
    d_scores = (weighted - probs * weighted.sum(dim=1, keepdim=True)).mul_(k.size(-1) ** -0.5).unsqueeze(-1)
    torch.sum(d_scores * k, dim=1, out=d_q[:slots])
    torch.sum(d_scores * q[:slots].unsqueeze(1), dim=0, out=d_k)


# For a compiler the loop over tokens is one operation: unrolled, 20 tokens took 214 s to compile, for each length.


@torch.library.custom_op("ithn::relational_memory", mutates_args=())
def _recurrence(
    tokens: Tensor, token_gates: Tensor, memory: Tensor, num_heads: int, kept: Tensor | None, weights: list[Tensor]
) -> list[Tensor]:
    trace = run(Weights(*weights).transposed(), tokens, token_gates, memory, num_heads, kept)
    return [memories(trace).clone(), *trace]


@_recurrence.register_fake
def _(tokens, token_gates, memory, num_heads, kept, weights):
    (length, batch, _), (slots, _, width) = tokens.shape, memory.shape
    return [tokens.new_empty(batch, length, slots * width), *Trace.allocate(tokens, slots, num_heads)]


_recurrence_backward = torch.library.custom_op("ithn::relational_memory_backward", gradients, mutates_args=())


@_recurrence_backward.register_fake
def _(grad, kept, weights, trace):
    tokens, gates = trace[0][:-1, 0], trace[-1]
    d_token_gates = gates.new_empty(*tokens.shape[:2], gates.shape[-1])
    return [torch.empty_like(tokens), d_token_gates, *map(torch.empty_like, weights)]


def _keep(ctx, inputs, output) -> None:
    *_, kept, weights = inputs
    ctx.save_for_backward(kept, *weights, *output[1:])


def _recurrence_gradients(ctx, grads):
    kept, *saved = ctx.saved_tensors
    count = len(Weights._fields)
    d_tokens, d_token_gates, *d_weights = _recurrence_backward(grads[0], kept, saved[:count], saved[count:])
    return d_tokens, d_token_gates, None, None, None, d_weights


_recurrence.register_autograd(_recurrence_gradients, setup_context=_keep)


def _differences(device: torch.device, slots: int, num_heads: int, width: int) -> Iterator[Difference]:
    """Of ``FusedRecurrence`` from ``Recurrence``; with dropout, of its gradient from its own values' differences."""
    draw, length, batch = torch.Generator().manual_seed(0), 3, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    tokens, memory = normal(length, batch, width), normal(slots, batch, width)
    direction = normal(batch, length, slots * width)
    qkv, output, gates = (normal(rows * width, width) * width**-0.5 for rows in (3, 1, 2))
    # Sums before a ReLU stay away from 0, where rounding would decide about a gradient.
    mlp_in, mlp_out = (normal(width, width) * 0.05 * width**-0.5 for _ in range(2))
    biases = normal(3 * width), normal(width), normal(width).sign(), normal(width).sign()
    given = tokens, normal(length, batch, 2 * width), *Weights(qkv, output, mlp_in, mlp_out, gates, *biases)
    for x in given:
        x.requires_grad_()

    def fused(tokens: Tensor, dropout: float) -> Tensor:
        seed(device)
        return FusedRecurrence.apply(tokens, given[1], memory, num_heads, dropout, *given[2:])

    def found(values: Tensor) -> list[Tensor]:
        return [values.detach(), *torch.autograd.grad(values, given, direction)]

    plain = Recurrence.apply(*given[:2], memory, num_heads, None, *given[2:])
    yield difference(found(fused(tokens, 0.0)), found(plain), 1e-3)
    # Tokens come in through the attention alone, so that their gradient depends on what is dropped.
    (grad,) = torch.autograd.grad(fused(tokens, 0.5), tokens, direction)
    with torch.no_grad():
        ahead, behind = (fused(tokens + sign * 0.1 * grad / grad.norm(), 0.5) for sign in (1, -1))
    slope = ((ahead - behind) * direction).sum() / 0.2
    yield difference([grad.norm()], [slope], 2e-2)


KERNELS = DeviceCheck("R2Gen's relational memory", _differences)


class SlotAttention(nn.Module):
    """``linears`` 0..3 = query, key, value, output."""

    def __init__(self, d_model: int):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))


class RelationalMemory(nn.Module):
    """Memory of ``num_slots`` slots of width ``d_model``; in training its attention has dropout, as published.

    ValueError where the heads do not divide the width.
    """

    leaves_autocast = True  # a state that is updated sixty times stays in float32

    def __init__(self, d_model: int, num_slots: int, num_heads: int, dropout: float = 0.1):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"rm_num_heads {num_heads}: must divide rm_d_model {d_model}")
        self.num_slots = num_slots
        self.num_heads = num_heads
        self.dropout = dropout
        self.attn = SlotAttention(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model), nn.ReLU())
        self.W = nn.Linear(d_model, 2 * d_model)
        self.U = nn.Linear(d_model, 2 * d_model)

    def weights(self) -> Weights:
        """The step's weights; the gates' bias is part of ``token_gates``."""
        linears: Any = (*self.attn.linears, *self.mlp)
        query, key, value, output, first, _, second, _ = linears
        return Weights(
            torch.cat([query.weight, key.weight, value.weight]),
            output.weight,
            first.weight,
            second.weight,
            self.U.weight,
            torch.cat([query.bias, key.bias, value.bias]),
            output.bias,
            first.bias,
            second.bias,
        )

    def initial(self, like: Tensor) -> Tensor:
        """(s, B, d) for the B rows of ``like`` (B, ...): the rows of an identity matrix."""
        slots = torch.eye(self.num_slots, self.U.in_features, dtype=self.U.weight.dtype, device=like.device)
        return slots.unsqueeze(1).expand(-1, like.size(0), -1)

    def token_gates(self, tokens: Tensor) -> Tensor:
        """The tokens' share of the gates, (..., 2d) of ``tokens`` (..., d), with all of the gates' bias."""
        return F.linear(tokens, self.W.weight, self.W.bias + self.U.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The memory (B, T, s*d) after each of the tokens ``x`` (B, T, d), starting from the initial one."""
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.transpose(0, 1).to(self.U.weight.dtype)
            dropout = self.dropout if self.training else 0.0
            known = tokens, self.token_gates(tokens), self.initial(x), self.num_heads
            if not torch.compiler.is_compiling() and self._may_fuse(tokens):
                return FusedRecurrence.apply(*known, dropout, *self.weights())
            kept = None
            if dropout:
                slots = self.num_slots
                kept = tokens.new_ones(len(tokens), slots, slots + 1, len(x), self.num_heads)
                kept = F.dropout(kept, dropout)
            given = *known, kept
            if torch.compiler.is_dynamo_compiling():
                return _recurrence(*given, list(self.weights()))[0]
            return Recurrence.apply(*given, *self.weights())

    def _may_fuse(self, tokens: Tensor) -> bool:
        sizes = self.num_slots, self.num_heads, tokens.size(-1)
        return is_possible(tokens, self.num_heads) and KERNELS.passes(tokens.device, *sizes)

    def step(self, x: Tensor, memory: Tensor | None, weights: Weights) -> Tensor:
        """The memory (B, s*d) after one token ``x`` (B, d) each, without a gradient.

        ``memory`` (B, s*d) is the one before, None the initial one. ``weights`` are ``weights().transposed()``, made
        once for all steps.
        """
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(self.U.weight.dtype).unsqueeze(0)
            if memory is None:
                state = self.initial(x)
            else:
                state = memory.unflatten(-1, (self.num_slots, -1)).transpose(0, 1)
            trace = run(weights, tokens, self.token_gates(tokens), state, self.num_heads)
            return memories(trace)[:, 0]
