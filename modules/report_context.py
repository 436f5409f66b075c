"""Under which image a report's feature is made: its own, as the paper has it, or another one.

The decoder attends to the image while it reads the report, so that a report feature made under its own image carries
that image, and an image can be matched with it without a look at the report. Under another study's image the feature
can only say what the report says.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

CONTEXTS = ("own", "other")


def rows(features: Any, chosen: Tensor | slice) -> Any:
    """The VisualFeatures of some rows."""
    mask = features.patch_mask
    return dataclasses.replace(features, patches=features.patches[chosen], pooled=features.pooled[chosen],
                               patch_mask=None if mask is None else mask[chosen])


def others(batch_size: int, copies: int, device: torch.device) -> Tensor:
    """Rows (copies * B,) of the images under which ``copies`` times B reports are read: the row before each."""
    return torch.arange(batch_size, device=device).roll(1).repeat(copies)
