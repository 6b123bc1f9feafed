"""Memory of the process that merges: its peak, and an allocator setting that keeps one copy of the weights."""

from __future__ import annotations

import ctypes
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Let glibc map each large block separately and return it to the system when it is freed.

    By default glibc keeps freed blocks of up to 32 MiB in its heap. The blocks that quantising and merging free between
    the weights of two layers fit no later request, and the holes may add up to a second copy of the weights.
    """
    libc = ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 2**21)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.malloc_trim(0)


def peak_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
