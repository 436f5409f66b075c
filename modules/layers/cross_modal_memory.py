"""Response of a cross-modal memory: attention over its k best slots per query and head (R2GenCMN, Eq. 6-10).

Shapes: R queries (all tokens of all samples), M memory slots, h heads of width w, k slots read per query and head.

Only the scores are computed against the whole memory, a block of queries at a time and without a gradient. The k
chosen slots per query are then read, and their gradients written, as weighted sums of rows (embedding_bag), so that
neither (R, h, M) weights nor (R, h, k, w) rows exist, forward or backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
SUM = 0  # embedding_bag's mode
# Scores in memory at once: few enough for a CPU's cache, enough to keep a GPU busy.
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}


@torch.no_grad()
def best_slots(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and slots (R, h, k) of each query's k best keys; query (R, h, w), keys (M, h, w)."""
    limit = SCORES_AT_ONCE.get(query.device.type, SCORES_AT_ONCE["cuda"])
    rows = max(1, limit // (keys.size(0) * keys.size(1)))
    keys = keys.permute(1, 2, 0)
    # An exported program takes any number of queries, but its number of blocks would be fixed.
    blocks = [query] if torch.compiler.is_exporting() else query.split(rows)
    found = [torch.bmm(block.transpose(0, 1), keys).topk(k, dim=-1, sorted=False) for block in blocks]
    scores, slots = (torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*found, strict=True))
    return scores, slots


# For a compiler the search is one operation: its number of blocks would be that of the first batch.
_best_slots = torch.library.custom_op("ithn::best_slots", best_slots, mutates_args=())


@_best_slots.register_fake
def _(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = query.new_empty(query.size(1), query.size(0), k).transpose(0, 1)
    return scores, torch.empty_like(scores, dtype=torch.int64)


class _ChosenScores(torch.autograd.Function):
    """query . key of the chosen slots, whose values are known from the search; only these have a gradient."""

    @staticmethod
    def forward(ctx, query: Tensor, keys: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        """query (R*h, w), keys (M*h, w), scores and rows of keys (R*h, k)."""
        ctx.save_for_backward(query, keys, rows)
        return scores.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        """``grad`` (R*h, k)."""
        query, keys, rows = ctx.saved_tensors
        rows, weights = rows.view(-1), grad.reshape(-1)
        bags = torch.arange(0, len(rows), grad.size(1), dtype=rows.dtype, device=rows.device)
        # d_query = sum of grad * keys; and the gradient of <d_query, query> in keys is d_keys.
        d_query, *found = aten._embedding_bag(keys, rows, bags, mode=SUM, per_sample_weights=weights)
        d_keys = aten._embedding_bag_backward(query, rows, bags, *found, len(keys), False, SUM, False, weights)
        return d_query, d_keys, None, None


def topk_attention(query: Tensor, keys: Tensor, values: Tensor, k: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention of query (R, h, w) over the k best of keys (M, h, w); returns (R, h, w) of values (M, h, w).

    Everything after the search is in float32 at least, even under autocast.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads, width = query.shape[1:]
    query = query / width**0.5
    search = _best_slots if torch.compiler.is_dynamo_compiling() else best_slots
    scores, slots = search(query.detach(), keys.detach(), k)
    # Row of a slot in the memory seen as (M*h, w); 32 bits, as the gradient of embedding_bag sorts the rows.
    rows = (slots * num_heads + torch.arange(num_heads, device=slots.device).unsqueeze(1)).reshape(-1, k).int()
    query, keys, values = (x.reshape(-1, width).to(dtype) for x in (query, keys, values))
    weights = _ChosenScores.apply(query, keys, scores.reshape(-1, k).to(dtype), rows).softmax(dim=-1)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return F.embedding_bag(rows, values, per_sample_weights=weights, mode="sum").view(-1, num_heads, width)


class MemoryResponse(nn.Module):
    """``linears`` 0..3 = query, key, value, output; all samples share the memory's keys and values."""

    def __init__(self, d_model: int, num_heads: int, topk: int, dropout: float = 0.1):
        super().__init__()
        self.num_heads = num_heads
        self.topk = topk
        self.dropout = dropout
        self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., d) -> (R, h, w)."""
        return x.reshape(-1, self.num_heads, x.size(-1) // self.num_heads)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (M, h, w) of the memory (M, d), projected once for all samples."""
        return self.split_heads(self.linears[1](memory)), self.split_heads(self.linears[2](memory))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Response (B, T, d) to ``x`` (B, T, d)."""
        query = self.split_heads(self.linears[0](x))
        dropout = self.dropout if self.training else 0.0
        return self.linears[3](topk_attention(query, keys, values, self.topk, dropout).view_as(x))
