"""The Numba kernels on quantised rows: their checks, and how the work is cut into tasks.

`compiled` calls these for `AffineRows` and `AffineBundles`; they keep the same promises. The arithmetic is in
`quantised_loops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mlx_flash.engine.numerics.affine import AffineBundles, AffineRows

from . import loops, quantised_loops
from .quantised_vector_code import ROWS, SHAPES
from .thread_pool import Steps, Workers, when

KINDS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}  # of scales: see `ends_dot`
ACTS = {"": 0, "relu": loops.RELU, "silu": loops.SILU}
NOWHERE = np.zeros(quantised_loops.PLACES, np.int64)  # in place of places
_ALL = np.empty(0, np.int64)  # in place of the rows: all of them


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


class _Form:
    """How rows are quantised, as the numbers that the kernels take. Raises ValueError for a form without a kernel."""

    def __init__(self, w: AffineRows):
        n = w.shape[1]
        if (w.bits, w.group_size) not in SHAPES or w.scales.dtype not in KINDS or w.codes.dtype != np.uint32:
            raise ValueError(f"rows of {n} items, {w.bits} bits, groups of {w.group_size}, {w.scales.dtype} scales")
        for array in (w.codes, w.scales, w.biases):
            if array.size and array.shape[1] > 1 and array.strides[1] != array.itemsize:
                raise ValueError(f"strides {array.strides}: rows must be contiguous")
        self.bits, self.size, self.n = w.bits, w.group_size, n
        self.shape, self.kind = SHAPES.index((w.bits, w.group_size)), KINDS[w.scales.dtype]
        self.words, self.groups, self.per_word = w.codes.shape[1], w.scales.shape[1], 32 // w.bits
        self.rest = self.size // self.per_word
        self.unit_words = max(quantised_loops.LANES, self.rest)
        self.unit_groups = max(1, quantised_loops.LANES // self.rest)
        self.middle = np.float32(1 << (w.bits - 1))

    def same(self, w: AffineRows) -> bool:
        return w.shape[1] == self.n and w.bits == self.bits and KINDS.get(w.scales.dtype) == self.kind

    def check_input(self, x: np.ndarray) -> None:
        if x.dtype != np.float32 or x.shape != (self.n,) or not x.flags.c_contiguous:
            raise ValueError(f"x is {x.dtype} {x.shape}, the rows have {self.n} items; x must be contiguous fp32")

    def memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Memory for an input in the form that the kernels take."""
        return np.empty(self.n, np.float32), np.empty(self.words, np.float32), np.empty(self.groups, np.float32)

    def prepared(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x (n,) in the form that the kernels take."""
        self.check_input(x)
        held = self.memory()
        quantised_loops.prepare(x, self.bits, self.size, self.rest, *held)
        return held


def _places(w: AffineRows | AffineBundles | None) -> np.ndarray:
    """Where rows lie, for `quantised_loops.place`: of codes, scales and biases the address, the bytes from one bundle
    to the next and from one row to the next; then the base-2 logarithm of the rows in a bundle."""
    if w is None:
        return NOWHERE
    numbers: list[int] = []
    for part in (w.codes, w.scales, w.biases):
        numbers += [_address(part), part.strides[0], part.strides[1] if part.ndim == 3 else 0]
    return np.array([*numbers, w.codes.shape[1].bit_length() - 1 if isinstance(w, AffineBundles) else 0], np.int64)


def _chosen(rows: np.ndarray | None, count: int) -> np.ndarray:
    if rows is None:
        return _ALL
    chosen = np.array(rows, np.int64)
    if loops.outside(chosen, count):
        raise IndexError(f"rows {chosen.min()}..{chosen.max()} of {count}")
    return chosen


class QuantisedKernels:
    """`dots`, `begin_neurons` and `add_blocks` of `base.Kernels` on quantised rows."""

    def __init__(self, workers: Workers):
        self._workers = workers
        self._known: WeakKeyDictionary[AffineRows, tuple[_Form, np.ndarray]] = WeakKeyDictionary()

    def _described(self, w: AffineRows) -> tuple[_Form, np.ndarray]:
        """The form and the places of rows, kept as long as the rows: they are needed twice per layer and token."""
        found = self._known.get(w)
        if found is None:
            found = self._known[w] = _Form(w), _places(w)
        return found

    def dots(self, w: AffineRows, rows: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        form, chosen = _Form(w), _chosen(rows, len(w))
        x3 = form.prepared(x)
        out = np.empty(len(w) if rows is None else len(chosen), np.float32)
        if not len(out):
            return out
        tasks = self._workers.tasks(4 * form.words * len(out), len(out))
        scratch = np.empty((tasks, form.groups), np.float32)
        at_rows, numbers = 0 if rows is None else chosen, (len(out), form.words, form.groups, form.middle)
        self._workers.run(
            quantised_loops.dots, tasks, form.shape, form.kind, _places(w), at_rows, *numbers, *x3, scratch, out
        )
        return out

    def add_dots(self, steps: Steps, w: AffineRows, x: np.ndarray, out: np.ndarray) -> None:
        """Append `dots` of all rows to `steps`."""
        form = _Form(w)
        form.check_input(x)
        x3 = form.memory()
        steps.add(
            quantised_loops.prepare_step, 1, x, form.n, form.bits, form.size, form.rest, *x3, form.words, form.groups
        )
        tasks = self._workers.tasks(4 * form.words * len(out), len(out))
        scratch, numbers = np.empty((tasks, form.groups), np.float32), (form.words, form.groups, form.middle)
        steps.add(
            quantised_loops.dots, tasks, form.shape, form.kind, _places(w), 0, len(out), *numbers, *x3, scratch, out
        )
        steps.keep(w)

    def begin_neurons(
        self,
        first: AffineRows | None,
        second: AffineRows | None,
        rows: np.ndarray | None,
        x: np.ndarray,
        *,
        given: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
    ) -> Callable[[], np.ndarray]:
        parts = [part for part in (first, second) if part is not None]
        (form, _), chosen = self._described(parts[0]), _chosen(rows, len(parts[0]))
        if any(not form.same(part) or len(part) != len(parts[0]) for part in parts):
            raise ValueError(f"parts {[(part.bits, part.shape, part.scales.dtype) for part in parts]} differ")
        count = len(parts[0]) if rows is None else len(chosen)
        places = tuple(NOWHERE if part is None else self._described(part)[1] for part in (first, second))
        return self._neurons(form, places, (first, second), chosen, x, given, bias, acts, cutoff, count)

    def _neurons(
        self,
        form: _Form,
        places: Sequence[np.ndarray],
        parts: Any,
        chosen: np.ndarray,
        x: np.ndarray,
        given: np.ndarray | None,
        bias: np.ndarray | None,
        acts: tuple[str, str],
        cutoff: float,
        count: int,
    ) -> Callable[[], np.ndarray]:
        h = np.empty(count, np.float32)
        if not len(h):
            return lambda: h
        for values in (given, bias):
            if values is not None and (values.shape != h.shape or values.dtype != np.float32):
                raise ValueError(f"{values.dtype} {values.shape} for {len(h)} rows")
        tasks = self._workers.tasks(4 * form.words * len(h) * sum(part is not None for part in parts), len(h))
        finish = self._workers.start(
            quantised_loops.neurons,
            tasks,
            form.shape,
            form.kind,
            *places,
            chosen if len(chosen) else 0,
            len(h),
            form.words,
            form.groups,
            form.middle,
            *form.prepared(x),
            np.empty((tasks, form.groups), np.float32),
            0 if bias is None else np.ascontiguousarray(bias),
            0 if given is None else np.ascontiguousarray(given),
            ACTS[acts[0]],
            ACTS[acts[1]],
            np.float32(cutoff),
            h,
            keep=parts,
        )
        return when(finish, h)

    def add_blocks(
        self,
        sources: Sequence[AffineRows],
        source: np.ndarray | None,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        segments: np.ndarray,
        y: np.ndarray,
    ) -> None:
        """As there; the columns of y are in the order of vectors of codes: see `in_order`."""
        form = self._described(sources[0])[0]
        if any(not form.same(w) for w in sources) or y.shape[1] != form.n:
            raise ValueError(f"sources {[(w.bits, w.shape, w.scales.dtype) for w in sources]} for y {y.shape}")
        found, _ = _found(sources, source, rows)
        blocks = len(starts) - 1
        units = max(1, form.words // form.unit_words)
        tasks = self._workers.tasks(len(found[0]) * 4 * form.words, blocks * units)
        across = min(units, -(-tasks // blocks))
        sums = np.empty((blocks, form.n), np.float32)
        self._workers.run(
            quantised_loops.tiles,
            blocks * across,
            form.shape,
            form.kind,
            found,
            found.shape[1],
            np.array(h, np.float32),
            np.array(starts, np.int64),
            across,
            form.unit_words,
            form.unit_groups,
            form.words,
            form.groups,
            np.float32(1 << form.bits),
            np.empty((blocks * across, ROWS + 1, form.groups), np.float32),
            sums,
        )
        loops.fold(sums, segments, y)

    def in_order(self, values: np.ndarray, like: AffineRows) -> np.ndarray:
        """values (n,) whose columns are as `add_blocks` leaves them, in the order of the columns of `like`."""
        form, out = self._described(like)[0], np.empty(len(values), np.float32)
        quantised_loops.spread(values, quantised_loops.LANES, form.per_word, form.rest, True, out)
        return out

    def group_neurons(
        self,
        first: AffineBundles,
        second: AffineBundles | None,
        rows: np.ndarray,
        x: np.ndarray,
        *,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
    ) -> np.ndarray:
        count = first.neurons
        chosen = (_chosen(rows, len(first))[:, None] * count + np.arange(count)).reshape(-1)
        form = _Form(_one(first))
        if second is not None and (not form.same(_one(second)) or second.codes.shape != first.codes.shape):
            raise ValueError(f"parts {first.codes.shape} and {second.codes.shape} differ")
        places = _places(first), _places(second)
        found = self._neurons(form, places, (first, second), chosen, x, None, None, acts, cutoff, len(chosen))()
        return found.reshape(len(rows), count)

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
        one = _one(sources[0])
        form, d = _Form(one), sources[0].codes.shape[1]
        shapes = [(w.bits, w.codes.shape[1:], w.scales.dtype) for w in sources]
        if (
            len(set(shapes)) != 1
            or y.shape[1] != d
            or d % quantised_loops.LANES
            or form.groups != 1
            or h.shape[1] != form.n
        ):
            raise ValueError(f"sources {shapes} for h {h.shape} and y {y.shape}")
        found, inner = _found(sources, source, rows)
        width = max(quantised_loops.LANES, form.words)
        factors = np.empty((len(rows), form.per_word * width), np.float32)
        less, totals = np.empty((len(rows), width), np.float32), np.empty(len(rows), np.float32)
        quantised_loops.spread_group(np.ascontiguousarray(h, np.float32), form.bits, form.words, factors, less, totals)
        blocks = len(starts) - 1
        tasks = self._workers.tasks(len(rows) * d * 4 * form.words, blocks * max(1, d // 256))
        across = -(-tasks // blocks)
        sums = np.empty((blocks, d), np.float32)
        self._workers.run(
            quantised_loops.groups,
            blocks * across,
            form.shape,
            form.kind,
            found,
            found.shape[1],
            *inner,
            np.array(starts, np.int64),
            across,
            form.middle,
            factors,
            factors.shape[1],
            less,
            less.shape[1],
            totals,
            d,
            np.empty((blocks * across, d), np.float32),
            sums,
        )
        loops.fold(sums, segments, y)


def _one(w: AffineBundles) -> AffineRows:
    """A bundle's rows."""
    return AffineRows(w.codes[0], w.scales[0], w.biases[0], w.bits)


def _found(
    sources: Sequence[AffineRows] | Sequence[AffineBundles], source: np.ndarray | None, rows: np.ndarray
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Addresses (3, m) of the codes, scales and biases of rows or bundles, and the bytes between a bundle's rows."""
    which = _ALL if source is None else np.array(source, np.int64)
    rows, found = np.array(rows, np.int64), np.empty((3, len(rows)), np.int64)
    inner = []
    for index, name in enumerate(("codes", "scales", "biases")):
        arrays = [getattr(w, name) for w in sources]
        table = np.array([(_address(array), array.strides[0], len(array)) for array in arrays], np.int64)
        if loops.addresses(table, which, rows, found[index]):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {[len(w) for w in sources]}")
        inner.append(arrays[0].strides[1])
    return found, (inner[0], inner[1], inner[2])
