"""Memory that a step frees stays with the process for the next one.

glibc gives large tensors back to the system when they are freed, and asks for them again a moment later, page by
page and zeroed: half of the time of a step that makes tensors of a hundred megabytes.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_lock, _inside = threading.Lock(), 0


@contextmanager
def kept() -> Iterator[None]:
    """Inside, nothing that is freed goes back to the system; after the outermost, what is free does.

    It is the main thread that gains: glibc's heaps of other threads hold no block of 64 MB. Elsewhere than on glibc nothing
    happens.
    """
    global _inside
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    with _lock:
        _inside += 1
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if (
                not _inside
            ):  # what glibc arrives at when large blocks come and go, and does not watch once asked
                libc.mallopt(_MMAP_MAX, 1 << 16)
                libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
                libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
                libc.malloc_trim(0)
