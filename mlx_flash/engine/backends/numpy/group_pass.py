"""One FFN on the numpy backend whose bundles are groups of neurons, as a checkpoint quantised them.

A group's columns of `down` share scales along the neurons, so its terms are sums of short rows: y_r += scale_r *
(codes_r . h) + bias_r * sum(h). The order of the sum is that of single neurons (`base.BLOCK`), groups ascending within
a block. Knows slabs only by their `matrices`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import SEGMENTS, FFNSpec, block_of
from mlx_flash.engine.backends.numpy.kernels.base import Kernels, activate
from mlx_flash.engine.numerics.affine import AffineBundles

from .decode_pass import FFNInput, Rows
from .prefill_pass import TILE_ROWS, Load, PrefillPass
from .tiles import Tiles


def _check_blocks(spec: FFNSpec, first_id: int, count: int) -> None:
    size, end, total = block_of(spec.layout), first_id + count, spec.layout.count
    if first_id % size or (end % size and end != total) or not 0 <= first_id <= end <= total:
        raise ValueError(f"ids {first_id}..{end} of {total} are not whole blocks of {size}")


class GroupPrefill(PrefillPass):
    """Several tokens."""

    def __init__(self, tiles: Tiles, spec: FFNSpec, x: np.ndarray):
        super().__init__(tiles, spec, x)
        self.tile_rows = max(TILE_ROWS, spec.layout.neurons)

    def gate(self, slab: Rows) -> np.ndarray:
        raise ValueError("groups of neurons have no gate to select by")

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        _check_blocks(self.spec, first_id, count)
        size, neurons = block_of(self.spec.layout), self.spec.layout.neurons
        for begin in range(0, count, size):
            length = min(size, count - begin)
            held = np.arange(first_row + begin, first_row + begin + length)
            scalars = self._add_block((first_id + begin) * neurons, length * neurons, self._from(slab, held))
            if h is not None:
                h[:, begin * neurons : (begin + length) * neurons] = scalars

    def down(self) -> None:
        terms, self.terms = self.terms, []
        size, count = block_of(self.spec.layout), self.spec.layout.count
        present = [np.unique(term[0] // size) for term in terms]
        for block in np.unique(np.concatenate(present)) if present else ():
            begin, end = int(block) * size, min((int(block) + 1) * size, count)
            neurons = self.spec.layout.neurons
            self._add_block(begin * neurons, (end - begin) * neurons, self._selected(terms, begin))

    def _from(self, slab: Rows, bundles: np.ndarray) -> Load:
        neurons = self.spec.layout.neurons

        def load(name: str, rows: slice, columns: slice, out: np.ndarray) -> None:
            part: Any = slab.matrices[name]
            out[...] = part[bundles[rows.start // neurons : -(-rows.stop // neurons)]].widen(columns)

        return load

    def _selected(self, terms: list[tuple[np.ndarray, Rows, np.ndarray]], first: int) -> Load:
        """The groups of a block, which begins with group `first`, that were selected; zeros for the others."""
        neurons = self.spec.layout.neurons

        def load(name: str, rows: slice, columns: slice, out: np.ndarray) -> None:
            out[...] = 0
            begin, end = first + rows.start // neurons, first + -(-rows.stop // neurons)
            for ids, slab, places in terms:
                part: Any = slab.matrices[name]
                for k in np.flatnonzero((ids >= begin) & (ids < end)):
                    at = (ids[k] - begin) * neurons
                    out[at : at + neurons] = part[places[k : k + 1]].widen(columns)

        return load


class GroupDecode(FFNInput):
    """One token."""

    def __init__(self, kernels: Kernels, spec: FFNSpec, x: np.ndarray):
        super().__init__(spec, x)
        self.kernels, self.x = kernels, self.x[0]
        self.sums = np.zeros((SEGMENTS, len(self.x)), np.float32)
        self.terms: list[tuple[np.ndarray, Any, np.ndarray, np.ndarray]] = []  # ids, down, rows, h (n, neurons)

    def gate(self, slab: Rows) -> np.ndarray:
        raise ValueError("groups of neurons have no gate to select by")

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray, late: np.ndarray | None = None) -> None:
        rows = np.asarray(rows)
        self.terms.append((np.asarray(ids), slab.matrices["down"], rows, self._scalars(slab, np.asarray(ids), rows)))

    def _scalars(self, slab: Rows, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """h (n, neurons) of the bundles `ids` (n,) in these rows."""
        if self.bias is not None or self.second_bias is not None:
            return self._biased_scalars(slab, ids, rows)
        first: Any = slab.matrices[self.first]
        second: Any = None if self.second is None else slab.matrices[self.second]
        found = self.kernels.group_neurons(first, second, rows, self.x, acts=self.acts, cutoff=self.spec.cutoff)
        return found

    def _biased_scalars(self, slab: Rows, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The same where there are biases, for which the kernel has no place."""

        def products(part: str, bias: np.ndarray | None, act: str) -> np.ndarray:
            weights: Any = slab.matrices[part]
            found: np.ndarray = self.kernels.group_neurons(weights, None, rows, self.x)
            if bias is not None:
                found = found + bias.reshape(-1, self.spec.layout.neurons)[ids]
            return activate(act, found)

        h = products(self.first, self.bias, self.acts[0])
        if self.spec.cutoff:
            h[np.abs(h) <= np.float32(self.spec.cutoff)] = 0
        return h if self.second is None else h * products(self.second, self.second_bias, self.acts[1])

    def down(self) -> None:
        terms, self.terms = self.terms, []
        if not terms:
            return
        ids = np.concatenate([term[0] for term in terms])
        order = np.argsort(ids, kind="stable")
        source = np.repeat(np.arange(len(terms)), [len(term[0]) for term in terms])[order]
        rows, h = (np.concatenate([term[k] for term in terms])[order] for k in (2, 3))
        self._add([term[1] for term in terms], source, rows, h, ids[order])

    def _add(
        self, sources: list[AffineBundles], source: np.ndarray, rows: np.ndarray, h: np.ndarray, ids: np.ndarray
    ) -> None:
        size = block_of(self.spec.layout)
        first, last = ids[0] // size, ids[-1] // size
        edges = np.arange(first + 1, last + 1) * size
        starts = np.concatenate([[0], np.searchsorted(ids, edges), [len(ids)]])
        self.kernels.add_groups(sources, source, rows, h, starts, self.segments[first : last + 1], self.sums)

    def total(self) -> np.ndarray:
        return self.kernels.total(self.sums, None)[None]

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        _check_blocks(self.spec, first_id, count)
        rows, ids = np.arange(first_row, first_row + count), np.arange(first_id, first_id + count)
        scalars = self._scalars(slab, ids, rows)
        down: Any = slab.matrices["down"]
        self._add([down], np.zeros(count, np.int64), rows, scalars, ids)
        if h is not None:
            h[0] = scalars.reshape(-1)
