"""Parts of the R2Gen family's transformer: norms, attention, feed-forward, layers, embeddings, positions.

Shapes: B studies, T query positions, S key positions (visual tokens of all views), C visual width, d = d_model, h heads
of width w = d/h.
Masks are boolean, True = may be attended to.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_DROPOUT = 0.1  # fixed in the published codes, independent of --dropout


class _Normalise(torch.autograd.Function):
    """``normalise`` by torch's fused layer-norm kernels, in a sixth of the plain expression's time.

    They divide by the biased standard deviation s, where this norm divides by c s + eps, c^2 = n / (n - 1): what is
    left to do is a factor per row, 1 / (c + eps / s).
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        """``x`` (..., d), ``scale`` and ``shift`` (d,) -> (..., d)."""
        n = x.size(-1)
        # The kernel's own tiny eps only keeps rows without variance finite.
        scaled, mean, inverse_biased = torch.native_layer_norm(x, (n,), scale, None, 1e-30)
        divisor = torch.rsub(inverse_biased, math.sqrt(n / (n - 1)), alpha=-eps)
        ctx.save_for_backward(x, mean, inverse_biased, divisor, scale)
        if x.is_cuda:
            return torch.addcdiv(shift, scaled, divisor)
        return scaled.div_(divisor).add_(shift)  # vectorised, which addcdiv of a row and a column is not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        """``grad`` (..., d)."""
        x, mean, inverse_biased, divisor, scale = ctx.saved_tensors
        n = x.size(-1)
        grad = grad.contiguous()
        kernel = torch.ops.aten.native_layer_norm_backward
        inverse = inverse_biased / divisor  # 1 / (c s + eps)
        # With G = scale * grad and b = x - mean, the gradient in x is inverse (G - mean G) - inverse^2 b sum(G b) c /
        # (n s). The kernel computes r (G - mean G) - r^3 b sum(G b) / n: the same, times ``factor``, for this r.
        factor = divisor.mul(math.sqrt(n / (n - 1))).sqrt_()
        grad_x = kernel(grad, x, (n,), mean, inverse * factor, scale, None, [True, False, False])[0].div_(factor)
        _, grad_scale, grad_shift = kernel(grad, x, (n,), mean, inverse, scale, scale, [False, True, True])
        return grad_x, grad_scale, grad_shift, None


def normalise(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """scale * (x - mean) / (std + eps) + shift over the last dimension of ``x`` (..., d); ``scale`` and ``shift`` (d,).

    The std is unbiased and eps outside the root, as in the published codes. In float32 at least: half precision would
    lose the variance.
    """
    dtype = torch.promote_types(x.dtype, scale.dtype)
    return _Normalise.apply(x.to(dtype), scale, shift, eps)


class LayerNorm(nn.Module):
    """normalise(x) with parameters ``a_2`` and ``b_2``."""

    def __init__(self, d_model: int):
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(d_model))
        self.b_2 = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return normalise(x, self.a_2, self.b_2)


class TorchLayerNorm(nn.LayerNorm):
    """torch's layer norm, in float32 at least on CPUs too, where autocast would not see to it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class Residual(nn.Module):
    """x + dropout(sublayer(norm(x))); further arguments go to the norm (R2Gen's is conditional)."""

    def __init__(self, norm: nn.Module, dropout: float):
        super().__init__()
        self.norm = norm
        self.dropout = dropout

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor], *condition: Tensor) -> Tensor:
        """``x`` (B, T, d) -> (B, T, d); ``condition`` (B, T, m)."""
        normed = as_autocast(self.norm(x, *condition))
        return x + F.dropout(sublayer(normed), self.dropout, self.training)


def as_autocast(x: Tensor) -> Tensor:
    """``x`` (any shape) as autocast would cast it for every product, once for several of them."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def projected(x: Tensor, linears: Sequence[Any]) -> Sequence[Tensor]:
    """What each of ``linears`` makes of ``x`` (B, T, d), (B, T, its width); on a GPU as one product."""
    if not x.is_cuda:
        return [linear(x) for linear in linears]
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, d) -> (B, h, T, d/h)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with ``linears`` 0..3 = query, key, value, output (Vaswani et al., 2017).

    ValueError where the heads do not divide the width.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = ATTENTION_DROPOUT):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model}: must be a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, h, T, d/h)."""
        return split_heads(x, self.num_heads)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, S, d/h) of ``source`` (B, S, d)."""
        keys, values = projected(source, [self.linears[1], self.linears[2]])
        return self.split_heads(keys), self.split_heads(values)

    def query_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, h, T, d/h) of ``x`` (B, T, d)."""
        keys, values, query = projected(x, [self.linears[1], self.linears[2], self.linears[0]])
        return self.split_heads(query), self.split_heads(keys), self.split_heads(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` (B, T, d) to keys and values; ``mask`` broadcasts to (B, h, T, S)."""
        return self.attend(self.split_heads(self.linears[0](x)), keys, values, mask)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """``forward`` of the queries (B, h, T, d/h)."""
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.linears[3](attended.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention weights (B, h, T, S) that ``forward`` of the same arguments uses, without dropout."""
        query = self.split_heads(self.linears[0](x))
        scores = query @ keys.transpose(-2, -1) / math.sqrt(keys.size(-1))
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


class FeedForward(nn.Module):
    """w_2(dropout(relu(w_1 x)))."""

    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.w_1 = nn.Linear(d_model, d_ff)
        self.w_2 = nn.Linear(d_ff, d_model)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.w_2(F.dropout(F.relu(self.w_1(x)), self.dropout, self.training))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, pre-norm."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float, norm=LayerNorm):
        super().__init__()
        self.self_attn = Attention(d_model, num_heads)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.sublayer = nn.ModuleList(Residual(norm(d_model), dropout) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` (B, S, d) -> (B, S, d); ``mask`` (B, 1, 1, S) or None."""
        x = self.sublayer[0](x, lambda y: self.self_attn.attend(*self.self_attn.query_keys_values(y), mask))
        return self.sublayer[1](x, self.feed_forward)


class Encoder(nn.Module):
    """``num_layers`` encoder layers and a final norm; ``mask`` (B, 1, 1, S) or None."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, num_layers: int, dropout: float, norm=LayerNorm):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout, norm) for _ in range(num_layers))
        self.norm = norm(d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` (B, S, d) -> (B, S, d)."""
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the encoder's output, feed-forward, pre-norm."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float, norm=LayerNorm):
        super().__init__()
        self.self_attn = Attention(d_model, num_heads)
        self.src_attn = Attention(d_model, num_heads)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)
        self.sublayer = nn.ModuleList(Residual(norm(d_model), dropout) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        source: tuple[Tensor, Tensor],
        mask: Tensor | None,
        source_mask: Tensor | None,
        cache=None,
        condition: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """``x`` (B, T, d) -> (B, T, d); ``source``: keys and values (B, h, S, d/h) of the encoder's output.

        ``mask`` broadcasts to (B, h, T, T), ``source_mask`` to (B, h, T, S); ``condition`` (B, T, m) goes to the norms.
        """

        def attend_to_self(y: Tensor) -> Tensor:
            query, keys, values = self.self_attn.query_keys_values(y)
            if cache is not None:
                keys, values = cache.append(keys, values)
            return self.self_attn.attend(query, keys, values, mask)

        x = self.sublayer[0](x, attend_to_self, *condition)
        x = self.sublayer[1](x, lambda y: self.src_attn(y, *source, source_mask), *condition)
        return self.sublayer[2](x, self.feed_forward, *condition)


class Decoder(nn.Module):
    """``num_layers`` decoder layers and a final norm, of kind ``final_norm``."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        num_layers: int,
        dropout: float,
        norm=LayerNorm,
        final_norm=LayerNorm,
    ):
        super().__init__()
        self.layers: Any = nn.ModuleList(
            DecoderLayer(d_model, num_heads, d_ff, dropout, norm) for _ in range(num_layers)
        )
        self.norm = final_norm(d_model)

    def source_keys_values(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values of the encoder's output (B, S, d): once per study."""
        linears = [linear for layer in self.layers for linear in layer.src_attn.linears[1:3]]
        parts = [split_heads(part, self.layers[0].src_attn.num_heads) for part in projected(encoded, linears)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def forward(
        self,
        x: Tensor,
        sources: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
        source_mask: Tensor | None = None,
        caches: list | None = None,
        condition: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Hidden states (B, T, d) of ``x`` (B, T, d): all words, or with ``caches``, one per layer, the newest."""
        for number, layer in enumerate(self.layers):
            cache = caches[number] if caches is not None else None
            x = layer(x, sources[number], mask, source_mask, cache, condition)
        return self.norm(x)


class PatchEmbedding(nn.Sequential):
    """Linear layer, ReLU and dropout over patches, with batch normalisation before (``use_bn`` 1) or around (2) it."""

    def __init__(self, image_dim: int, d_model: int, dropout: float, use_bn: int = 0):
        before = [nn.BatchNorm1d(image_dim)] if use_bn else []
        after = [nn.BatchNorm1d(d_model)] if use_bn == 2 else []
        super().__init__(*before, nn.Linear(image_dim, d_model), nn.ReLU(), nn.Dropout(dropout), *after)
        self.normalised = bool(use_bn)

    def forward(self, patches: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """(B, S, C) -> (B, S, d); ``patch_mask`` (B, S) bool keeps absent views out of the batch statistics."""
        batch, num_patches, _ = patches.shape
        patches = patches.flatten(0, 1)
        if patch_mask is None or not self.normalised:
            return super().forward(patches).view(batch, num_patches, -1)
        present = patch_mask.flatten().nonzero().squeeze(1)
        embedded = super().forward(patches[present])
        rows = embedded.new_zeros(len(patches), embedded.size(1))
        return rows.index_copy(0, present, embedded).view(batch, num_patches, -1)


class TokenEmbedding(nn.Module):
    """Embedding rows times sqrt(d)."""

    def __init__(self, num_ids: int, d_model: int):
        super().__init__()
        self.lut = nn.Embedding(num_ids, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d)."""
        return self.lut(tokens) * math.sqrt(self.lut.embedding_dim)


def sinusoids(length: int, d_model: int) -> Tensor:
    """The table (length, d_model) of sinusoidal positions (Vaswani et al., 2017)."""
    position = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    return torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1).flatten(1)


class PositionalEncoding(nn.Module):
    """Adds the sinusoidal table ``pe`` (1, 5000, d), then dropout (Vaswani et al., 2017)."""

    pe: Tensor

    def __init__(self, d_model: int, dropout: float, max_length: int = 5000):
        super().__init__()
        self.dropout = dropout
        self.register_buffer("pe", sinusoids(max_length, d_model).unsqueeze(0))

    def forward(self, x: Tensor, position: int | Tensor | None = None) -> Tensor:
        """``x`` (B, T, d) holds positions 0..T-1, or T hypotheses that are all at ``position``, also as (1,) int64; or
        what is at the positions (B, T) int64.
        """
        if isinstance(position, Tensor):
            table = self.pe.index_select(1, position) if position.dim() == 1 else F.embedding(position, self.pe[0])
        else:
            table = self.pe[:, : x.size(1)] if position is None else self.pe[:, position : position + 1]
        return F.dropout(x + table, self.dropout, self.training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Some published files omit this constant: it is not reported as missing.
        if prefix + "pe" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)


def decoder_mask(tokens: Tensor) -> Tensor:
    """(B, 1, T, T) mask of teacher-forced ``tokens`` (B, T): not the future, and no padding.

    Begin, end and padding are all id 0; the first position, begin, is always visible.
    """
    length = tokens.size(1)
    is_key = tokens > 0
    is_key[:, 0] = True
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    return is_key[:, None, None, :] & causal
