"""One FFN of a prompt on the numpy backend: blocks of ids through BLAS, in tiles of fixed shapes.

Each block of ids is widened to fp32 at full size, rows that were not selected as zeros, so that BLAS sees the same
shapes whatever is resident or selected. Knows slabs only by their `matrices`; neither files nor residency.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_flash.engine.backends.base import BLOCK, SEGMENTS, FFNSpec
from mlx_flash.engine.backends.numpy.kernels.base import activate, widen

from .decode_pass import FFNInput, Rows, check_whole_blocks
from .tiles import Scratch, Tiles

TILE_ROWS, TILE_COLUMNS = 64, 512  # of gate and up, and of down, in one product
Load = Callable[[str, slice, slice, np.ndarray], None]  # part, rows of the block, columns, where to
Additions = list[tuple[np.ndarray, np.ndarray]]  # to each first array the second one, in this order


class SegmentTree:
    """The sums (T, d) of a prompt's segments, added pairwise as soon as both halves of a pair are complete: at most
    LIVE of them are in memory at once. An empty segment has None in place of a sum."""

    LIVE = 4

    def __init__(self) -> None:
        self.sum: np.ndarray | None = None  # of the segment under way
        self._segment = 0
        self._complete: list[np.ndarray | None] = []  # the parts of the tree left of it, ever smaller ones

    def enter(self, segment: int) -> Additions:
        """The next blocks are of `segment`; SEGMENTS: there are no more. The additions returned must be made now.
        Raises ValueError for a segment before the one under way."""
        if segment < self._segment:
            raise ValueError(f"blocks are added in ascending order: segment {segment} came after {self._segment}")
        additions: Additions = []
        while self._segment < segment:
            found, odd = self.sum, self._segment
            while odd & 1:  # the right half of a pair
                left = self._complete.pop()
                if left is not None and found is not None:
                    additions.append((left, found))
                found, odd = found if left is None else left, odd >> 1
            self._complete.append(found)
            self.sum, self._segment = None, self._segment + 1
        return additions

    def root(self) -> np.ndarray | None:
        """The sum of all segments, when SEGMENTS has been entered and the additions are made."""
        return self._complete[0]


class PrefillPass(FFNInput):
    """Several tokens."""

    tile_rows = TILE_ROWS

    def __init__(self, tiles: Tiles, spec: FFNSpec, x: np.ndarray):
        super().__init__(spec, x)
        self.tiles, self.tree = tiles, SegmentTree()
        self.active: np.ndarray | None = None
        self.terms: list[tuple[np.ndarray, Rows, np.ndarray]] = []  # ids, slab, rows

    def gate(self, slab: Rows) -> np.ndarray:
        count = self.spec.layout.count
        self.active = active = self.tiles.scratch.get("active", (len(self.x), count))
        weights = slab.matrices[self.first]

        def tile(scratch: Scratch, k: int) -> None:
            rows = slice(k * TILE_ROWS, min((k + 1) * TILE_ROWS, count))
            active[:, rows] = self._lead(self._product(scratch, scratch.wide(weights[rows])), rows)

        self.tiles.each(-(-count // TILE_ROWS), tile)
        return np.flatnonzero(active.any(axis=0)).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray, late: np.ndarray | None = None) -> None:
        self.terms.append((np.asarray(ids), slab, np.asarray(rows)))

    def down(self) -> None:
        terms, self.terms = self.terms, []
        present = [np.unique(term[0] // BLOCK) for term in terms]
        for block in np.unique(np.concatenate(present)) if present else ():
            begin = int(block) * BLOCK
            self._add_block(begin, min(BLOCK, self.spec.layout.count - begin), _gather(terms, begin))

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        check_whole_blocks(first_id, count, self.spec.layout.count)
        for begin in range(0, count, BLOCK):
            row = first_row + begin

            def load(name: str, rows: slice, columns: slice, out: np.ndarray, row: int = row) -> None:
                widen(slab.matrices[name][row + rows.start : row + rows.stop, columns], out)

            scalars = self._add_block(first_id + begin, min(BLOCK, count - begin), load)
            if h is not None:
                h[:, begin : begin + BLOCK] = scalars

    def _add_block(self, first_id: int, count: int, load: Load) -> np.ndarray:
        """Add the terms of ids first_id.. ; returns their scalars (T, count), in memory that is used again."""
        dim = self.x.shape[1]
        h = self.tiles.scratch.get("h", (len(self.x), count))
        additions = self.tree.enter(int(self.segments[first_id // BLOCK]))
        total, begins = self.tree.sum, self.tree.sum is None
        if total is None:
            total = self.tree.sum = np.empty(self.x.shape, np.float32)

        def neurons(scratch: Scratch, k: int) -> None:
            rows = slice(k * self.tile_rows, min((k + 1) * self.tile_rows, count))
            ids = slice(first_id + rows.start, first_id + rows.stop)
            weights = scratch.get("wide", (rows.stop - rows.start, dim))
            if self.active is not None:
                lead = self.active[:, ids]
            else:
                load(self.first, rows, slice(None), weights)
                lead = self._lead(self._product(scratch, weights), ids)
            h[:, rows] = lead
            if self.second is not None:
                load(self.second, rows, slice(None), weights)
                follow = self._product(scratch, weights)
                if self.second_bias is not None:
                    follow += self.second_bias[ids]
                h[:, rows] *= activate(self.acts[1], follow)

        def columns(scratch: Scratch, k: int) -> None:
            mine = slice(k * TILE_COLUMNS, min((k + 1) * TILE_COLUMNS, dim))
            weights = scratch.get("wide", (count, mine.stop - mine.start))
            load("down", slice(0, count), mine, weights)
            for left, right in additions:
                left[:, mine] += right[:, mine]
            if begins:
                np.matmul(h, weights, out=total[:, mine])
            else:
                total[:, mine] += np.matmul(h, weights, out=scratch.get("sum", (len(h), mine.stop - mine.start)))

        self.tiles.each(-(-count // self.tile_rows), neurons)
        self.tiles.each(-(-dim // TILE_COLUMNS), columns)
        return h

    def total(self) -> np.ndarray:
        additions = self.tree.enter(SEGMENTS)

        def rows(scratch: Scratch, k: int) -> None:
            for left, right in additions:
                left[k] += right[k]

        if additions:
            self.tiles.each(len(self.x), rows)
        root = self.tree.root()
        return np.zeros(self.x.shape, np.float32) if root is None else root

    def _product(self, scratch: Scratch, weights: np.ndarray) -> np.ndarray:  # (n, d) -> (T, n)
        return np.matmul(self.x, weights.T, out=scratch.get("product", (len(self.x), len(weights))))

    def _lead(self, values: np.ndarray, ids: slice) -> np.ndarray:
        """What the leading part's products (T, n) become, in place."""
        if self.bias is not None:
            values += self.bias[ids]
        activate(self.acts[0], values)
        if self.spec.cutoff:
            values[np.abs(values) <= np.float32(self.spec.cutoff)] = 0
        return values


def _gather(terms: list[tuple[np.ndarray, Rows, np.ndarray]], first_id: int) -> Load:
    """The rows of a block that were selected, wherever they lie; zeros for the others."""

    def load(name: str, rows: slice, columns: slice, out: np.ndarray) -> None:
        out[...] = 0
        for ids, slab, places in terms:
            mine = np.flatnonzero((ids >= first_id + rows.start) & (ids < first_id + rows.stop))
            found = slab.matrices[name][places[mine], columns]
            wide = np.empty(found.shape, np.float32)
            widen(found, wide)
            out[ids[mine] - first_id - rows.start] = wide

    return load
