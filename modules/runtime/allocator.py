"""Keeps the memory that a process frees, where the C library is glibc."""

import contextlib
import ctypes
from collections.abc import Iterator

# Of mallopt(3), and the values that glibc's own rule ends at once large blocks have been freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the context, blocks of any size are taken from memory that earlier ones left; elsewhere nothing changes.

    Large activations are otherwise handed back to the system after every layer, and each page of the next is faulted
    in anew: in a convolutional network on a CPU that is half of the time.
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
