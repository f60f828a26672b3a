"""Memory from the operating system: pages of this process alone, and locking pages in RAM."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import numpy as np


def anonymous_memory(nbytes: int) -> np.ndarray:
    """Zeroed, page-aligned bytes (nbytes,) uint8 that belong to this process alone.

    They lie in huge pages where the system has them: weights are read in long rows, and looking up small pages takes
    as long as reading the rows.
    """
    if not nbytes:
        return np.empty(0, np.uint8)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def lock_memory(array: np.ndarray) -> bool:
    """Ask the system to keep this memory in RAM; False if it refuses (RLIMIT_MEMLOCK) or cannot."""
    if sys.platform == "win32" or not array.nbytes:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)) == 0
