"""One FFN on the numpy backend, for one token, through the kernels (several tokens: `numpy_prefill`).

Owns the order of the sum: blocks of `BLOCK` ids ascending, ids ascending within a block, wherever the rows lie.
Knows slabs only by `part(name)`; neither files nor residency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from .base import BLOCK, FFNSpec, Fired
from .kernels import Kernels, Weights, widen


class Rows(Protocol):
    """What a pass needs of a slab: a part of every row, (rows, length) in its storage dtype."""

    def part(self, name: str) -> Weights: ...


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


class Term:
    """Ids whose scalars are being computed: `down` (., d) holds their last part, in `rows`. Once finished only those
    that fired are left."""

    def __init__(self, ids: np.ndarray, down: Weights, rows: np.ndarray, begun: Callable[[], np.ndarray]):
        self.ids, self.down, self.rows, self._begun = ids, down, rows, begun

    def finish(self) -> None:
        self.h = self._begun()
        self._fired = self.h != 0
        if not self._fired.all():
            kept = np.flatnonzero(self._fired)
            self.ids, self.rows, self.h = self.ids[kept], self.rows[kept], self.h[kept]

    def fired(self) -> np.ndarray:
        """Which fired, (n,) bool, once finished."""
        return self._fired


class DecodePass(FFNInput):
    """One token. A neuron whose activation is zero adds exactly nothing, so `gate` and `dense` give the same bits:
    both are the same dot products and the same sums over the same neurons."""

    def __init__(self, kernels: Kernels, spec: FFNSpec, x: np.ndarray):
        super().__init__(spec, x)
        self.kernels, self.x, self.out = kernels, self.x[0], self.y[0]
        self.active: np.ndarray | None = None
        self.terms: list[Term] = []

    def _options(self, bias: np.ndarray | None) -> dict[str, Any]:
        return {"bias": bias, "acts": self.acts, "cutoff": self.spec.cutoff}

    def gate(self, slab: Rows) -> np.ndarray:
        self.active = self.kernels.neurons(slab.part(self.first), None, None, self.x, **self._options(self.bias))
        return np.flatnonzero(self.active).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray) -> Fired:
        second = None if self.second is None else slab.part(self.second)
        if self.active is not None:
            given = self.active[ids]
            begun = self.kernels.begin_neurons(None, second, rows, self.x, given=given, acts=self.acts)
        else:
            options = self._options(None if self.bias is None else self.bias[ids])
            begun = self.kernels.begin_neurons(slab.part(self.first), second, rows, self.x, **options)
        term = Term(ids, slab.part("down"), rows, begun)
        self.terms.append(term)
        return term.fired

    def down(self) -> None:
        terms, self.terms = self.terms, []
        for term in terms:
            term.finish()
        if len(terms) == 1 and (terms[0].ids[1:] > terms[0].ids[:-1]).all():
            term = terms[0]
            self._add([term.down], None, term.rows, term.h, term.ids)
        elif terms:
            ids = np.concatenate([term.ids for term in terms])
            order = np.argsort(ids, kind="stable")
            source = np.repeat(np.arange(len(terms)), [len(term.ids) for term in terms])[order]
            rows = np.concatenate([term.rows for term in terms])[order]
            h = np.concatenate([term.h for term in terms])[order]
            self._add([term.down for term in terms], source, rows, h, ids[order])

    def _add(
        self, sources: list[Weights], source: np.ndarray | None, rows: np.ndarray, h: np.ndarray, ids: np.ndarray
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
        first, down = slab.part(self.first)[here], slab.part("down")[here]
        scalars = self.kernels.dense(first, second, down, self.x, self.out, BLOCK, **self._options(bias))
        if h is not None:
            h[0] = scalars


def check_whole_blocks(first_id: int, count: int, total: int) -> None:
    end = first_id + count
    if first_id % BLOCK or (end % BLOCK and end != total) or not 0 <= first_id <= end <= total:
        raise ValueError(f"ids {first_id}..{end} of {total} are not whole blocks of {BLOCK}")
