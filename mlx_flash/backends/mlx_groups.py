"""One layer's FFN in MLX arrays where bundles are groups of neurons that share the scales of `down`. Needs mlx.

The products are mlx-lm's own, bit for bit: gate and up with the rows at hand, `down` in one product over all of its
columns, which are put side by side first. Columns that passed through staging are copied before they go, so that the
result is the same at every budget. Copying takes as long as two products more: little, next to reading from a disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..storage.layout import Layout
from .base import FFNSpec
from .mlx_rows import MlxRows
from .mlx_slab import DTYPES, MlxSlab, is_run
from .mlx_sum import ACTIVATIONS

DOWN_COPIES = 3  # of a layer's `down`, at most: pieces, put side by side, in order


@dataclass
class _Piece:
    """ids (n,), their neurons' h (1, T, n, neurons), and codes, scales and biases of down, each (d, n, .)."""

    ids: np.ndarray
    scalars: mx.array
    down: list[mx.array]


class MlxGroupPass:
    """See `base.FFNPass`; x (..., d). Lazy: rows that `dense` and `down` were given are in use until `settle`."""

    def __init__(self, spec: FFNSpec, x: mx.array):
        assert spec.layout.quantisation is not None
        self._spec, self._coded = spec, spec.layout.quantisation
        self._activation = ACTIVATIONS[spec.activation]
        self._shape, self._dtype = x.shape, x.dtype
        self._x = x.reshape(1, -1, x.shape[-1]).astype(DTYPES[spec.layout.dtype])  # (1, T, d)
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
        """The FFN's output, shape and dtype of x."""
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
        rows = MlxRows(tuple(array.reshape(len(array), -1) for array in down), self._coded, True)
        whole = rows.product(scalars.reshape(1, self._x.shape[1], -1))
        return whole.astype(self._dtype).reshape(self._shape)

    def _add(self, ids: np.ndarray, slab: MlxSlab, rows: np.ndarray) -> None:
        gate, up = (MlxRows(self._held(slab, name, rows), self._coded, True) for name in ("gate", "up"))
        scalars = self._activation.times(gate.product(self._x), up.product(self._x))
        if self._spec.cutoff:
            lead = self._activation.alone(gate.product(self._x))
            scalars = mx.where(mx.abs(lead) > self._spec.cutoff, scalars, 0)
        down = [array.reshape(len(ids), self._spec.layout.dim, -1) for array in self._held(slab, "down", rows)]
        shape = (1, self._x.shape[1], len(ids), -1)
        self._pieces.append(_Piece(ids, scalars.reshape(shape), [array.swapaxes(0, 1) for array in down]))

    def _held(self, slab: MlxSlab, matrix: str, rows: np.ndarray) -> tuple[mx.array, ...]:
        """Codes, scales and biases of a matrix' rows of these bundles, back to back: where they lie, if they follow
        each other."""
        inner = self._spec.layout.dim if matrix == "down" else self._coded.group_size
        index = None if is_run(rows) else mx.array(rows.astype(np.uint32))
        found = []
        for name in self._spec.layout.parts_of(matrix):
            whole = slab.parts[name]
            part = whole[int(rows[0]) : int(rows[-1]) + 1] if index is None else mx.take(whole, index, axis=0)
            found.append(part.reshape(len(rows) * inner, -1))
        return tuple(found)


def _joined(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)


def scratch_bytes(layout: Layout, tokens: int, item: int) -> int:
    """What a pass takes at most: copies of a layer's `down`, of gate and up where they are gathered, and h and what it
    is made of."""
    neurons = layout.count * layout.neurons
    return layout.count * (DOWN_COPIES + 2) * layout.matrix_bytes("down") + 4 * tokens * neurons * item
