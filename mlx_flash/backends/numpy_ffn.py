"""One FFN on the numpy backend, for one token, through the kernels (several tokens: `numpy_prefill`).

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


def _wide(w: Any) -> np.ndarray:
    out = np.empty(w.shape, np.float32)
    widen(w, out)
    return out


class FFNInput:
    """What both passes share: the spec, the input, the output so far."""

    def __init__(self, spec: FFNSpec, x: np.ndarray):
        self.spec = spec
        self.first, self.second = spec.first, spec.second
        lead = "" if spec.gated and self.first == "up" else spec.activation
        self.acts = (lead, spec.activation if self.second == "gate" else "")  # of the first part and the second
        self.bias = None if spec.gated or spec.up_bias is None else _wide(spec.up_bias)
        self.x = np.ascontiguousarray(x, np.float32)
        self.y = np.zeros(x.shape, np.float32)

    def settle(self) -> None:
        """Nothing is ever pending on a slab except what was given to `scalars` without `down`."""

    def result(self) -> np.ndarray:
        """The FFN's output (T, d)."""
        if self.spec.down_bias is not None:
            self.y += _wide(self.spec.down_bias)
        return self.y


class DecodePass(FFNInput):
    """One token. A neuron whose activation is zero adds exactly nothing, so `gate` and `dense` give the same bits:
    both are the same dot products and the same sums over the same neurons."""

    def __init__(self, kernels: Kernels, spec: FFNSpec, x: np.ndarray):
        super().__init__(spec, x)
        self.kernels, self.x, self.out = kernels, self.x[0], self.y[0]
        self.active: np.ndarray | None = None
        self.terms: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # ids, down rows, rows, h

    def _neurons(self, slab: Rows, rows: np.ndarray | None, bias: np.ndarray | None, lead_only: bool = False) -> Any:
        second = None if self.second is None or lead_only else slab.part(self.second)
        cutoff = self.spec.cutoff
        return self.kernels.neurons(
            slab.part(self.first), second, rows, self.x, bias=bias, acts=self.acts, cutoff=cutoff
        )

    def gate(self, slab: Rows) -> np.ndarray:
        self.active = self._neurons(slab, None, self.bias, lead_only=True)
        return np.flatnonzero(self.active).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray) -> np.ndarray:
        if self.active is not None:
            second = None if self.second is None else slab.part(self.second)
            h = self.kernels.neurons(None, second, rows, self.x, given=self.active[ids], acts=self.acts)
        else:
            h = self._neurons(slab, rows, None if self.bias is None else self.bias[ids])
        fired = h != 0
        if not fired.all():
            kept = np.flatnonzero(fired)
            ids, rows, h = ids[kept], rows[kept], h[kept]
        self.terms.append((ids, slab.part("down"), rows, h))
        return fired

    def down(self) -> None:
        terms, self.terms = self.terms, []
        if len(terms) == 1:
            ids, down, rows, h = terms[0]
            if (ids[1:] > ids[:-1]).all():
                self._add([down], None, rows, h, ids)
                return
        if not terms:
            return
        ids = np.concatenate([term[0] for term in terms])
        order = np.argsort(ids, kind="stable")
        source = np.repeat(np.arange(len(terms)), [len(term[0]) for term in terms])[order]
        rows = np.concatenate([term[2] for term in terms])[order]
        h = np.concatenate([term[3] for term in terms])[order]
        self._add([term[1] for term in terms], source, rows, h, ids[order])

    def _add(
        self, sources: list[np.ndarray], source: np.ndarray | None, rows: np.ndarray, h: np.ndarray, ids: np.ndarray
    ) -> None:
        """Add the terms of `ids`, ascending, block by block; source as in `Kernels.add_blocks`."""
        if len(ids):
            edges = np.arange(ids[0] // BLOCK + 1, ids[-1] // BLOCK + 1) * BLOCK
            starts = np.concatenate([[0], np.searchsorted(ids, edges), [len(ids)]])
            self.kernels.add_blocks(sources, source, rows, h, starts, self.out)

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        check_whole_blocks(first_id, count, self.spec.layout.count)
        bias = None if self.bias is None else self.bias[first_id : first_id + count]
        here = slice(first_row, first_row + count)
        second = None if self.second is None else slab.part(self.second)[here]
        scalars = self.kernels.dense(
            slab.part(self.first)[here],
            second,
            slab.part("down")[here],
            self.x,
            self.out,
            BLOCK,
            bias=bias,
            acts=self.acts,
            cutoff=self.spec.cutoff,
        )
        if h is not None:
            h[0] = scalars


def check_whole_blocks(first_id: int, count: int, total: int) -> None:
    end = first_id + count
    if first_id % BLOCK or (end % BLOCK and end != total) or not 0 <= first_id <= end <= total:
        raise ValueError(f"ids {first_id}..{end} of {total} are not whole blocks of {BLOCK}")
