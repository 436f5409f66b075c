"""Several processes: the features and counts of all of them; with one process everything is the identity.

Batches must have the same number of rows in every process.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)[rank() * ctx.rows :][: ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """The rows (B, ...) of all processes in rank order, (world * B, ...).

    The backward pass sums the gradient over the processes. A loss that every process computes from all rows then has,
    after the averaging of DistributedDataParallel, the gradient of one process that holds all rows.
    """
    return _Gather.apply(x) if is_distributed() else x


def gather(x: Tensor) -> Tensor:
    """The rows (B, ...) of all processes in rank order, (world * B, ...), without gradient."""
    if not is_distributed():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over the processes, without gradient."""
    if not is_distributed():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total
