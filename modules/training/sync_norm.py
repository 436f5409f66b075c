"""Batch normalisation by the samples of all processes: torch's on GPUs, and ours on a CPU, where torch has none.

Shapes: x (B, C, ...) of this process, whose rows may differ in number; W processes.
"""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.runtime import distributed


class CommonBatchNorm(_BatchNorm):
    """In training, normalises by mean and variance over all processes; else, or in one process, like any other.

    ``drop`` and ``act`` are what timm's layers bring along.
    """

    @classmethod
    def of(cls, layer: _BatchNorm) -> "CommonBatchNorm":
        """``layer`` with the same parameters, buffers and names."""
        common = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        common.weight, common.bias, common.training = layer.weight, layer.bias, layer.training
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(common, name, buffer)
        common.drop, common.act = getattr(layer, "drop", nn.Identity()), getattr(layer, "act", nn.Identity())
        return common

    def forward(self, x: Tensor) -> Tensor:
        together = self.training and distributed.is_distributed()
        return self.act(self.drop(self._normalised(x) if together else super().forward(x)))

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions from two on."""

    def _normalised(self, x: Tensor) -> Tensor:
        own = x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))  # (C, n)
        count = own.new_full((self.num_features,), own.shape[1])
        mean, squares = own.mean(1), own.var(1, correction=0) * count
        # (W, 3, C): summing squares about each process's own mean loses no digits.
        counts, means, squares = distributed.gather_with_gradient(torch.stack([count, mean, squares])[None]).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total  # (C,)
        self._remember(mean, variance * total / (total - 1))
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def with_common_statistics(module: nn.Module) -> nn.Module:
    """``module``, on its device, with every batch normalisation in it replaced; names of its entries stay.

    Every process must then run each of them equally often.
    """
    if next(module.parameters()).is_cuda:
        return convert_sync_batchnorm(module)  # torch's own would drop the activations in timm's layers
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, CommonBatchNorm.of(child))
        elif next(child.parameters(), None) is not None:
            with_common_statistics(child)
    return module
