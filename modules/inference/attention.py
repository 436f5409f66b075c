"""Where a decoder looks: cross-attention weights, recorded from the modules that compute them.

Shapes: B studies, h heads, T decoder positions, S visual tokens = N views of g x g patches.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def recorded_attention(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the context, the list gains the weights (B, h, T, S) of every call of ``modules``, in order.

    They are computed again from the call's arguments by the modules' ``weights``, as fused attention never stores them.
    """
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, _: found.append(module.weights(*inputs)))
        for module in modules
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def view_maps(layers: Sequence[Tensor], num_views: int, layer: int | None) -> Tensor | None:
    """Maps (B, T, N, g, g) float32 that sum to 1 over a study's views: mean over heads of one layer, or of all (None).

    None where the visual tokens are not square grids, as with detected regions. ``layer`` may count from the end.
    """
    chosen = layers if layer is None else [layers[layer]]
    weights = torch.stack([part.float().mean(1) for part in chosen]).mean(0)  # (B, T, S)
    side = math.isqrt(weights.size(-1) // num_views)
    if num_views * side * side != weights.size(-1):
        return None
    return weights.unflatten(-1, (num_views, side, side))


def shares(maps: np.ndarray) -> np.ndarray:
    """``maps`` (..., N, g, g) in units of an even share: attention without any preference is 1 everywhere."""
    return maps * np.prod(maps.shape[-3:])


def opacity(shares: np.ndarray) -> np.ndarray:
    """How strongly to colour the patches of one word, (N, g, g) in [0, 1], from their ``shares`` (N, g, g).

    Only what exceeds an even share is coloured. Where nothing has twice its share even the strongest patch stays pale,
    so that a flat map looks flat.
    """
    excess = np.maximum(shares - 1, 0)
    return excess / max(1.0, float(excess.max()))
