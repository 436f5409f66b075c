"""Memory or disk space that ran out becomes one line that says what helps."""

import contextlib
import errno
from collections.abc import Iterator

from modules.runtime.errors import InputError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn errors inside the block that say that memory (torch's, Python's) or a disk is full into an InputError.

    For memory the line ends with ``remedy``, the flags that need less.
    """
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
    except OSError as error:
        if error.errno not in _DISK:
            raise
        named = f"file {error.filename!r} " if error.filename else "a file "
        raise InputError(f"{named}cannot be written: {error.strerror}; what was saved before is intact") from error


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
