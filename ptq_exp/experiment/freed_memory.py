"""Memory that was freed stays with the process, where the C library gives it back at once otherwise.

Between two operations of a network glibc returns what tensors of more than a few hundred kilobytes took, and the next
one waits until the system has brought in, and emptied, as many pages again.
"""

from __future__ import annotations

import ctypes
import os

_LARGEST = 32 << 20
"""Bytes that are taken from what the process has; glibc accepts no more. Larger ones come from the system."""
_KEPT = 512 << 20
"""Free bytes at the end of the heap from which on they are given back."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensors; returns whether it does.

    Nothing is done where variables of the environment (`MALLOC_...`, `GLIBC_TUNABLES`) say what it does, and with
    another C library.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows wants a name
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
