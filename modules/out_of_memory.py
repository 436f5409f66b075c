"""Memory that ran out becomes one line with the flags that need less."""

import contextlib
from collections.abc import Iterator

from modules.errors import InputError


@contextlib.contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Turn torch's and Python's out-of-memory errors inside the block into an InputError that ends with ``remedy``."""
    import torch

    try:
        yield
    except MemoryError as error:
        raise InputError(f"out of memory: {remedy}") from error
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        where = _where(error, isinstance(error, torch.OutOfMemoryError))
        if where is None:
            raise
        raise InputError(f"out of memory {where}: {remedy}") from error


def _where(error: RuntimeError, on_gpu: bool) -> str | None:
    text = str(error)
    if on_gpu:
        return "on the GPU"
    # torch has no type of its own for these.
    if "DefaultCPUAllocator" in text:
        return "of this machine"
    if "unable to" in text and "/torch_" in text:
        return "in /dev/shm, where data-loading processes hand over batches (docker run --shm-size)"
    return None
