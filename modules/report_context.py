"""Under which image a report's feature is made: its own, as the paper has it, or another one.

The decoder attends to the image while it reads the report, so that a report feature made under its own image carries
that image, and an image can be matched with it without a look at the report. Under another study's image the feature
can only say what the report says.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONTEXTS = ("own", "other")


def rows_of(features: Any, chosen: Tensor | slice) -> Any:
    """The VisualFeatures of some rows."""
    mask = features.patch_mask
    return dataclasses.replace(features, patches=features.patches[chosen], pooled=features.pooled[chosen],
                               patch_mask=None if mask is None else mask[chosen])


def others(batch_size: int, copies: int, device: torch.device) -> Tensor:
    """Rows (copies * B,) of the images under which ``copies`` times B reports are read: the row before each."""
    return torch.arange(batch_size, device=device).roll(1).repeat(copies)


def join(positive: Any, negative: Any, pad_id: int) -> Any:
    """Two modules.datasets.Pair of B rows as one of 2B; the shorter tokens are filled up with ``pad_id``."""
    width = max(positive.tokens.shape[1], negative.tokens.shape[1])

    def filled(name: str, value: int) -> Tensor:
        parts = [getattr(pair, name) for pair in (positive, negative)]
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=value) for part in parts])

    return dataclasses.replace(
        positive, images=torch.cat([positive.images, negative.images]),
        view_mask=torch.cat([positive.view_mask, negative.view_mask]),
        tokens=filled("tokens", pad_id), token_mask=filled("token_mask", False),
        labels=None if positive.labels is None else torch.cat([positive.labels, negative.labels]))
