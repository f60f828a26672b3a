"""The Numba kernels: bf16 and fp16 rows are decoded in registers, and only the rows asked for are touched.

Checks what compiled code takes on trust, cuts the work into tasks and shares it among threads. Row lengths, dtypes and
rows are checked here; the arithmetic is in `kernels_llvm`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from . import kernels_llvm as compiled
from .workers import Workers

KINDS = {
    np.dtype(np.float32): compiled.FLOAT32,
    np.dtype(np.uint16): compiled.BFLOAT16,
    np.dtype(np.float16): compiled.FLOAT16,
    np.dtype(np.int8): compiled.INT8,
}
_ALL = np.empty(0, np.int64)  # in place of the rows: all of them


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _check_rows(*arrays: np.ndarray) -> None:
    for array in arrays:
        apart = array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize
        if array.dtype not in KINDS or apart:
            raise ValueError(f"weights of {array.dtype}, strides {array.strides}: rows must be contiguous")


class KernelSet:
    """See `kernels.Kernels`."""

    name = "numba"

    def __init__(self) -> None:
        self._workers = Workers()
        self._sums = np.empty((0, 0), np.float32)
        self._lock = threading.Lock()  # of _sums

    @property
    def threads(self) -> int:
        return self._workers.count

    @threads.setter
    def threads(self, count: int) -> None:
        self._workers.count = count

    def dots(self, w: np.ndarray, rows: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        _check_rows(w)
        chosen = _ALL if rows is None else np.array(rows, np.int64)
        out = np.empty(len(w) if rows is None else len(chosen), np.float32)
        if not len(out):
            return out
        n = w.shape[1]
        if x.dtype != np.float32 or x.shape != (n,) or not x.flags.c_contiguous:
            raise ValueError(f"x is {x.dtype} {x.shape}, the rows have {n} items; x must be contiguous fp32")
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(w):
            raise IndexError(f"rows {chosen.min()}..{chosen.max()} of {len(w)}")
        tasks = self._workers.tasks(len(out) * n * w.itemsize, len(out))
        self._workers.run(compiled.dots, tasks, KINDS[w.dtype], _address(w), w.strides[0], chosen, _address(x), n, out)
        return out

    def add_blocks(
        self,
        sources: Sequence[np.ndarray],
        source: np.ndarray,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        y: np.ndarray,
    ) -> None:
        _check_rows(*sources)
        if len({w.dtype for w in sources}) != 1 or any(w.shape[1:] != y.shape for w in sources):
            raise ValueError(f"sources {[(w.dtype, w.shape) for w in sources]} for y {y.shape}")
        bases = np.array([_address(w) for w in sources], np.int64)
        strides = np.array([w.strides[0] for w in sources], np.int64)
        counts = np.array([len(w) for w in sources], np.int64)
        if len(rows) and not (np.min(rows) >= 0 and np.all(rows < counts[source])):
            raise IndexError(f"rows {np.min(rows)}..{np.max(rows)} of {counts.tolist()}")
        addresses = bases[source] + np.asarray(rows, np.int64) * strides[source]
        blocks, d, itemsize = len(starts) - 1, len(y), sources[0].itemsize
        # Few blocks (one, when blocks are streamed) are cut into columns as well, 256 and more.
        tasks = self._workers.tasks(len(rows) * d * itemsize, blocks * max(1, d // 256))
        across = -(-tasks // blocks)
        with self._lock:
            if self._sums.size < blocks * d:
                self._sums = np.empty((blocks, d), np.float32)
            sums = self._sums.reshape(-1)[: blocks * d].reshape(blocks, d)
            self._workers.run(
                compiled.tiles,
                blocks * across,
                KINDS[sources[0].dtype],
                addresses,
                np.array(h, np.float32),
                np.array(starts, np.int64),
                across,
                sums,
            )
            compiled.fold(sums, y)

    def attend(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
        _check_rows(keys, values)
        (heads, size), (kv_heads, context, _) = q.shape, keys.shape
        if keys.shape != values.shape or keys.strides != values.strides or keys.dtype != values.dtype:
            raise ValueError(f"keys {keys.dtype} {keys.shape} and values {values.dtype} {values.shape} differ")
        if heads % kv_heads or not 0 < length <= context or not q.flags.c_contiguous or q.dtype != np.float32:
            raise ValueError(f"q {q.dtype} {q.shape}, keys {keys.shape}, length {length}")
        weights, out = np.empty((heads, length), np.float32), np.empty((heads, size), np.float32)
        kind, group, run = KINDS[keys.dtype], heads // kv_heads, self._workers.run
        alone = self._workers.tasks(heads * length * size * keys.itemsize, heads) == 1
        (head_stride, stride, _), at = keys.strides, _address
        run(compiled.scores, heads, kind, at(q), size, at(keys), head_stride, stride, group, weights, alone=alone)
        weights *= np.float32(size**-0.5)
        weights -= weights.max(axis=1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=1, keepdims=True)
        run(compiled.weigh, heads, kind, weights, at(values), head_stride, stride, group, out, alone=alone)
        return out
