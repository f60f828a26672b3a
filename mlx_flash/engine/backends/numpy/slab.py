"""Slabs of the numpy backend: whole records of the file, or some of their parts, in anonymous memory.

Knows layouts and bytes; neither files nor arithmetic.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_flash.engine.storage.bundle import ALIGN, Layout
from mlx_flash.engine.storage.bundle_weights import VIEWS, coded_rows
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.system.memory import anonymous_memory


def _range(layout: Layout, parts: Sequence[str]) -> tuple[int, int]:
    """First byte and length within a bundle of a run of parts; raises ValueError if they are not one."""
    names = [part.name for part in layout.parts]
    if not parts or parts[0] not in names:
        raise ValueError(f"a slab of parts {list(parts)}: the layout has {names}")
    first = names.index(parts[0])
    if list(parts) != names[first : first + len(parts)]:
        raise ValueError(f"a slab of parts {list(parts)}: they must follow each other as in {names}")
    return layout.offset(parts[0]), sum(part.nbytes for part in layout.parts[first : first + len(parts)])


def _pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


class NumpySlab:
    """`rows` bundles, `row_bytes` apart, in one page-aligned block.

    Whole bundles: a row is a whole record of the file (its stride), so direct I/O lands in it without a copy.
    matrices: of each matrix that is there its share of every row, (rows, d), a view of the weights as they are stored:
    `Weights`, or `AffineBundles`.
    """

    def __init__(self, layout: Layout, rows: int, parts: Sequence[str]):
        self.rows, self.parts = rows, tuple(parts)
        begin, length = _range(layout, parts)
        self.row_bytes = -(-length // ALIGN) * ALIGN
        self.nbytes = _pages(rows * self.row_bytes)
        memory = anonymous_memory(self.nbytes)[: rows * self.row_bytes].reshape(rows, self.row_bytes)
        whole = len(parts) == len(layout.parts)
        self.targets = (Target(begin, memory if whole else memory[:, :length]),)
        self._views: dict[str, np.ndarray] = {}
        for name in parts:
            part, at = layout.part(name), layout.offset(name) - begin
            flat = memory[:, at : at + part.nbytes]
            dtype = VIEWS[part.dtype]
            self._views[name] = flat.view(dtype) if rows else np.empty((0, part.length), dtype)
        self.matrices: dict[str, Any] = {}
        for name in layout.matrices:
            held = [self._views[part] for part in layout.parts_of(name) if part in parts]
            if held:
                self.matrices[name] = held[0] if layout.quantisation is None else coded_rows(held, layout, name)


def slab_bytes(layout: Layout, rows: int, parts: Sequence[str]) -> int:
    """Bytes that a slab takes, in whole pages."""
    return _pages(rows * (-(-_range(layout, parts)[1] // ALIGN) * ALIGN))
