"""One layer's FFN in MLX arrays where bundles are groups of neurons that share the scales of `down`. Needs mlx.

The products are mlx-lm's own, bit for bit: gate and up with the rows at hand, `down` in one product over all of its
columns, which are put side by side first. So this pass does not add segments of blocks as the others do. Each matrix
has its own quantisation, or none. Columns in staging are copied before staging is used again, so the result is the same
at every budget. A copy takes as long as two products: little, compared with reading from a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flash.engine.backends.base import FFNSpec
from mlx_flash.engine.storage.bundle import Layout, Quantisation

from .rows import MlxRows
from .slab import MlxSlab, is_run
from .terms import ACTIVATIONS

DOWN_COPIES = 3  # of a layer's `down`, at most: pieces, put side by side, in order


@dataclass
class _Piece:
    """ids (n,), their neurons' h (1, T, n, neurons), and down's parts (codes, scales, biases), each (d, n, .)."""

    ids: np.ndarray
    scalars: mx.array
    down: list[mx.array]


class MlxGroupPass:
    """See `base.FFNPass`; x (..., d). Lazy: rows that `dense` and `down` were given are in use until `settle`."""

    def __init__(self, spec: FFNSpec, x: mx.array):
        self._spec = spec
        self._activation = ACTIVATIONS[spec.activation]
        self._shape, self._dtype = x.shape, x.dtype
        self._x = x.reshape(1, -1, x.shape[-1])  # (1, T, d)
        self._pieces: list[_Piece] = []
        self._copied = 0  # pieces that need no slab any more
        self._result: mx.array | None = None

    def gate(self, slab: MlxSlab) -> np.ndarray:
        raise ValueError("groups of neurons have no gate to select by")

    def scalars(self, ids: np.ndarray, slab: MlxSlab, rows: np.ndarray, late: np.ndarray | None = None) -> None:
        """Start computing h of the neurons of `ids` (n,), which lie in `rows` (n,) of `slab`."""
        if len(ids):
            self._add(np.asarray(ids), slab, np.asarray(rows))
            mx.async_eval(self._pieces[-1].scalars)

    def down(self) -> None:
        """Nothing: `result` adds the terms of all ids at once."""

    def dense(self, slab: MlxSlab, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        """Add ids `first_id..first_id+count` from consecutive rows."""
        self._add(np.arange(first_id, first_id + count), slab, np.arange(first_row, first_row + count))
        if h is not None:
            h[...] = np.array(self._pieces[-1].scalars.reshape(h.shape).astype(mx.float32))

    def settle(self) -> None:
        """When it returns, nothing pending reads any slab."""
        if self._result is not None:
            mx.eval(self._result)
            return
        late = self._pieces[self._copied :]
        for piece in late:
            # Not `mx.contiguous`, which gives the slab's own memory where a piece is one group.
            piece.down = [mx.take(array, mx.arange(len(piece.ids)), axis=1) for array in piece.down]
        mx.eval([[piece.scalars, *piece.down] for piece in late])
        self._copied = len(self._pieces)

    def result(self) -> mx.array:
        """The FFN's output, shape of x; its dtype is that of mlx-lm's, which can be wider than x's."""
        self._result = self._whole() if self._pieces else mx.zeros(self._shape, self._dtype)
        self._pieces.clear()
        return self._result

    def _whole(self) -> mx.array:
        scalars = _joined([piece.scalars for piece in self._pieces], 2)
        down = [_joined(list(arrays), 1) for arrays in zip(*(piece.down for piece in self._pieces), strict=True)]
        order = np.argsort(np.concatenate([piece.ids for piece in self._pieces]), kind="stable")
        if not is_run(order):
            index = mx.array(order.astype(np.uint32))
            scalars, down = mx.take(scalars, index, axis=2), [mx.take(array, index, axis=1) for array in down]
        coded, arrays = self._spec.layout.coding("down"), [array.reshape(len(array), -1) for array in down]
        rows = _across(arrays, coded)
        whole = rows.product(scalars.reshape(1, self._x.shape[1], -1))
        if self._spec.down_bias is not None:
            whole = whole + self._spec.down_bias
        return whole.reshape(self._shape)

    def _add(self, ids: np.ndarray, slab: MlxSlab, rows: np.ndarray) -> None:
        spec, neurons = self._spec, self._spec.layout.neurons

        def products(matrix: str) -> mx.array:
            found, bias = self._products(matrix, slab, rows), spec.biases[matrix]
            if bias is None:
                return found
            which = (ids[:, None] * neurons + np.arange(neurons)).reshape(-1)
            return found + mx.take(bias, mx.array(which.astype(np.uint32)))

        scalars = products(spec.first)
        if spec.gated:
            gate, scalars = scalars, self._activation.times(scalars, products("up"))
            if spec.cutoff:
                scalars = mx.where(mx.abs(self._activation.alone(gate)) > spec.cutoff, scalars, 0)
        else:
            scalars = self._activation.alone(scalars)
        down = [array.reshape(len(ids), spec.layout.dim, -1) for array in self._held(slab, "down", rows)]
        shape = (1, self._x.shape[1], len(ids), -1)
        self._pieces.append(_Piece(ids, scalars.reshape(shape), [array.swapaxes(0, 1) for array in down]))

    def _products(self, matrix: str, slab: MlxSlab, rows: np.ndarray) -> mx.array:
        """x times a matrix' rows of the bundles in these rows of the slab, (1, T, n)."""
        return _across(self._held(slab, matrix, rows), self._spec.layout.coding(matrix)).product(self._x)

    def _held(self, slab: MlxSlab, matrix: str, rows: np.ndarray) -> tuple[mx.array, ...]:
        """A matrix' parts of these bundles, rows back to back: where they lie, if they follow each other."""
        inner = self._spec.layout.dim if matrix == "down" else self._spec.layout.neurons
        index = None if is_run(rows) else mx.array(rows.astype(np.uint32))
        found = []
        for name in self._spec.layout.parts_of(matrix):
            whole = slab.parts[name]
            part = whole[int(rows[0]) : int(rows[-1]) + 1] if index is None else mx.take(whole, index, axis=0)
            found.append(part.reshape(len(rows) * inner, -1))
        return tuple(found)


def _across(arrays: Sequence[mx.array], coded: Quantisation | None) -> MlxRows:
    """Rows (n, .), for x . row."""
    return MlxRows((arrays[0].T,) if coded is None else tuple(arrays), coded, True)


def _joined(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)


def scratch_bytes(layout: Layout, tokens: int, item: int) -> int:
    """Most bytes that a pass takes: copies of a layer's `down`, of gate and up where they are gathered, and h with the
    products that it is computed from."""
    neurons = layout.count * layout.neurons
    return layout.count * (DOWN_COPIES + 2) * layout.matrix_bytes("down") + 4 * tokens * neurons * item
