"""One FFN on the numpy backend for one token, through the kernels (several tokens: `prefill_pass`).

Puts the terms into the order that `base.BLOCK` states, wherever their rows lie. Knows slabs only by their `matrices`;
neither files nor residency.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlx_flash.engine.backends.base import BLOCK, SEGMENTS, FFNSpec, Fired
from mlx_flash.engine.backends.numpy.kernels.base import EarlySums, Kernels, Weights, add_dense, widen

_NO_IDS = np.empty(0, np.int64)


class Rows(Protocol):
    """A slab as a pass sees it: `matrices` has each matrix' share of every row, (rows, d) as it is stored."""

    matrices: dict[str, Any]


def _wide(w: Any) -> np.ndarray:
    out = np.empty(w.shape, np.float32)
    widen(w, out)
    return out


class FFNInput(ABC):
    """What the passes share: the spec, the input, and how the output is finished."""

    def __init__(self, spec: FFNSpec, x: np.ndarray):
        self.spec = spec
        self.first, self.second = spec.first, spec.second
        lead = "" if spec.gated and self.first == "up" else spec.activation
        self.acts = (lead, spec.activation if self.second == "gate" else "")  # of the first part and the second
        # Of the first part and the second, (count,) fp32.
        self.bias, self.second_bias = (
            None if (bias := spec.biases[part]) is None else _wide(bias) for part in (self.first, self.second)
        )
        self.x = np.ascontiguousarray(x, np.float32)
        self.segments = spec.segments

    def settle(self) -> None:  # noqa: B027
        """Nothing is ever pending on a slab except what was given to `scalars` without `down`."""

    @abstractmethod
    def total(self) -> np.ndarray:
        """The sum of all terms (T, d), in memory of its own."""

    def result(self) -> np.ndarray:
        """The FFN's output (T, d)."""
        y = self.total()
        if self.spec.down_bias is not None:
            y += _wide(self.spec.down_bias)
        return y


class BlockSums:
    """Memory for the sums of one pass's blocks, used by one pass after the other."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)
        self._finish: Callable[[], Any] | None = None

    def take(self, blocks: int, d: int) -> np.ndarray:
        """(blocks, d) fp32, contents undefined."""
        if self._finish is not None:
            self._finish()  # a pass that was cut short may still be writing
            self._finish = None
        if self._memory.size < blocks * d:
            self._memory = np.empty(blocks * d, np.float32)
        return self._memory[: blocks * d].reshape(blocks, d)

    def used_until(self, finish: Callable[[], Any]) -> None:
        """The memory taken last is written to until `finish` has returned."""
        self._finish = finish


class Term:
    """Ids (n,) whose scalars are being computed, and where their down rows lie: `rows` of `down` (., d)."""

    def __init__(self, ids: np.ndarray, down: Weights, rows: np.ndarray, begun: Callable[[], np.ndarray]):
        self.ids, self.down, self.rows, self._begun = ids, down, rows, begun

    def finish(self) -> None:
        self.h = self._begun()
        self._fired = self.h != 0

    def fired(self) -> np.ndarray:
        """Which fired, (n,) bool, once finished."""
        return self._fired

    def left(self, of: np.ndarray | None = None) -> Term:
        """The ids that fired (and are marked in `of`), once finished."""
        wanted = self._fired if of is None else self._fired & of
        if wanted.all():
            return self
        kept = wanted.nonzero()[0]
        found = Term(self.ids[kept], self.down, self.rows[kept], self._begun)
        found.h = self.h[kept]
        return found


def _in_order(terms: list[Term]) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]:
    """Which term, row, scalar and id, by ascending ids; which term is None where there is one alone."""
    if len(terms) == 1 and (terms[0].ids[1:] > terms[0].ids[:-1]).all():
        return None, terms[0].rows, terms[0].h, terms[0].ids
    ids = np.concatenate([_NO_IDS, *(term.ids for term in terms)])
    order = np.argsort(ids, kind="stable")
    source = np.repeat(np.arange(len(terms)), [len(term.ids) for term in terms])[order]
    rows = np.concatenate([_NO_IDS, *(term.rows for term in terms)])[order]
    h = np.concatenate([np.empty(0, np.float32), *(term.h for term in terms)])[order]
    return source, rows, h, ids[order]


class BegunSums(NamedTuple):
    """Sums (blocks, d) that are being computed of the blocks from `first` on; the blocks `lacking` (n,) wait for more
    terms."""

    first: int
    lacking: np.ndarray
    sums: np.ndarray


class DecodePass(FFNInput):
    """One token. A neuron whose activation is zero adds exactly nothing, so `gate` and `dense` give the same bits:
    both are the same dot products and the same sums over the same neurons."""

    def __init__(self, kernels: Kernels, spec: FFNSpec, x: np.ndarray, memory: BlockSums | None = None):
        super().__init__(spec, x)
        self.kernels, self.x = kernels, self.x[0]
        self.sums = np.zeros((SEGMENTS, len(self.x)), np.float32)
        self.memory = memory or BlockSums()
        self.summed: Weights | None = None  # some of the rows whose terms were added
        self.active: np.ndarray | None = None
        self.terms: list[Term] = []
        self._begun: BegunSums | None = None

    def _options(self, bias: np.ndarray | None) -> dict[str, Any]:
        return {"bias": bias, "acts": self.acts, "cutoff": self.spec.cutoff}

    def gate(self, slab: Rows) -> np.ndarray:
        self.active = self.kernels.neurons(slab.matrices[self.first], None, None, self.x, **self._options(self.bias))
        return np.flatnonzero(self.active).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: Rows, rows: np.ndarray, late: np.ndarray | None = None) -> Fired:
        if self.second_bias is not None:
            h = self._with_second_bias(slab, ids, rows)
            term = Term(ids, slab.matrices["down"], rows, lambda: h)
            self.terms.append(term)
            return term.fired
        first, second, down = None, None if self.second is None else slab.matrices[self.second], slab.matrices["down"]
        if self.active is not None:
            options: dict[str, Any] = {"given": self.active[ids], "acts": self.acts}
        else:
            first, options = slab.matrices[self.first], self._options(None if self.bias is None else self.bias[ids])
        # Sums of quantised rows begin when all are there, and others where hardly a block waits for nothing.
        if late is None or not isinstance(down, np.ndarray) or len(late) * BLOCK > self.spec.layout.count:
            begun = self.kernels.begin_neurons(first, second, rows, self.x, **options)
        else:
            early = EarlySums(down, *self._begin_sums(ids, late))
            begun = self.kernels.begin_neurons(first, second, rows, self.x, **options, early=early)
            self.memory.used_until(begun)
        term = Term(ids, down, rows, begun)
        self.terms.append(term)
        return term.fired

    def _with_second_bias(self, slab: Rows, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """h of these ids where the second part has a bias, for which no kernel has a place; in two products."""
        assert self.second is not None and self.second_bias is not None
        if self.active is not None:
            h = self.active[ids]
        else:
            options = self._options(None if self.bias is None else self.bias[ids])
            h = self.kernels.neurons(slab.matrices[self.first], None, rows, self.x, **options)
        options = {"bias": self.second_bias[ids], "acts": (self.acts[1], "")}
        found: np.ndarray = h * self.kernels.neurons(slab.matrices[self.second], None, rows, self.x, **options)
        return found

    def _begin_sums(self, ids: np.ndarray, late: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `ids` each block's sum consists of, none where it waits for late ones, and memory for the sums."""
        first, end = int(ids[0]) // BLOCK, int(ids[-1]) // BLOCK + 1
        if len(late):
            first, end = min(first, int(late.min()) // BLOCK), max(end, int(late.max()) // BLOCK + 1)
        lacking = np.unique(late // BLOCK) - first
        edges = ids.searchsorted(np.arange(first, end + 1) * BLOCK)
        spans = np.stack([edges[:-1], edges[1:]], 1)
        spans[lacking, 1] = spans[lacking, 0]
        self._begun = BegunSums(first, lacking, self.memory.take(end - first, len(self.x)))
        return spans, self._begun.sums

    def down(self) -> None:
        terms, self.terms = self.terms, []
        begun, self._begun = self._begun, None
        for term in terms:
            term.finish()
        if begun is None:
            terms = [term.left() for term in terms]
        else:
            lacks = np.zeros(len(begun.sums), bool)
            lacks[begun.lacking] = True
            terms = [terms[0].left(lacks[terms[0].ids // BLOCK - begun.first]), *(term.left() for term in terms[1:])]
        source, rows, h, ids = _in_order(terms)
        if begun is not None:
            edges, others = (begun.first + begun.lacking) * BLOCK, (begun.sums, begun.lacking)
            segments = self.segments[begun.first : begun.first + len(begun.sums)]
        elif len(ids):
            first, end = ids[0] // BLOCK, ids[-1] // BLOCK + 1
            edges, others, segments = np.arange(first, end) * BLOCK, None, self.segments[first:end]
        else:
            return
        starts, downs = np.append(ids.searchsorted(edges), len(ids)), [term.down for term in terms]
        self.kernels.add_blocks(downs, source, rows, h, starts, segments, self.sums, others)
        self.summed = downs[0]

    def dense(self, slab: Rows, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        check_whole_blocks(first_id, count, self.spec.layout.count)
        here = slice(first_row, first_row + count)
        self.summed = down = slab.matrices["down"][here]
        sums = self.sums, BLOCK, self.segments[first_id // BLOCK : -(-(first_id + count) // BLOCK)]
        if self.second_bias is not None:
            ids, rows = np.arange(first_id, first_id + count), np.arange(first_row, first_row + count)
            scalars = self._with_second_bias(slab, ids, rows)
            add_dense(self.kernels, down, scalars, *sums)
        else:
            bias = None if self.bias is None else self.bias[first_id : first_id + count]
            first, second = (
                slab.matrices[self.first][here],
                None if self.second is None else slab.matrices[self.second][here],
            )
            scalars = self.kernels.dense(first, second, down, self.x, *sums, **self._options(bias))
        if h is not None:
            h[0] = scalars

    def total(self) -> np.ndarray:
        return self.kernels.total(self.sums, self.summed)[None]


def check_whole_blocks(first_id: int, count: int, total: int) -> None:
    end = first_id + count
    if first_id % BLOCK or (end % BLOCK and end != total) or not 0 <= first_id <= end <= total:
        raise ValueError(f"ids {first_id}..{end} of {total} are not whole blocks of {BLOCK}")
