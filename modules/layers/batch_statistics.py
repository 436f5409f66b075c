"""Batch normalisation of a batch that is filled up with further images, which its statistics leave out.

By the kernels of torch.nn.SyncBatchNorm, which take a batch's statistics and apply them in two steps, on a GPU only.

Shapes: x (n, C, ...), of which the first ``count`` rows are the batch.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from modules.layers.device_check import DeviceCheck, Difference, difference

statistics = torch.batch_norm_stats
apply_statistics = torch.batch_norm_elemt
backward_reduce = torch.batch_norm_backward_reduce
backward_apply = torch.batch_norm_backward_elemt


class StatisticsOfFirst(TorchFunctionMode):
    """In the block, batch normalisation in training takes its statistics from the first ``count`` rows.

    The other rows are normalised by them as well, and give no gradient. Running statistics follow at the block's end.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count
        self.layers: list[_Layer] = []
        self.values: dict[int, Tensor] = {}  # on the device: how many values each layer's statistics are of

    def __torch_function__(self, func: Callable, types: Any, given: Any = (), named: Any = None) -> Any:
        called = self.batch_norm if func is F.batch_norm else func
        return called(*given, **(named or {}))

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """As torch.nn.functional.batch_norm of ``x`` (n, C, ...), whose other tensors are (C,)."""
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        number = self.count * x[0, 0].numel()
        if number not in self.values:
            self.values[number] = torch.full((1,), number, dtype=torch.int32, device=x.device)
        normalised, mean, inverse = _Normalised.apply(x, weight, bias, self.values[number], self.count, eps)
        if running_mean is not None and running_var is not None:
            self.layers.append(_Layer(running_mean, running_var, mean, inverse, number, eps, momentum))
        return normalised

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.layers:
            _follow(*zip(*self.layers, strict=True))


class _Layer(NamedTuple):
    """What the running statistics (C,) of a layer follow: ``inverse`` = 1 / sqrt(variance + ``eps``)."""

    running_mean: Tensor
    running_var: Tensor
    mean: Tensor
    inverse: Tensor
    values: int
    eps: float
    momentum: float


@torch.no_grad()
def _follow(running_means, running_vars, means, inverses, values, eps, momenta) -> None:
    """Update the running statistics of all layers together."""
    variances = torch._foreach_pow(inverses, -2)
    torch._foreach_sub_(variances, eps)
    torch._foreach_mul_(variances, [number / (number - 1) for number in values])
    for running, found in ((running_means, means), (running_vars, variances)):
        torch._foreach_lerp_(running, found, momenta)


class _Normalised(torch.autograd.Function):
    """``x`` (n, C, ...) normalised, and the mean and 1 / standard deviation (C,) of its first ``count`` rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, count: int, eps: float):
        x = _dense(x)
        mean, inverse = statistics(x[:count], eps)
        ctx.save_for_backward(x, weight, mean, inverse, values)
        ctx.count, ctx.has_bias = count, bias is not None
        ctx.mark_non_differentiable(mean, inverse)
        return apply_statistics(x, weight, bias, mean, inverse, eps), mean, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, inverse, values = ctx.saved_tensors
        count, grad, affine = ctx.count, _dense(grad), weight is not None
        sums = backward_reduce(grad[:count], x[:count], mean, inverse, weight, True, affine, ctx.has_bias)
        grad_x = backward_apply(grad, x, mean, inverse, weight, *sums[:2], values)
        grad_x[count:] = 0
        return grad_x, sums[2], sums[3], None, None, None


def _dense(x: Tensor) -> Tensor:
    """``x`` (n, C, ...) in one of the two layouts that the kernels take."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


ROUNDING = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
LAYOUTS = torch.contiguous_format, torch.channels_last


def _differences(device: torch.device) -> Iterator[Difference]:
    """From torch's batch normalisation of the batch alone, for each precision and layout of images and gradients."""
    draw, count = torch.Generator().manual_seed(0), 5
    images, noise = (torch.randn(8, 16, 28, 28, generator=draw) for _ in range(2))  # (n, C, H, W)
    direction = noise + images + 1  # with all of the sums that a gradient of the images has
    affine = [(torch.randn(16, generator=draw) + 2).to(device).requires_grad_() for _ in range(2)]
    for (dtype, most), layout, of_grad in itertools.product(ROUNDING.items(), LAYOUTS, LAYOUTS):
        x = (images + 1).to(device, dtype).to(memory_format=layout)
        grad = direction.to(device, dtype).to(memory_format=of_grad)
        with StatisticsOfFirst(count):
            y, d_x, *rest = _step(x, affine, grad)
        found = [y[:count], d_x, *rest]
        y, d_x, *rest = _step(x[:count].float(), affine, grad[:count].float())
        yield difference(found, [y, torch.cat([d_x, torch.zeros_like(x[count:])]), *rest], most)


def _step(x: Tensor, affine: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output, gradients of ``x`` and of weight and bias ``affine``, running mean and variance."""
    x = x.detach().requires_grad_()
    weight, bias = affine
    mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
    y = F.batch_norm(x, mean, variance, weight, bias, training=True)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad), mean, variance]


KERNELS = DeviceCheck("batch normalisation of the present images", _differences)
