"""Small tensors between the CPU and a GPU without making either wait for the other.

CUDA copies without a wait only from and to page-locked memory.
"""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` (any shape), of the CPU, on ``device``."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_to(place: Tensor, tensor: Tensor) -> None:
    """Copy ``tensor``, of the CPU, into ``place`` of the same shape."""
    if place.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    place.copy_(tensor, non_blocking=True)


class Download:
    """A copy of ``tensor`` (any shape) on its way to the CPU; ``value`` waits for it only where it has not arrived."""

    def __init__(self, tensor: Tensor):
        self._arrived = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._copy = tensor.clone()

    def value(self) -> Tensor:
        """The copy, on the CPU."""
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        return self._copy
