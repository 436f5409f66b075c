"""Batch normalisation over the samples of all processes: torch's on GPUs, and our own on a CPU, where torch has none.

Shapes: x (B, C, ...) of this process, where B may differ between the W processes.
"""

import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from modules.runtime import distributed


class CommonBatchNorm(nn.Module):
    """In training, normalises by mean and variance over all processes; otherwise like the ``layer`` that it replaces.

    It has the layer's parameters, buffers and names; ``drop`` and ``act`` are those of timm's layers.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        super().__init__()
        self.eps, self.momentum = layer.eps, layer.momentum
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.drop, self.act = getattr(layer, "drop", nn.Identity()), getattr(layer, "act", nn.Identity())
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        if not self.training:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        else:
            x = self._normalised(x)
        return self.act(self.drop(x))

    def _normalised(self, x: Tensor) -> Tensor:
        own = x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))  # (C, n)
        count = own.new_full((len(own),), own.shape[1])
        mean, squares = own.mean(1), own.var(1, correction=0) * count
        # (W, 3, C): summing squares about each process's own mean loses no digits.
        counts, means, squares = distributed.gather_with_gradient(torch.stack([count, mean, squares])[None]).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total  # (C,)
        self._update_running(mean, variance * total / (total - 1))
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
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
    if not distributed.is_distributed():
        return module
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            setattr(module, name, CommonBatchNorm(child))
        elif next(child.parameters(), None) is not None:
            with_common_statistics(child)
    return module
