"""One FFN on the numpy backend: a token at a time through the kernels, or a prompt's tokens through BLAS.

Owns the order of the sum: blocks of `BLOCK` ids ascending, ids ascending within a block, wherever the rows lie.
Knows slabs only by `part(name)`; neither files nor residency.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from .base import BLOCK, FFNSpec
from .kernels import Kernels, widen


class Rows(Protocol):
    """What a pass needs of a slab: a part of every row, (rows, length) in its storage dtype."""

    def part(self, name: str) -> np.ndarray: ...


class Scratch:
    """fp32 memory that is kept and reused, by name; it grows to the largest shape asked for."""

    def __init__(self) -> None:
        self._flat: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape, contents undefined."""
        items = int(np.prod(shape))
        if name not in self._flat or self._flat[name].size < items:
            self._flat.pop(name, None)  # free the old one first
            self._flat[name] = np.empty(items, np.float32)
        return self._flat[name][:items].reshape(shape)


def activate(name: str, values: np.ndarray) -> np.ndarray:
    """The activation, in place. values: contiguous fp32."""
    if name == "relu":
        return np.maximum(values, np.float32(0), out=values)
    if name != "silu":
        raise ValueError(f"unknown activation {name!r}; known: relu, silu")
    divisor = np.negative(values)
    with np.errstate(over="ignore"):  # exp(-x) may be inf: x / inf is 0, as it should be
        np.exp(divisor, out=divisor)
    divisor += np.float32(1)
    return np.divide(values, divisor, out=values)


def _wide(w: Any) -> np.ndarray:
    out = np.empty(w.shape, np.float32)
    widen(w, out)
    return out


class _Pass:
    """What both passes share: the spec, the input, the output so far."""

    def __init__(self, spec: FFNSpec, x: np.ndarray):
        self.spec = spec
        self.first, self.second = spec.first, spec.second
        self.bias = None if spec.gated or spec.up_bias is None else _wide(spec.up_bias)
        self.x = np.ascontiguousarray(x, np.float32)
        self.y = np.zeros(x.shape, np.float32)

    def _lead(self, values: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """What the leading part's products (..., n) become, in place: activation, unless it is applied to the second
        part, and cut."""
        if bias is not None:
            values += bias
        if not (self.spec.gated and self.first == "up"):
            activate(self.spec.activation, values)
        if self.spec.cutoff:
            values[np.abs(values) <= np.float32(self.spec.cutoff)] = 0
        return values

    def _follow(self, values: np.ndarray) -> np.ndarray:
        """What the second part's products become, in place."""
        return activate(self.spec.activation, values) if self.second == "gate" else values

    def settle(self) -> None:
        """Nothing is ever pending on a slab except what was given to `scalars` without `down`."""

    def result(self) -> np.ndarray:
        """The FFN's output (T, d)."""
        if self.spec.down_bias is not None:
            self.y += _wide(self.spec.down_bias)
        return self.y


class DecodePass(_Pass):
    """One token. A neuron whose activation is zero adds exactly nothing, so `gate` and `dense` give the same bits:
    both are the same dot products and the same sums over the same neurons."""

    def __init__(self, kernels: Kernels, spec: FFNSpec, x: np.ndarray):
        super().__init__(spec, x)
        self.kernels, self.x, self.out = kernels, self.x[0], self.y[0]
        self.active: np.ndarray | None = None
        self.terms: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # ids, down rows, rows, h

    def _scale(self, active: np.ndarray, slab: Rows, rows: np.ndarray) -> np.ndarray:
        """h of the neurons in these rows, given what the leading part made."""
        if self.second is None:
            return active
        return active * self._follow(self.kernels.dots(slab.part(self.second), rows, self.x))

    def gate(self, slab: Rows) -> np.ndarray:
        self.active = self._lead(self.kernels.dots(slab.part(self.first), None, self.x), self.bias)
        return np.flatnonzero(self.active).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray) -> np.ndarray:
        if self.active is not None:
            active = self.active[ids]
        else:
            bias = None if self.bias is None else self.bias[ids]
            active = self._lead(self.kernels.dots(slab.part(self.first), rows, self.x), bias)
        fired = active != 0
        kept = np.flatnonzero(fired)
        h = self._scale(active[kept], slab, rows[kept])
        self.terms.append((ids[kept], slab.part("down"), rows[kept], h))
        return fired

    def down(self) -> None:
        terms, self.terms = self.terms, []
        if not terms:
            return
        ids = np.concatenate([term[0] for term in terms])
        source = np.repeat(np.arange(len(terms)), [len(term[0]) for term in terms])
        rows = np.concatenate([term[2] for term in terms])
        h = np.concatenate([term[3] for term in terms])
        order = np.argsort(ids, kind="stable")
        self._add([term[1] for term in terms], source[order], rows[order], h[order], ids[order])

    def _add(
        self, sources: list[np.ndarray], source: np.ndarray, rows: np.ndarray, h: np.ndarray, ids: np.ndarray
    ) -> None:
        """Add the terms of `ids`, ascending, block by block."""
        if len(ids):
            edges = np.arange(ids[0] // BLOCK + 1, ids[-1] // BLOCK + 1) * BLOCK
            starts = np.concatenate([[0], np.searchsorted(ids, edges), [len(ids)]])
            self.kernels.add_blocks(sources, source, rows, h, starts, self.out)

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        _check_whole_blocks(first_id, count, self.spec.layout.count)
        bias = None if self.bias is None else self.bias[first_id : first_id + count]
        leading = slab.part(self.first)[first_row : first_row + count]
        active = self._lead(self.kernels.dots(leading, None, self.x), bias)
        kept = np.flatnonzero(active)
        rows = kept + first_row
        scalars = self._scale(active[kept], slab, rows)
        self._add([slab.part("down")], np.zeros(len(kept), np.int64), rows, scalars, kept + first_id)
        if h is not None:
            h[...] = 0
            h[0, kept] = scalars


class PrefillPass(_Pass):
    """Several tokens. Each block of ids is widened to fp32 at full size, rows that were not selected as zeros, so that
    BLAS sees the same shapes whatever is resident or selected."""

    def __init__(self, scratch: Scratch, spec: FFNSpec, x: np.ndarray):
        super().__init__(spec, x)
        self.scratch = scratch
        self.active: np.ndarray | None = None
        self.terms: list[tuple[np.ndarray, Rows, np.ndarray]] = []  # ids, slab, rows

    def _product(self, weights: np.ndarray, name: str) -> np.ndarray:  # (n, d) -> (T, n)
        return np.matmul(self.x, weights.T, out=self.scratch.get(name, (len(self.x), len(weights))))

    def _leading(self, weights: np.ndarray, first_id: int) -> np.ndarray:
        bias = None if self.bias is None else self.bias[first_id : first_id + len(weights)]
        return self._lead(self._product(weights, "first"), bias)

    def _block(self, count: int) -> np.ndarray:
        return self.scratch.get("weights", (count, self.x.shape[1]))

    def _add(self, h: np.ndarray, weights: np.ndarray) -> None:
        self.y += np.matmul(h, weights, out=self.scratch.get("sum", self.y.shape))

    def gate(self, slab: Rows) -> np.ndarray:
        w, count = slab.part(self.first), self.spec.layout.count
        self.active = self.scratch.get("active", (len(self.x), count))
        for begin in range(0, count, BLOCK):
            weights = self._block(min(BLOCK, count - begin))
            widen(w[begin : begin + BLOCK], weights)
            self.active[:, begin : begin + BLOCK] = self._leading(weights, begin)
        return np.flatnonzero(self.active.any(axis=0)).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray) -> None:
        self.terms.append((np.asarray(ids), slab, np.asarray(rows)))

    def down(self) -> None:
        terms, self.terms = self.terms, []
        present = [np.unique(term[0] // BLOCK) for term in terms]
        for block in np.unique(np.concatenate(present)) if present else ():
            begin = int(block) * BLOCK
            count = min(BLOCK, self.spec.layout.count - begin)
            h = self.scratch.get("first", (len(self.x), count))
            if self.active is not None:
                h[...] = self.active[:, begin : begin + count]
            else:
                self._leading(self._gather(terms, self.first, begin, count), begin)
            if self.second is not None:
                h *= self._follow(self._product(self._gather(terms, self.second, begin, count), "up"))
            self._add(h, self._gather(terms, "down", begin, count))

    def _gather(
        self, terms: list[tuple[np.ndarray, Rows, np.ndarray]], part: str, begin: int, count: int
    ) -> np.ndarray:
        weights = self._block(count)
        weights[...] = 0
        for ids, slab, rows in terms:
            mine = np.flatnonzero((ids >= begin) & (ids < begin + count))
            weights[ids[mine] - begin] = _wide(slab.part(part)[rows[mine]])
        return weights

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        _check_whole_blocks(first_id, count, self.spec.layout.count)
        for begin in range(0, count, BLOCK):
            weights = self._block(min(BLOCK, count - begin))
            rows = slice(first_row + begin, first_row + begin + len(weights))
            widen(slab.part(self.first)[rows], weights)
            scalars = self._leading(weights, first_id + begin)
            if self.second is not None:
                widen(slab.part(self.second)[rows], weights)
                scalars *= self._follow(self._product(weights, "up"))
            if h is not None:
                h[:, begin : begin + BLOCK] = scalars
            widen(slab.part("down")[rows], weights)
            self._add(scalars, weights)


def _check_whole_blocks(first_id: int, count: int, total: int) -> None:
    end = first_id + count
    if first_id % BLOCK or (end % BLOCK and end != total) or not 0 <= first_id <= end <= total:
        raise ValueError(f"ids {first_id}..{end} of {total} are not whole blocks of {BLOCK}")
