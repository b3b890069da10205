"""Memory that a step frees stays with the process for the next one.

glibc gives large tensors back to the system when they are freed, and asks for them again a moment later, page by
page and zeroed: half of the time of a step that makes tensors of a hundred megabytes.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, nothing that is freed goes back to the system; after it, what is free does. Elsewhere than on glibc
    nothing happens."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # what glibc itself arrives at when large blocks come and go, which it stops watching for once asked
        libc.mallopt(_MMAP_MAX, 1 << 16)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
