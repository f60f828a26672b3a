"""The Numba kernels: bf16 and fp16 rows are decoded in registers, and only the rows asked for are read.

Checks row lengths, dtypes and row numbers, which compiled code does not, cuts the work into tasks and shares it among
threads. The arithmetic is in `loops`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import SEGMENTS
from mlx_flash.engine.backends.decoder_base import Activations, Attention
from mlx_flash.engine.numerics.affine import AffineBundles, AffineRows

from . import loops
from .attention_compiled import attention_steps
from .base import EarlySums, Weights, add_dense
from .quantised import QuantisedKernels
from .thread_pool import Steps, Workers, when
from .vector_code import BFLOAT16, FLOAT16, FLOAT32, INT8

KINDS = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.uint16): BFLOAT16,
    np.dtype(np.float16): FLOAT16,
    np.dtype(np.int8): INT8,
}
ACTS = {"": 0, "relu": loops.RELU, "silu": loops.SILU}
_ALL = np.empty(0, np.int64)  # in place of the rows: all of them


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def _check_rows(*arrays: np.ndarray) -> None:
    for array in arrays:
        apart = array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize
        if array.dtype not in KINDS or apart:
            raise ValueError(f"weights of {array.dtype}, strides {array.strides}: rows must be contiguous")


def _check_alike(*parts: np.ndarray) -> None:
    """Raise ValueError unless the parts have one dtype, shape and distance between rows."""
    _check_rows(*parts)
    w = parts[0]
    if any(part.dtype != w.dtype or part.shape != w.shape or part.strides != w.strides for part in parts):
        raise ValueError(f"parts {[(part.dtype, part.shape, part.strides) for part in parts]} differ")


def _check_input(x: np.ndarray, n: int) -> None:
    if x.dtype != np.float32 or x.shape != (n,) or not x.flags.c_contiguous:
        raise ValueError(f"x is {x.dtype} {x.shape}, the rows have {n} items; x must be contiguous fp32")


def _chosen(rows: np.ndarray | None, count: int) -> np.ndarray:
    """Rows as int64, empty for None. Raises IndexError for one outside 0..count-1."""
    if rows is None:
        return _ALL
    chosen = np.array(rows, np.int64)
    if loops.outside(chosen, count):
        raise IndexError(f"rows {chosen.min()}..{chosen.max()} of {count}")
    return chosen


def _check_scalars(count: int, *values: np.ndarray | None) -> None:
    for each in values:
        if each is not None and (each.shape != (count,) or each.dtype != np.float32):
            raise ValueError(f"{each.dtype} {each.shape} for {count} rows")


def _check_sums(sums: np.ndarray, blocks: int, d: int) -> None:
    if sums.dtype != np.float32 or sums.shape != (blocks, d) or not sums.flags.c_contiguous:
        raise ValueError(f"sums {sums.dtype} {sums.shape} for {blocks} blocks of {d}; they must be contiguous fp32")


def _checked_segments(segments: np.ndarray, blocks: int, y: np.ndarray) -> np.ndarray:
    """The segment of each block as int64. Raises ValueError unless y (SEGMENTS, d) has a row for it."""
    _check_sums(y, SEGMENTS, y.shape[-1])
    found = np.array(segments, np.int64)
    if found.shape != (blocks,) or loops.outside(found, SEGMENTS):
        raise ValueError(f"segments {found} of {blocks} blocks; there are {SEGMENTS}")
    return found


def _checked_spans(early: EarlySums, count: int) -> np.ndarray:
    """The spans as contiguous int64. Raises ValueError for one outside 0..count."""
    spans = early.spans
    begin, end = spans[:, 0], spans[:, 1]
    if (begin < 0).any() or (begin > end).any() or (end > count).any():
        raise ValueError(f"spans {spans.tolist()[:4]}... over {count} scalars")
    _check_sums(early.sums, len(spans), early.down.shape[1])
    return np.ascontiguousarray(spans, np.int64)


class CompiledKernels:
    """See `base.Kernels`."""

    name = "numba"

    def __init__(self) -> None:
        self._workers = Workers()
        self._quantised = QuantisedKernels(self._workers)
        self._sums = np.empty((0, 0), np.float32)
        self._lock = threading.Lock()  # of _sums

    @property
    def executor(self) -> Workers:
        return self._workers

    @property
    def threads(self) -> int:
        return self._workers.count

    @threads.setter
    def threads(self, count: int) -> None:
        self._workers.count = count

    def dots(self, w: Weights, rows: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        if isinstance(w, AffineRows):
            return self._quantised.dots(w, rows, x)
        _check_rows(w)
        n = w.shape[1]
        _check_input(x, n)
        chosen = _chosen(rows, len(w))
        out = np.empty(len(w) if rows is None else len(chosen), np.float32)
        if not len(out):
            return out
        tasks = self._workers.tasks(len(out) * n * w.itemsize, len(out))
        chosen_at = 0 if rows is None else chosen
        self._workers.run(loops.dots, tasks, KINDS[w.dtype], w, w.strides[0], chosen_at, len(out), x, n, out)
        return out

    def low_rank(
        self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray
    ) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
        _check_rows(a, b)
        (rank, n), count = a.shape, len(b)
        if a.dtype != b.dtype or b.shape != (count, rank) or bias.shape != (count,):
            raise ValueError(f"a {a.dtype} {a.shape}, b {b.dtype} {b.shape}, bias {bias.shape}")
        if not rank:  # calibration found nothing to tell the neurons apart by
            return lambda x: lambda: bias.astype(np.float32)
        bias = np.ascontiguousarray(bias, np.float32)
        weights = KINDS[a.dtype], a, a.strides[0], rank, b, b.strides[0], count

        def begin(x: np.ndarray) -> Callable[[], np.ndarray]:
            _check_input(x, n)
            out, z, tasks = np.empty(count, np.float32), np.empty(rank, np.float32), self._workers.tasks
            first = tasks(a.nbytes, rank)
            run = loops.low_rank, first + tasks(b.nbytes, count), first
            return when(self._workers.start(*run, *weights, x, n, np.float32(step), bias, z, out), out)

        return begin

    def neurons(self, *parts: Any, **options: Any) -> np.ndarray:
        return self.begin_neurons(*parts, **options)()

    def begin_neurons(
        self,
        first: Weights | None,
        second: Weights | None,
        rows: np.ndarray | None,
        x: np.ndarray,
        *,
        given: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
        early: EarlySums | None = None,
    ) -> Callable[[], np.ndarray]:
        down = None if early is None else early.down
        parts = [part for part in (first, second, down) if part is not None]
        if not parts:
            assert given is not None
            return lambda: given
        if isinstance(parts[0], AffineRows):
            options: Any = {"given": given, "bias": bias, "acts": acts, "cutoff": cutoff}
            return self._quantised.begin_neurons(first, second, rows, x, **options)
        _check_alike(*parts)
        w, n = parts[0], parts[0].shape[1]
        _check_input(x, n)
        chosen = _chosen(rows, len(w))
        h = np.empty(len(w) if rows is None else len(chosen), np.float32)
        if not len(h):
            return lambda: h
        _check_scalars(len(h), given, bias)
        spans = 0 if early is None else _checked_spans(early, len(h))
        blocks = 0 if early is None else len(early.spans)
        tasks = self._workers.tasks(len(h) * n * w.itemsize * len(parts), len(h)) + blocks
        finish = self._workers.start(
            loops.neurons,
            tasks,
            KINDS[w.dtype],
            0 if first is None else first,
            0 if second is None else second,
            w.strides[0],
            0 if rows is None else chosen,
            len(h),
            x,
            n,
            0 if bias is None else np.ascontiguousarray(bias),
            0 if given is None else np.ascontiguousarray(given),
            ACTS[acts[0]],
            ACTS[acts[1]],
            np.float32(cutoff),
            h,
            np.empty_like(h),
            blocks,
            spans,
            0 if down is None else down,
            0 if early is None else early.sums,
        )
        return when(finish, h)

    def add_blocks(
        self,
        sources: Sequence[Weights],
        source: np.ndarray | None,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        segments: np.ndarray,
        y: np.ndarray,
        others: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        blocks, d = len(starts) - 1, y.shape[1]
        segments = _checked_segments(segments, blocks if others is None else len(others[0]), y)
        if isinstance(sources[0], AffineRows):
            self._quantised.add_blocks(sources, source, rows, h, starts, segments, y)
            return
        _check_rows(*sources)
        if len({w.dtype for w in sources}) != 1 or any(w.shape[1] != d for w in sources):
            raise ValueError(f"sources {[(w.dtype, w.shape) for w in sources]} for y {y.shape}")
        table = np.array([(_address(w), w.strides[0], len(w)) for w in sources], np.int64)
        which = _ALL if source is None else np.array(source, np.int64)
        rows, found = np.array(rows, np.int64), np.empty(len(rows), np.int64)
        if loops.addresses(table, which, rows, found):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {[len(w) for w in sources]}")
        # Few blocks (one, when blocks are streamed) are cut into columns as well, 256 and more.
        tasks = self._workers.tasks(len(rows) * d * sources[0].itemsize, blocks * max(1, d // 256))
        across = -(-tasks // max(1, blocks))
        with self._lock:
            sums, which = (self._blocks(blocks, d), np.arange(blocks)) if others is None else others
            _check_sums(sums, len(sums), d)
            if len(which) != blocks or loops.outside(which, len(sums)):
                raise ValueError(f"{blocks} blocks as {which} of {len(sums)}")
            self._workers.run(
                loops.tiles,
                blocks * across,
                KINDS[sources[0].dtype],
                found,
                np.array(h, np.float32),
                np.array(starts, np.int64),
                across,
                np.array(which, np.int64),
                sums,
                d,
            )
            loops.fold(sums, segments, y)

    def total(self, y: np.ndarray, like: Weights | None) -> np.ndarray:
        _check_sums(y, SEGMENTS, y.shape[-1])
        out = np.empty(y.shape[1], np.float32)
        loops.add_pairwise(y, out)
        return self._quantised.in_order(out, like) if isinstance(like, AffineRows) else out

    def dense(
        self,
        first: Weights,
        second: Weights | None,
        down: Weights,
        x: np.ndarray,
        y: np.ndarray,
        block: int,
        segments: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
    ) -> np.ndarray:
        blocks = -(-len(down) // block)
        if (
            isinstance(first, AffineRows) or blocks < 2 * self.threads or down.strides != first.strides
        ):  # too few tasks, or no records
            h = self.neurons(first, second, None, x, bias=bias, acts=acts, cutoff=cutoff)
            add_dense(self, down, h, y, block, segments)
            return h
        _check_alike(*[part for part in (first, second, down) if part is not None])
        _check_input(x, y.shape[1])
        if down.shape[1] != y.shape[1]:
            raise ValueError(f"parts of {down.shape} for y {y.shape}")
        segments, h = _checked_segments(segments, blocks, y), np.empty(len(first), np.float32)
        with self._lock:
            sums = self._blocks(blocks, y.shape[1])
            self._workers.run(
                loops.records,
                blocks,
                KINDS[first.dtype],
                first,
                0 if second is None else second,
                down,
                first.strides[0],
                len(first),
                x,
                first.shape[1],
                0 if bias is None else np.ascontiguousarray(bias, np.float32),
                ACTS[acts[0]],
                ACTS[acts[1]],
                np.float32(cutoff),
                block,
                h,
                sums,
            )
            loops.fold(sums, segments, y)
        return h

    def _blocks(self, blocks: int, d: int) -> np.ndarray:
        """(blocks, d) fp32 for sums; `_lock` is held while they are used."""
        if self._sums.size < blocks * d:
            self._sums = np.empty((blocks, d), np.float32)
        return self._sums.reshape(-1)[: blocks * d].reshape(blocks, d)

    def group_neurons(self, *parts: Any, **options: Any) -> np.ndarray:
        return self._quantised.group_neurons(*parts, **options)

    def add_groups(
        self,
        sources: Sequence[AffineBundles],
        source: np.ndarray,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        segments: np.ndarray,
        y: np.ndarray,
    ) -> None:
        segments = _checked_segments(segments, len(starts) - 1, y)
        self._quantised.add_groups(sources, source, rows, h, starts, segments, y)

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
        if weight.shape != rows.shape[1:]:
            raise ValueError(f"weight {weight.shape} for rows of {rows.shape[1]}")
        out, weight = np.empty_like(rows), np.ascontiguousarray(weight, np.float32)
        loops.norm(_address(rows), *rows.shape, _address(weight), np.float32(eps), _address(out))
        return out.reshape(x.shape)

    def attention(self, layer: Attention, memory: Activations) -> Callable[[], None] | None:
        return attention_steps(self._workers, layer, KINDS[layer.keys.dtype], memory, self._add_dots).run

    def _add_dots(self, steps: Steps, w: Weights, x: np.ndarray, out: np.ndarray) -> None:
        """`dots` of all rows, as further steps."""
        if isinstance(w, AffineRows):
            self._quantised.add_dots(steps, w, x, out)
            return
        _check_rows(w)
        n = w.shape[1]
        _check_input(x, n)
        tasks = self._workers.tasks(len(out) * n * w.itemsize, len(out))
        steps.add(loops.dots, tasks, KINDS[w.dtype], w, w.strides[0], 0, len(out), x, n, out)
