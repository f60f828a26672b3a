"""Reading the tensors that stay resident into one block of memory, which is locked if the system allows it.

They are neither mapped nor left in the page cache: the system could page them out, and would hold them twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.system.memory import anonymous_memory, lock_memory
from mlx_flash.errors import FormatError, ReadError

from .header import TensorInfo

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32"}
ALIGN = 64  # a cache line, and the widest vector load
PIECE = 64 << 20


def load_tensors(
    files: Mapping[str, tuple[Path, TensorInfo]],
    shapes: Mapping[str, tuple[int, ...]],
    wrap: Callable[[np.ndarray, str, tuple[int, ...]], Any],
) -> dict[str, Any]:
    """Read the tensors named in `shapes`; returns, by name, what `wrap(bytes, dtype, shape)` makes of each.

    Raises FormatError if a tensor is missing or has another shape or dtype, ReadError if the disk fails.
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
    memory = anonymous_memory(total)
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
