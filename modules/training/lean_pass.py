"""A pass of the objective with fewer kernel launches: what modules do one tensor at a time is done for many at once.

On a GPU a launch costs the host some microseconds, and a ResNet-101 with a decoder has hundreds of weights.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BYTES_AT_ONCE = 25 * 2**20  # of weights cast together: as DistributedDataParallel's buckets, which it would hold up


class _Cast(torch.autograd.Function):
    """Tensors of any shapes in another dtype, and their gradients back, by few kernels."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        given = iter(_cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(given) for gradient in gradients)


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return tuple(found)


class _Count:
    """Stands for a counter on the device while a pass adds to it."""

    def __init__(self) -> None:
        self.value = 0

    def add_(self, number: int) -> None:
        self.value += number


class LeanPass(nn.Module):
    """``objective`` with the same results, whose state stays its own; ``precision`` is that of the autocast around it.

    Autocast would cast each weight of a linear layer or a convolution by itself, and batch normalisation counts its
    batches by itself. Modules that leave autocast have a true attribute ``leaves_autocast`` and keep their weights.
    """

    def __init__(self, objective: nn.Module, precision: str):
        super().__init__()
        self.objective = objective
        self.dtype = None if precision == "float32" else getattr(torch, precision)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What ``objective`` returns."""
        if getattr(self.objective, "compiled", False):  # a compiler does better
            return self.objective(*arguments, **options)
        with self._half_weights(), self._counted_together():
            return self.objective(*arguments, **options)

    @contextlib.contextmanager
    def _half_weights(self) -> Iterator[None]:
        places = _weight_places(self.objective) if self.dtype is not None else []
        weights = list({id(holder[name]): holder[name] for holder, name in places}.values())
        cast: dict[int, Tensor] = {}
        # One that is trained would have gradients computed for all that are cast with it.
        for trained in (True, False):
            for group in _groups([weight for weight in weights if weight.requires_grad == trained]):
                cast |= zip(map(id, group), _Cast.apply(self.dtype, *group), strict=True)
        with _replaced([(holder, name, cast[id(holder[name])]) for holder, name in places]):
            yield

    @contextlib.contextmanager
    def _counted_together(self) -> Iterator[None]:
        layers = [
            layer
            for layer in self.objective.modules()
            if type(layer) is nn.BatchNorm2d
            and layer.training
            and layer.momentum is not None
            and layer.num_batches_tracked is not None
        ]
        counts = [_Count() for _ in layers]
        counters: list[Any] = [layer.num_batches_tracked for layer in layers]
        places = [layer._buffers for layer in layers]
        with _replaced([(place, "num_batches_tracked", own) for place, own in zip(places, counts, strict=True)]):
            yield
        if counters:
            torch._foreach_add_(counters, [own.value for own in counts])


def _weight_places(module: nn.Module) -> list[tuple[Any, str]]:
    """The dictionary and name of each weight that autocast would cast."""
    if getattr(module, "leaves_autocast", False):
        return []
    own = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    places: list[tuple[Any, str]] = [
        (module._parameters, name)
        for name, value in module._parameters.items()
        if own and value is not None and value.dtype == torch.float32
    ]
    return places + [place for child in module.children() for place in _weight_places(child)]


def _groups(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for weight in weights:
        group, size = [*group, weight], size + weight.nbytes
        if size >= BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(holder, name, holder[name]) for holder, name, _ in changes]
    try:
        for holder, name, value in changes:
            holder[name] = value
        yield
    finally:
        for holder, name, value in before:
            holder[name] = value
