"""Memory for bundles that MLX computes from in place: one array per part, written through a view of its bytes.

Knows parts, rows and shapes; not what is computed from them. Needs mlx.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx
import numpy as np

from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.reader import Target

from .rows import MlxRows, make_rows

DTYPES = {
    **{"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16},
    **{"uint32": mx.uint32, "uint8": mx.uint8},
}
STORAGE = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
PAGE = 16384  # Metal rounds an allocation up to this
SCALAR_ROWS = 64  # selected rows are multiplied in whole groups of this many, so that a row's product has one shape
IN_PLACE = 1.5  # rows multiplied where they lie for each that is wanted: a gathered one is read, written, read again
VIEWS = 64  # kept per slab: those of its resident rows and of a few block lengths


def allocate(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """Zeroed memory: an array, and its bytes (n,) uint8, through which it may be written."""
    # Integers: the buffer protocol has no bfloat16. Viewed whole, once: a view of a slice would copy.
    raw = mx.zeros(shape, STORAGE[dtype.size])
    typed = raw.view(dtype)
    mx.eval(raw, typed)
    return typed, np.frombuffer(raw, np.uint8)  # type: ignore[call-overload]


class MlxExpertSlab:
    """`rows` experts, rows > 0: one contiguous array per part, shape (rows, *shapes[part]), as mlx-lm's stacked experts
    are; `targets` write through its memory."""

    def __init__(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]], rows: int):
        self.rows = rows
        self.nbytes = slab_bytes(layout, rows, [part.name for part in layout.parts])
        self.parts: dict[str, mx.array] = {}
        targets = []
        for part in layout.parts:
            if math.prod(shapes[part.name]) != part.length:
                raise ValueError(f"part {part.name} has {part.length} items, not the shape {shapes[part.name]}")
            self.parts[part.name], memory = allocate((rows, *shapes[part.name]), DTYPES[part.dtype])
            targets.append(Target(layout.offset(part.name), memory.reshape(rows, part.nbytes)))
        self.targets = tuple(targets)


class MlxSlab:
    """One contiguous array per part, shape (rows, length); `targets` write through its memory.

    Columns of a wider array would not do: MLX's quantised kernels copy anything else than contiguous rows.

    unfinished: for a slab of gate rows, what the layer's last pass left to be evaluated (see MlxPass.gate).
    """

    def __init__(self, layout: Layout, rows: int, parts: Sequence[str]):
        self.rows, self._layout = rows, layout
        self._wide = not has_gpu()
        self.nbytes = slab_bytes(layout, rows, parts)
        self.parts: dict[str, mx.array] = {}
        self.unfinished: list[mx.array] = []
        self._views: dict[tuple[str, int, int, int, bool], MlxRows] = {}
        targets = []
        for name in parts:
            part = layout.part(name)
            dtype = DTYPES[part.dtype]
            if rows == 0:
                self.parts[name] = mx.zeros((0, part.length), dtype)
                targets.append(Target(layout.offset(name), np.empty((0, part.nbytes), np.uint8)))
                continue
            self.parts[name], memory = allocate((rows, part.length), dtype)
            targets.append(Target(layout.offset(name), memory.reshape(rows, part.nbytes)))
        self.targets = tuple(targets)

    def view(self, matrix: str, row: int, groups: int, length: int, across: bool = False) -> MlxRows:
        """A matrix' rows `row`.. in place, as (groups, length, d); across: for x . row.

        Kept: the first evaluation that uses a view makes it an array on the slab's memory, from which the next graphs
        begin. Slicing and reshaping are operations like any other: anew for every token they cost a small model more
        than its products.
        """
        key = matrix, row, groups, length, across
        found = self._views.get(key)
        if found is None:
            found = self._made([array[row : row + groups * length] for array in self._arrays(matrix)], groups, across)
            if len(self._views) >= VIEWS:
                self._views.clear()
            self._views[key] = found
        return found

    def taken(self, matrix: str, index: mx.array, groups: int, across: bool = False) -> MlxRows:
        """Copies of a matrix' rows `index` (n,), as so many groups."""
        return self._made([mx.take(array, index, axis=0) for array in self._arrays(matrix)], groups, across)

    def _arrays(self, matrix: str) -> list[mx.array]:
        return [self.parts[name] for name in self._layout.parts_of(matrix)]

    def _made(self, arrays: Sequence[mx.array], groups: int, across: bool) -> MlxRows:
        return make_rows(arrays, groups, self._layout.quantisation, across, self._wide)


def has_gpu() -> bool:
    """Whether MLX has a GPU here: Metal or CUDA."""
    return bool(mx.metal.is_available() or mx.cuda.is_available())


def slab_bytes(layout: Layout, rows: int, parts: Sequence[str]) -> int:
    """Bytes that a slab's arrays take, each rounded up to whole pages as Metal does."""
    return sum(-(-rows * layout.part(name).nbytes // PAGE) * PAGE for name in parts)


@dataclass
class Found:
    """Selected ids whose scalars are on their way: h (1, T, at least n), its first n columns for ids (n,).

    run: the rows follow each other in the order of the ids.
    """

    ids: np.ndarray
    slab: MlxSlab
    rows: np.ndarray
    scalars: mx.array
    run: bool


def is_run(rows: np.ndarray) -> bool:
    """Whether rows (n,), n > 0, are consecutive and ascending."""
    return int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all())


def window(rows: np.ndarray, run: bool, available_rows: int) -> tuple[int, int] | None:
    """First and end of the slab's rows to multiply where they lie, so that `rows` (n,) are among them; None: too many
    of the others are."""
    if available_rows < SCALAR_ROWS:
        return None
    if run:
        return int(rows[0]), int(rows[-1]) + 1
    end = int(rows.max()) + 1  # from 0: slots are filled from there, and few different views are needed
    return (0, end) if end <= IN_PLACE * len(rows) else None


def padded(index: np.ndarray) -> np.ndarray:
    """Indices (n,) as uint32, the first one repeated up to whole groups of SCALAR_ROWS."""
    groups = np.full(-(-len(index) // SCALAR_ROWS) * SCALAR_ROWS, index[0], np.uint32)
    groups[: len(index)] = index
    return groups


def gather(found: list[Found], order: np.ndarray) -> MlxRows:
    """Down rows (1, n, d) of positions `order` in the concatenation of `found`."""
    rows = np.concatenate([each.rows for each in found]).astype(np.uint32)[order]
    slabs = list({id(each.slab): each.slab for each in found}.values())
    if len(slabs) == 1:
        return slabs[0].taken("down", mx.array(rows), 1)
    source = np.concatenate([np.full(len(e.ids), slabs.index(e.slab)) for e in found])[order]
    # Slab by slab, then back into the order of ids.
    by_slab = np.argsort(source, kind="stable")
    taken = [
        slab.taken("down", mx.array(rows[source == number]), 1)
        for number, slab in enumerate(slabs)
        if (source == number).any()
    ]
    if len(taken) == 1:
        return taken[0]
    back = mx.array(np.argsort(by_slab).astype(np.uint32))
    return reduce(MlxRows.followed_by, taken).ordered(back)


def pieces(count: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and end of each run of equal values (n,), n > 0."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    yield from zip(edges, edges[1:], strict=False)


class Lagging:
    """Evaluates arrays, two at once and no more: so many copies are alive, and the device is never left idle."""

    def __init__(self) -> None:
        self._last: list[mx.array] = []

    def start(self, arrays: list[mx.array]) -> None:
        mx.async_eval(*arrays)
        if self._last:
            mx.eval(self._last)
        self._last = arrays
