"""VisualGPT's encoder: post-norm self-attention over visual tokens, of which the decoder sees every layer's output.

Shapes: B studies, N visual tokens, C visual width, D = d_model, h heads of width w. Masks are boolean, True = may be
attended to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.layers.transformer import TorchLayerNorm, split_heads


class UnusedLinear(nn.Linear):
    """A layer that published files store and the published code never calls; kept, so that state dicts are equal."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.requires_grad_(False)


class EncoderAttention(nn.Module):
    """Multi-head self-attention without dropout on its probabilities."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.c_attn_query, self.c_attn_key, self.c_attn_value = (UnusedLinear(d_model, d_model) for _ in range(3))

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """``x`` (B, N, D) -> (B, N, D); ``keep`` (B, 1, 1, N) or None: the tokens that may be attended to."""
        query, keys, values = (split_heads(linear(x), self.num_heads) for linear in (self.fc_q, self.fc_k, self.fc_v))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=keep)
        return self.fc_o(attended.transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    """LN(x + dropout(attention(x)))."""

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = EncoderAttention(d_model, num_heads)
        self.layer_norm = TorchLayerNorm(d_model)
        self.dropout = dropout

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """``x`` (B, N, D) -> (B, N, D); ``keep`` (B, 1, 1, N) or None."""
        return self.layer_norm(x + F.dropout(self.attention(x, keep), self.dropout, self.training))


class FeedForwardLayer(nn.Module):
    """LN(x + dropout(fc2(dropout(relu(fc1 x)))))."""

    def __init__(self, d_model: int, d_ff: int, dropout: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.layer_norm = TorchLayerNorm(d_model)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = F.dropout(F.relu(self.fc1(x)), self.dropout, self.training)
        return self.layer_norm(x + F.dropout(self.fc2(hidden), self.dropout, self.training))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normalised afterwards."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.mhatt = AttentionLayer(d_model, num_heads, dropout)
        self.pwff = FeedForwardLayer(d_model, d_ff, dropout)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """``x`` (B, N, D) -> (B, N, D); ``keep`` (B, 1, 1, N) or None."""
        return self.pwff(self.mhatt(x, keep))


class LevelEncoder(nn.Module):
    """Embeds visual tokens and gives the output of each of ``num_layers`` layers.

    ``published`` uses the published mask: it hides tokens whose embedding happens to sum to exactly 0, and not the
    zero rows that pad a study's detections.
    """

    def __init__(
        self, image_dim: int, d_model: int, num_heads: int, d_ff: int, num_layers: int, dropout: float, published: bool
    ):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.fc = nn.Linear(image_dim, d_model)
        self.layer_norm = TorchLayerNorm(d_model)
        self.dropout, self.published = dropout, published
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, patches: Tensor, patch_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``patches`` (B, N, C), ``patch_mask`` (B, N) or None -> levels (B, layers, N, D), mask (B, 1, 1, N) or None.

        A study without any visual token attends to its empty ones: attention to nothing would be NaN.
        """
        x = F.gelu(self.fc(patches), approximate="tanh")
        x = self.layer_norm(F.dropout(x, self.dropout, self.training))
        if self.published:
            keep = (x.sum(-1) != 0)[:, None, None, :]
        elif patch_mask is None:
            keep = None
        else:
            keep = (patch_mask | ~patch_mask.any(dim=1, keepdim=True))[:, None, None, :]
        levels = []
        for layer in self.layers:
            x = layer(x, keep)
            levels.append(x)
        return torch.stack(levels, dim=1), keep
