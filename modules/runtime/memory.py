"""This process's memory: what it frees is kept, and where memory or disk space ran out, one line says what helps."""

import contextlib
import ctypes
import errno
from collections.abc import Iterator

from modules.runtime.errors import InputError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Of mallopt(3), and the values that glibc's own rule ends at once large blocks have been freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}


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


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the context, blocks of any size are taken from memory that earlier ones left, if the C library is glibc.

    Large activations are otherwise handed back to the system after every layer, and each page of the next is faulted
    in anew: in the forward pass of a convolutional network on a CPU that is half of the time, in its training less.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):  # another C library
        yield
        return
    for name, value in _KEPT.items():
        library.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _USUAL.items():
            library.mallopt(name, value)
        library.malloc_trim(0)
