"""What z is made of: the visual extractor's patches, as the paper has it, or the transformer encoder's output."""

from typing import Any

import torch
from torch import Tensor

IMAGE_FEATURES = ("pooled", "encoder")


def image_feature(objective: Any, seen: Any) -> Tensor:
    """What z is the projection of (B, C), from the VisualFeatures ``seen``: the mean over the tokens that are there.

    With ``token_level`` it is (B, 1 + S, C + 1): mean and single tokens, in the last column which of them are there.
    """
    if objective.image_feature == "pooled" and not objective.token_level:
        return seen.pooled
    tokens = objective.backbone.encode(seen)[0] if objective.image_feature == "encoder" else seen.patches
    tokens = tokens if tokens.dim() == 3 else tokens[:, -1]  # the last of VisualGPT's levels
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    there = torch.ones_like(tokens[..., :1]) if seen.patch_mask is None else \
        seen.patch_mask.unsqueeze(-1).to(tokens.dtype)
    mean = (tokens * there).sum(1) / there.sum(1)
    if not objective.token_level:
        return mean
    every = torch.cat([mean.unsqueeze(1), tokens], 1)
    return torch.cat([every, torch.cat([torch.ones_like(there[:, :1]), there], 1)], 2)
