"""Resident tensors in one block of anonymous memory, locked there where the system allows it.

If the dense part is paged out, keeping it resident was in vain: so it is neither mapped nor left in the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.errors import FormatError, ReadError

from .header import TensorInfo

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32"}
ALIGN = 64  # a cache line, and the widest vector load
PIECE = 64 << 20


def anonymous(nbytes: int) -> np.ndarray:
    """Page-aligned zeroed bytes that belong to this process alone, in huge pages where the system has them: weights
    are read in long rows, and looking up small pages takes as long as the rows."""
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
    """Ask the system to keep this memory in RAM; False where it refuses (RLIMIT_MEMLOCK) or cannot."""
    if sys.platform == "win32" or not array.nbytes:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)) == 0


def load_tensors(
    files: Mapping[str, tuple[Path, TensorInfo]],
    shapes: Mapping[str, tuple[int, ...]],
    wrap: Callable[[np.ndarray, str, tuple[int, ...]], Any],
) -> dict[str, Any]:
    """Read the tensors named in `shapes` and give each to `wrap(bytes, dtype, shape)`.

    Raises FormatError for one that is missing, of another shape or dtype; ReadError when the disk fails.
    """
    places, total = {}, 0
    for name, shape in shapes.items():
        if name not in files:
            raise FormatError(f"the checkpoint lacks the tensor {name!r}; convert it again")
        path, info = files[name]
        if tuple(info.shape) != tuple(shape) or info.dtype not in DTYPES:
            raise FormatError(f"{path}: {name!r} is {info.dtype} {list(info.shape)}, the config asks for {list(shape)}")
        places[name] = total
        total += -(-info.nbytes // ALIGN) * ALIGN
    memory = anonymous(total)
    lock_memory(memory)
    tensors = {}
    for name, at in places.items():
        path, info = files[name]
        raw = memory[at : at + info.nbytes]
        _read_into(path, info.offset, raw)
        tensors[name] = wrap(raw, DTYPES[info.dtype], tuple(info.shape))
    return tensors


def _read_into(path: Path, offset: int, memory: np.ndarray) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view, done = memory.data, 0
            while done < len(view):
                count = file.readinto(view[done : done + PIECE])
                if not count:
                    raise ReadError(f"{path}: the file ends {len(view) - done} bytes early")
                if hasattr(os, "posix_fadvise"):  # a second copy in the page cache would cost memory twice
                    os.posix_fadvise(file.fileno(), offset + done, count, os.POSIX_FADV_DONTNEED)
                done += count
    except OSError as error:
        raise ReadError(f"{path}: reading failed: {error}") from error
