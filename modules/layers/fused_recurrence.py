"""The recurrence of R2Gen's relational memory on a GPU: the steps of relational_memory.py in half the launches.

A step works on so few numbers that it takes as long as the host needs to hand it over. Two of torch's fused kernels do
most of it. Memory-efficient attention takes the slots' attention with its dropout. The cell of an LSTM takes the gates:
with its output gate open (SATURATED), it adds what tokens and slots give to them, squashes gates and candidate, and
returns the new memory and that memory's tanh, which the next step's gates read:

    memory' = sigmoid(write) tanh(candidate) + sigmoid(keep) memory,    squashed' = sigmoid(SATURATED) tanh(memory')

Shapes: B rows (studies), T tokens, s slots, d = d_model, h heads of width w. Slots come first: (s, B, d), or as a
matrix (s*B, d). A cell's blocks of columns are write, keep, candidate and output, (s*B, 4d).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
SATURATED = 40.0  # sigmoid(40) is 1 in float32 and float64
MOST_HEADS = 65535  # blocks along the second axis of a CUDA grid; B*h of them are needed

cell = aten._thnn_fused_lstm_cell
cell_backward = aten._thnn_fused_lstm_cell_backward_impl
attention = aten._scaled_dot_product_efficient_attention
attention_backward = aten._scaled_dot_product_efficient_attention_backward


def is_possible(tokens: Tensor, num_heads: int) -> bool:
    """Whether the fused kernels take ``tokens`` (T, B, d): float32 on a GPU, and heads of whole groups of 16 bytes."""
    fits = tokens.size(-1) // num_heads % 4 == 0 and tokens.size(1) * num_heads <= MOST_HEADS
    return tokens.is_cuda and tokens.dtype == torch.float32 and fits


class Step(NamedTuple):
    """What a step leaves for its backward pass, besides its row of what is allocated for all steps."""

    attended: Tensor  # (s*B, d)
    sums: Tensor  # the attention's: log-sum-exp of the scores, seed and offset of its dropout
    seed: Tensor
    offset: Tensor
    hidden: Tensor  # (s*B, d) of the MLP, after its ReLU
    memory: Tensor  # (s*B, d) after the step
    squashed: Tensor  # (s*B, d) tanh of it
    gates: Tensor  # (s*B, 4d) after sigmoid and tanh


class FusedRecurrence(torch.autograd.Function):
    """``Recurrence`` of relational_memory.py, which draws its dropout itself."""

    @staticmethod
    def forward(ctx, tokens, token_gates, memory, num_heads, dropout, *weights) -> Tensor:
        """The memory after each token, (B, T, s*d).

        ``tokens`` (T, B, d), ``token_gates`` (T, B, 2d) and ``memory`` (s, B, d) as for ``run``; ``weights`` are
        ``Weights``.
        """
        (length, batch, width), slots = tokens.shape, len(memory)
        (qkv_weight, output, mlp_in, mlp_out, of_gates), biases = weights[:5], weights[5:]
        qkv_weight, qkv_bias = by_head(qkv_weight, num_heads), by_head(biases[0], num_heads)
        qkv = tokens.new_empty(length, slots + 1, batch * num_heads, 3, width // num_heads)
        qkv.view(length, slots + 1, batch, -1)[:, slots] = torch.nn.functional.linear(tokens, qkv_weight, qkv_bias)
        # The cell adds two halves. To begin with, both hold what is known before the steps.
        known, made = (tokens.new_empty(length, slots * batch, 4 * width) for _ in range(2))
        known.view(length, slots, batch, -1)[..., : 2 * width] = token_gates.unsqueeze(1)
        known[..., 2 * width : 3 * width], made[..., 2 * width : 3 * width] = biases[1], biases[3]
        known[..., 3 * width :], made[..., 3 * width :] = SATURATED, 0
        first = memory.reshape(-1, width)
        state, squashed, steps = first, first.tanh(), []
        for t in range(length):
            torch.addmm(qkv_bias, state, qkv_weight.t(), out=qkv[t, :slots].view(len(state), -1))
            attended, sums, seed, offset = attention(*queries_keys_values(qkv[t]), None, True, dropout)
            attended = attended.transpose(1, 2).reshape(-1, width)
            updated, second = (half[t, :, 2 * width : 3 * width] for half in (known, made))
            updated.addmm_(attended, output.t()).add_(state)
            hidden = torch._addmm_activation(biases[2], updated, mlp_in.t())
            second.addmm_(hidden, mlp_out.t()).relu_()
            torch.mm(squashed, of_gates.t(), out=made[t, :, : 2 * width])
            squashed, state, gates = cell(known[t], made[t], state)
            steps.append(Step(attended, sums, seed, offset, hidden, state, squashed, gates))
        ctx.save_for_backward(
            tokens, first, qkv, known, made, qkv_weight, *weights[1:5], *(x for s in steps for x in s)
        )
        ctx.sizes = slots, num_heads, dropout
        return torch.stack([s.memory for s in steps]).view(length, slots, batch, width).permute(2, 0, 1, 3).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """``grad`` (B, T, s*d)."""
        slots, num_heads, dropout = ctx.sizes
        tokens, first, qkv, known, made, *saved = ctx.saved_tensors
        weights, rest = saved[:5], iter(saved[5:])
        steps = [Step(*values) for values in zip(*[rest] * len(Step._fields), strict=True)]
        _, output, mlp_in, mlp_out, of_gates = weights
        length, batch, width = tokens.shape
        grad = grad.unflatten(-1, (slots, width)).permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)
        grad = grad.view(length, -1, width)
        # Gradients of what each product gave, for the products with the weights' inputs after the loop.
        found = []
        d_squashed = None
        for t in range(length - 1, -1, -1):
            step, before = steps[t], steps[t - 1].memory if t else first
            d_gates, d_kept, _ = cell_backward(d_squashed, grad[t], before, step.memory, step.gates, False)
            d_new = d_gates[:, 2 * width : 3 * width]
            d_out = aten.threshold_backward(d_new, made[t, :, 2 * width : 3 * width], 0)
            d_hidden = aten.threshold_backward(d_out @ mlp_out, step.hidden, 0)
            d_updated = d_new.addmm_(d_hidden, mlp_in)
            d_attended = (d_updated @ output).view(slots, -1, width // num_heads)
            d_qkv, d_token = attend_backward(d_attended, qkv[t], step, dropout)
            found.append((d_gates, d_out, d_hidden, d_qkv, *d_token))
            if t:
                grad[t - 1].addmm_(d_qkv.view(-1, 3 * width), weights[0]).add_(d_kept).add_(d_updated)
                d_squashed = d_gates[:, : 2 * width] @ of_gates
        d_gates, d_out, d_hidden, d_qkv, *d_token = (torch.stack(parts[::-1]) for parts in zip(*found, strict=True))
        d_token = torch.stack(d_token, dim=-2)  # (T, B*h, 2, w): keys and values
        inputs = Inputs(tokens, first, known[..., 2 * width : 3 * width], steps)
        own = d_gates[..., : 2 * width], d_gates[..., 2 * width : 3 * width], d_hidden, d_out, d_qkv, d_token
        return gradients(*own, inputs=inputs, qkv_weight=weights[0], num_heads=num_heads)


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """Rows of queries, keys and values (3d, ...) as those of every head, (h, 3, w) of them.

    In this order, queries (s, B*h, w) keep one distance between the heads of all studies, and attention, to which they
    are one study, copies nothing.
    """
    return x.unflatten(0, (3, num_heads, -1)).transpose(0, 1).reshape(x.shape)


def by_part(x: Tensor, num_heads: int) -> Tensor:
    """The opposite of ``by_head``, (3d, ...) -> (3d, ...)."""
    return x.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).reshape(x.shape)


def queries_keys_values(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of one study with B*h heads, (1, B*h, s or s+1, w), in ``qkv`` (s+1, B*h, 3, w); the token has no query."""
    query, key, value = qkv.permute(2, 1, 0, 3).unsqueeze(1)
    return query[:, :, :-1], key, value


def attend_backward(grad: Tensor, qkv: Tensor, step: Step, dropout: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gradients of the slots' queries, keys and values (s, B*h, 3, w), and of the token's key and value (B*h, w).

    ``grad`` (s, B*h, w) is that of what was attended to.
    """
    attended = step.attended.view_as(grad)
    found = attention_backward(
        *(grad.transpose(0, 1).unsqueeze(0), *queries_keys_values(qkv), None, attended.transpose(0, 1).unsqueeze(0)),
        *(step.sums, step.seed, step.offset, dropout, [True, True, True, False]),
    )
    slots = len(grad)
    query, key, value = (x[0].transpose(0, 1) for x in found[:3])
    return torch.stack((query, key[:slots], value[:slots]), dim=-2), (key[slots], value[slots])


class Inputs(NamedTuple):
    """What the weights were multiplied with."""

    tokens: Tensor  # (T, B, d)
    first: Tensor  # (s*B, d) memory before the first step
    updated: Tensor  # (T, s*B, d) memory + attention
    steps: list[Step]


def gradients(
    d_gates: Tensor,
    d_updated: Tensor,
    d_hidden: Tensor,
    d_out: Tensor,
    d_qkv: Tensor,
    d_token: Tensor,
    *,
    inputs: Inputs,
    qkv_weight: Tensor,
    num_heads: int,
) -> tuple[Any, ...]:
    """Those of ``FusedRecurrence``'s arguments, from the gradients of what each product gave in all steps.

    ``d_gates`` (T, s*B, 2d); ``d_qkv`` (T, s, B*h, 3, w), ``d_token`` (T, B*h, 2, w); the others (T, s*B, d).
    """
    tokens, first, updated, steps = inputs
    (length, batch, width), rows = tokens.shape, len(first)
    states = torch.stack([first, *(step.memory for step in steps[:-1])])
    squashed = torch.stack([first.tanh(), *(step.squashed for step in steps[:-1])])
    attended, hidden = torch.stack([step.attended for step in steps]), torch.stack([step.hidden for step in steps])
    seen = [states, attended, updated, hidden, squashed]
    given = [d_qkv.reshape(length, rows, -1), d_updated, d_hidden, d_out, d_gates]
    d_weights = [x.flatten(0, 1).t() @ y.flatten(0, 1) for x, y in zip(given, seen, strict=True)]
    d_biases = [x.sum((0, 1)) for x in given[:-1]]
    # The token has a key and a value in every head.
    d_token = d_token.view(length * batch, -1)
    d_tokens = d_token @ qkv_weight.view(num_heads, 3, -1, width)[:, 1:].reshape(-1, width)
    for whole, part in ((d_weights[0], d_token.t() @ tokens.reshape(-1, width)), (d_biases[0], d_token.sum(0))):
        whole = whole.view(num_heads, 3, width // num_heads, -1)
        whole[:, 1:] += part.view(num_heads, 2, width // num_heads, -1)
    d_weights[0], d_biases[0] = by_part(d_weights[0], num_heads), by_part(d_biases[0], num_heads)
    d_token_gates = d_gates.view(length, -1, batch, 2 * width).sum(1)
    return d_tokens.view_as(tokens), d_token_gates, None, None, None, *d_weights, *d_biases
