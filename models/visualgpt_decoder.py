"""VisualGPT's decoder: GPT-2 whose every layer looks at all levels of the encoder through gated cross-attention.

Shapes: B studies, T decoder inputs (or hypotheses), L encoder levels, N visual tokens, D = d_model, h heads of width
w. Masks are boolean, True = may be attended to. The published masks put -10000 in place of a score, which float32's
softmax turns into exactly 0, as it does -inf.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.layers.transformer import TorchLayerNorm, split_heads

CROSS_ATTENTION_DROPOUT = 0.2


class Conv1D(nn.Module):
    """GPT-2's linear layer: y = x W + b with W (in, out)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(in_features, out_features), std=0.02))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.t(), self.bias)


def causal_buffer(context: int) -> Tensor:
    """(1, 1, context, context): a constant in the published files, unused here."""
    return torch.ones(context, context).tril()[None, None]


class SelfAttention(nn.Module):
    """GPT-2's attention; queries, keys and values come from one layer."""

    def __init__(self, d_model: int, num_heads: int, context: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.register_buffer("bias", causal_buffer(context))
        for name in ("running_keys", "running_values"):  # the published code's decoding state, empty when saved
            self.register_buffer(name, torch.empty(num_heads, 0, d_model // num_heads))
        self.c_attn = Conv1D(d_model, 3 * d_model)
        self.c_proj = Conv1D(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        """``x`` (B, T, D) -> (B, T, D); the keys and values of ``x`` are added to the past ones in ``cache``."""
        query, keys, values = (split_heads(part, self.num_heads) for part in self.c_attn(x).chunk(3, dim=-1))
        if cache is not None:
            keys, values = cache.append(keys, values)
        p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=p)
        return self.c_proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to every level of the encoder by one set of weights."""

    def __init__(self, d_model: int, num_heads: int, context: int):
        super().__init__()
        self.num_heads = num_heads
        self.register_buffer("bias", causal_buffer(context))
        self.c_attn = Conv1D(d_model, 3 * d_model).requires_grad_(False)  # in the published files, never called
        self.c_proj = Conv1D(d_model, d_model)
        self.fc_q, self.fc_k, self.fc_v = (nn.Linear(d_model, d_model) for _ in range(3))
        for linear in (self.fc_q, self.fc_k, self.fc_v):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def keys_values(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L * h, N, w) of ``levels`` (B, L, N, D): the levels are further heads."""
        batch, num_levels = levels.shape[:2]
        keys, values = (split_heads(linear(levels.flatten(0, 1)), self.num_heads) for linear in (self.fc_k, self.fc_v))
        shape = (batch, num_levels * self.num_heads)
        return keys.reshape(*shape, *keys.shape[2:]), values.reshape(*shape, *values.shape[2:])

    def queries(self, x: Tensor, num_heads: int) -> Tensor:
        """(B, T, D) -> (B, L * h, T, w), the same for every level."""
        return split_heads(self.fc_q(x), self.num_heads).repeat(1, num_heads // self.num_heads, 1, 1)

    def weights(self, x: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """The attention weights (B, L * h, T, N) behind ``forward`` of the same arguments, without dropout."""
        scores = self.queries(x, keys.size(1)) @ keys.transpose(-2, -1) / math.sqrt(keys.size(-1))
        return (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(-1)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
        """``x`` (B, T, D) -> what it finds at each level, (B, L, T, D)."""
        query = self.queries(x, keys.size(1))
        p = CROSS_ATTENTION_DROPOUT if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=keep, dropout_p=p)
        by_level = attended.unflatten(1, (-1, self.num_heads))  # (B, L, h, T, w)
        return self.c_proj(by_level.transpose(2, 3).flatten(3))


class Mlp(nn.Module):
    """c_proj(gelu(c_fc x))."""

    def __init__(self, d_model: int):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(d_model, 4 * d_model), Conv1D(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def resurrecting_gates(alpha: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Weights of language and vision, alpha and 1 - alpha, each 0 where it does not exceed ``tau`` (Sec. 3.2).

    ``alpha`` (..., D) -> (..., D) each. A gate at zero recovers through the other one, which still has a gradient.
    """
    return torch.where(alpha > tau, alpha, 0.0), torch.where(alpha < 1 - tau, 1 - alpha, 0.0)


class Block(nn.Module):
    """One layer; its first norm serves self-attention, the query of cross-attention and the encoder's levels."""

    def __init__(self, d_model: int, num_heads: int, num_levels: int, context: int, dropout: float, tau: float):
        super().__init__()
        self.ln_1 = TorchLayerNorm(d_model)
        self.attn = SelfAttention(d_model, num_heads, context, dropout)
        self.enc_dec_attn = CrossAttention(d_model, num_heads, context)
        self.ln_2 = TorchLayerNorm(d_model)
        self.mlp = Mlp(d_model)
        self.num_levels, self.dropout, self.tau = num_levels, dropout, tau
        for level in range(1, num_levels + 1):
            self.add_module(f"fc_alpha{level}", nn.Linear(2 * d_model, d_model))

    def keys_values(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L * h, N, w) of the encoder's ``levels`` (B, L, N, D), once per study."""
        return self.enc_dec_attn.keys_values(self.ln_1(levels))

    def forward(
        self,
        x: Tensor,
        source: tuple[Tensor, Tensor],
        mask: Tensor | None,
        source_mask: Tensor | None,
        real: Tensor | None,
        cache=None,
    ) -> Tensor:
        """``x`` (B, T, D) -> (B, T, D); ``real`` (B, T, 1) is 0 at padding, whose output is 0; None: no padding."""
        a = F.dropout(x + self.attn(self.ln_1(x), mask, cache), self.dropout, self.training)
        found = self.enc_dec_attn(self.ln_1(a), *source, source_mask)
        total = torch.zeros_like(a)
        for level, seen in enumerate(found.unbind(1), start=1):
            alpha = getattr(self, f"fc_alpha{level}")(torch.cat([a, seen.to(a.dtype)], dim=-1)).sigmoid()
            language, vision = resurrecting_gates(alpha, self.tau)
            total = total + language * a + vision * seen
        a = total / math.sqrt(self.num_levels)
        a = a if real is None else a * real
        y = F.dropout(a + self.mlp(self.ln_2(a)), self.dropout, self.training)
        return y if real is None else y * real


class Transformer(nn.Module):
    """Token and position embeddings, the layers, a final norm."""

    def __init__(self, num_ids: int, num_positions: int, num_layers: int, d_model: int, **block: Any):
        super().__init__()
        self.register_buffer("running_seq", torch.zeros(1, dtype=torch.int64))
        self.wte = nn.Embedding(num_ids, d_model)
        self.wpe = nn.Embedding(num_positions, d_model)
        self.h: Any = nn.ModuleList(Block(d_model, **block) for _ in range(num_layers))
        self.ln_f = TorchLayerNorm(d_model)

    def sources(self, levels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values of the encoder's levels (B, L, N, D)."""
        return [block.keys_values(levels) for block in self.h]

    def forward(
        self,
        ids: Tensor,
        position: int | Tensor | None,
        sources: list,
        mask: Tensor | None,
        source_mask: Tensor | None,
        real: Tensor | None = None,
        caches: list | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) of ``ids`` (B, T) at positions 0..T-1, or all at ``position``, as hypotheses are."""
        if isinstance(position, Tensor):  # (1,)
            table = self.wpe.weight.index_select(0, position)
        else:
            table = self.wpe.weight[: ids.size(1)] if position is None else self.wpe.weight[position]
        x = self.wte(ids) + table
        for number, block in enumerate(self.h):
            x = block(x, sources[number], mask, source_mask, real, caches[number] if caches is not None else None)
        return self.ln_f(x)


class TiedHead(nn.Module):
    """Logits by the rows of the token embedding, which published files also store under this name."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.decoder = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        self.decoder.weight = embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self.decoder(hidden)


class LanguageModel(nn.Module):
    """The decoder under its published names."""

    def __init__(self, num_ids: int, **transformer: Any):
        super().__init__()
        self.register_buffer("running_mask_self_attention", torch.zeros(1, 1, 0, dtype=torch.bool))
        self.transformer = Transformer(num_ids, **transformer)
        self.lm_head = TiedHead(self.transformer.wte)
