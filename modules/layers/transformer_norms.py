"""Layer norms of the backbones, in float32 at least whatever autocast chose."""

import math

import torch
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """(x - mean) / (std + eps) by torch's fused layer-norm kernels: a sixth of the time of the plain expression."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        n = x.size(-1)
        # The kernel divides by the biased std; the tiny eps only keeps rows without variance finite.
        unit, mean, inverse_biased = torch.native_layer_norm(x, (n,), None, None, 1e-30)
        std = math.sqrt(n / (n - 1)) / inverse_biased
        inverse = 1 / (std + eps)
        ctx.save_for_backward(x, mean, std, inverse, scale)
        return torch.addcmul(shift, unit.mul_(inverse / inverse_biased), scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, mean, std, inverse, scale = ctx.saved_tensors
        n = x.size(-1)
        grad = grad.contiguous()
        kernel = torch.ops.aten.native_layer_norm_backward
        # With G = scale * grad and c = x - mean, the gradient in x is (G - mean G) / (std + eps)
        # - c * sum(G c) / ((n - 1) std (std + eps)^2). The kernel computes r (G - mean G) - r^3 c * sum(G c) / n:
        # the same up to a factor per row for this r.
        r = (inverse * n / ((n - 1) * std)).sqrt()
        grad_x = kernel(grad, x, (n,), mean, r, scale, None, [True, False, False])[0].mul_(inverse / r)
        _, grad_scale, grad_shift = kernel(grad, x, (n,), mean, inverse, scale, scale, [False, True, True])
        return grad_x, grad_scale, grad_shift, None


def normalise(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """scale * (x - mean) / (std + eps) + shift over the last dimension, with the unbiased std and eps outside the root.

    ``scale`` and ``shift`` (d,). At least float32, as half precision would lose the variance.
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
        return normalise(x, self.a_2, self.b_2)


class TorchLayerNorm(nn.LayerNorm):
    """torch's own; autocast gives it float32 on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))
