"""Response of a cross-modal memory: attention over its k best slots per query and head (R2GenCMN, Eq. 6-10)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def topk_attention(query: Tensor, keys: Tensor, values: Tensor, k: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention over the k best keys of each query.

    query (G, R, w), keys and values (G, M, w) for G groups (heads, or heads of each sample); returns (G, R, w).
    """
    scores = query @ keys.transpose(-1, -2) / query.size(-1) ** 0.5
    best, slots = scores.topk(k, dim=-1)
    weights = F.dropout(best.softmax(dim=-1), dropout)
    return torch.zeros_like(scores).scatter(-1, slots, weights) @ values


class MemoryResponse(nn.Module):
    """``linears`` 0..3 = query, key, value, output; the memory's keys and values are the same for all samples."""

    def __init__(self, d_model: int, num_heads: int, topk: int, dropout: float = 0.1):
        super().__init__()
        self.num_heads = num_heads
        self.topk = topk
        self.dropout = dropout
        self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (h, M, d/h) of the memory (M, d), projected once per forward and not once per sample."""
        return self._split_heads(self.linears[1](memory)), self._split_heads(self.linears[2](memory))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Response (B, T, d) to ``x`` (B, T, d)."""
        batch, length, _ = x.shape
        query = self._split_heads(self.linears[0](x).flatten(0, 1))  # (h, B*T, d/h)
        response = topk_attention(query, keys, values, self.topk, self.dropout if self.training else 0.0)
        return self.linears[3](response.transpose(0, 1).reshape(batch, length, -1))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(R, d) -> (h, R, d/h)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
