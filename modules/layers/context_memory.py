"""What is known of a study beside its images, as further visual tokens: texts, and images of the study before.

Shapes: B studies, S tokens of the visual extractor, C their width, T words of context, D the decoder's width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PRIOR_IMAGE = 3  # rows of the type embedding: 0 padding, 1 indication, 2 prior report
NUM_TYPES = 4


class ContextMemory(nn.Module):
    """Joins context to visual tokens; ``texts`` and ``prior_images`` say which there is.

    With ``prior_images`` the second half of the views are those of the prior study. Every part carries an embedding of
    its type, and is masked where a study has none.
    """

    def __init__(self, image_dim: int, report_dim: int, *, texts: bool, prior_images: bool):
        super().__init__()
        self.prior_images = prior_images
        self.types = nn.Embedding(NUM_TYPES, image_dim, padding_idx=0)
        self.words = nn.Linear(report_dim, image_dim) if texts else None

    def forward(
        self, patches: Tensor, patch_mask: Tensor | None, embed: Callable[[Tensor], Tensor], context: Any
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Tokens (B, S + T, C), their mask, the mean (B, C) over the study's own patches, and how many these are.

        ``patches`` (B, S, C) and ``patch_mask`` (B, S) or None are the extractor's; ``embed`` maps tokens (B, T) to the
        decoder's embeddings (B, T, D); ``context`` has ``tokens`` and ``kinds`` (B, T), kind 0 for padding, or is None.
        """
        if patch_mask is None:
            patch_mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        own = patches.size(1) // 2 if self.prior_images else patches.size(1)
        there = patch_mask[:, :own].unsqueeze(-1)
        wide = patches[:, :own].to(torch.promote_types(patches.dtype, torch.float32))
        pooled = (wide * there).sum(1) / there.sum(1)
        parts, masks = [patches[:, :own]], [patch_mask[:, :own]]
        if self.prior_images:
            prior = patches[:, own:] + self.types.weight[PRIOR_IMAGE].to(patches)
            parts.append(prior * patch_mask[:, own:].unsqueeze(-1))
            masks.append(patch_mask[:, own:])
        if self.words is not None:
            nothing = torch.zeros(len(patches), 1, dtype=torch.long, device=patches.device)
            tokens, kinds = (nothing, nothing) if context is None else (context.tokens, context.kinds)
            parts.append((self.words(embed(tokens)) + self.types(kinds)).to(patches) * (kinds > 0).unsqueeze(-1))
            masks.append(kinds > 0)
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1), pooled, own
