"""XProNet's prototypes: attention to those of a study's labels, and the contrastive loss of features by labels.

Wang, Bhalerao, He: Cross-modal Prototype Driven Network for Radiology Report Generation (ECCV 2022, arXiv 2207.04818).

Shapes: B studies, T queries of a study, C classes, M prototypes (class c in rows c * M/C onwards), h heads of width w,
k prototypes read per query and head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def with_no_finding(labels: Tensor, no_finding: int) -> Tensor:
    """Multi-hot ``labels`` (B, C) in which a row without any positive gets the class ``no_finding``."""
    none = ~(labels > 0).any(dim=1, keepdim=True)  # (B, 1)
    is_no_finding = torch.arange(labels.size(1), device=labels.device) == no_finding
    return labels.masked_fill(none & is_no_finding, 1.0)


def prototypes_of(labels: Tensor, num_prototypes: int) -> Tensor:
    """(B, M) bool: the prototypes that belong to the positive classes of ``labels`` (B, C)."""
    return (labels > 0).repeat_interleave(num_prototypes // labels.size(1), dim=1, output_size=num_prototypes)


def selected_attention(
    query: Tensor, keys: Tensor, values: Tensor, selected: Tensor, k: int, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of query (B, h, T, w) over its k best keys among those that its study selects.

    keys and values (h, M, w) are the same for all studies, ``selected`` (B, M) bool; returns (B, h, T, w). A study
    with fewer than k prototypes reads all of them. The softmax is in float32 at least, even under autocast.

    The published code copies each study's rows into a padded matrix; here the prototypes are projected once and the
    others are masked, with the same result but no loop and no device synchronisation.
    """
    scores = (query / query.size(-1) ** 0.5) @ keys.transpose(-1, -2)  # (B, h, T, M)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~selected[:, None, None, :], torch.finfo(scores.dtype).min)
    # Where fewer than k are selected, others are among the best; their weight is exactly 0.
    best, rows = scores.topk(k, dim=-1, sorted=False)
    weights = F.dropout(best.softmax(dim=-1), dropout, training=dropout > 0)
    return torch.zeros_like(scores).scatter(-1, rows, weights).to(values.dtype) @ values


class PrototypeResponse(nn.Module):
    """``linears`` 0..3 = query, key, value, output; one module serves images and reports."""

    def __init__(self, d_model: int, num_heads: int, topk: int, dropout: float = 0.1):
        super().__init__()
        self.num_heads = num_heads
        self.topk = topk
        self.dropout = dropout
        self.linears = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(4))

    def split_heads(self, x: Tensor) -> Tensor:
        """(..., T, d) -> (..., h, T, w)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def keys_values(self, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (h, M, w) of the prototypes (M, d), projected once for all studies."""
        return self.split_heads(self.linears[1](prototypes)), self.split_heads(self.linears[2](prototypes))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, selected: Tensor) -> Tensor:
        """Response (B, T, d) to ``x`` (B, T, d) from the ``selected`` (B, M) prototypes."""
        dropout = self.dropout if self.training else 0.0
        query = self.split_heads(self.linears[0](x))
        response = selected_attention(query, keys, values, selected, self.topk, dropout)
        return self.linears[3](response.transpose(1, 2).flatten(2))


def label_contrastive_loss(features: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Multi-label contrastive loss of features (B, d) with multi-hot labels (B, C), each row with a positive.

    Pairs that share a class (i = j included) are pulled to a cosine of 1.5^-(|l_i - l_j|_1 / |l_i + l_j|_1), the others
    are pushed below ``margin``. Returns the mean over all B^2 pairs, in float32 at least.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):  # half precision would blur the cosines
        unit = F.normalize(features.to(dtype), dim=1, eps=1e-12)
        labels = labels.to(dtype)
        cosine = unit @ unit.T  # (B, B)
        shared = labels @ labels.T
        counts = labels.sum(dim=1)
        together = counts.unsqueeze(0) + counts.unsqueeze(1)
        target = 1.5 ** -((together - 2 * shared) / together)
        return torch.where(shared > 0, F.relu(target - cosine), F.relu(cosine - margin)).mean()
