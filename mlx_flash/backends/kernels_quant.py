"""The Numba kernels on quantised rows: the loops over rows, their checks, and who takes which of them.

The same promises as `kernels_numba`, which calls it for `AffineRows`. A block's rows are added up four at a time, in
the order of the ids, so that its sum depends on nothing but which rows they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..affine import AffineBundles, AffineRows
from . import kernels_llvm as plain
from . import kernels_quant_emit
from .kernels_emit import fetch_add
from .kernels_quant_emit import ROWS, SHAPES, codes_add, codes_dot, ends_add, ends_dot, group_dots, group_ends
from .workers import Workers

KINDS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}  # of scales: see `ends_dot`
ACTS = {"": 0, "relu": plain.RELU, "silu": plain.SILU}
LANES = 16
_ALL = np.empty(0, np.int64)  # in place of the rows: all of them
_NONE = np.empty(0, np.float32)
BUILT_ON = hashlib.sha256(Path(kernels_quant_emit.__file__).read_bytes()).hexdigest()[:8]


def _jit(function: Any) -> Any:
    function.__qualname__ += f"-{BUILT_ON}"  # as in `kernels_llvm`
    return plain._jit(nogil=True)(function)


@_jit
def spread(values, lanes, per_word, rest, back, out):  # type: ignore[no-untyped-def]
    """out = values in the order of vectors of codes, or back: `lanes` words at a time, then `rest` words"""
    words, i = len(values) // per_word, 0
    while i < words:
        width = lanes if i + lanes <= words else rest
        for j in range(width):
            for k in range(per_word):
                at, to = (i + j) * per_word + k, i * per_word + k * width + j
                if back:
                    out[at] = values[to]
                else:
                    out[to] = values[at]
        i += width


@_jit
def prepare(x, bits, size, rest, turned, less, sums):  # type: ignore[no-untyped-def]
    """Of x (n,): turned, spread; less, per word -(2**bits + middle) times its sum; sums, per group"""
    per_word, middle = 32 // bits, 1 << (bits - 1)
    spread(x, LANES, per_word, rest, False, turned)
    factor = np.float32(-((1 << bits) + middle))
    for i in range(len(less)):
        total = np.float32(0)
        for k in range(per_word):
            total += x[i * per_word + k]
        less[i] = factor * total
    words = size // per_word
    for g in range(len(sums)):
        total = np.float32(0)
        for i in range(g * words, (g + 1) * words):
            for k in range(per_word):
                total += x[i * per_word + k]
        sums[g] = total


@_jit
def place(w, which, row):  # type: ignore[no-untyped-def]
    """address of a row of codes (0), scales (3) or biases (6)"""
    shift = w[9]
    return w[which] + (row >> shift) * w[which + 1] + (row & ((1 << shift) - 1)) * w[which + 2]


@_jit
def row_dot(shape, kind, w, row, following, words, groups, middle, x, scratch):  # type: ignore[no-untyped-def]
    """row . x; w: see `_places`; x: addresses of what `prepare` gave"""
    more = ends_dot(kind, place(w, 3, row), place(w, 6, row), groups, middle, x[2], scratch)
    return more + codes_dot(shape, place(w, 0, row), following, words, x[0], x[1], scratch)


# Each kernel with `state` takes tasks from it (see `workers`) until none is left and returns how many are done.


@_jit
def dots(state, tasks, shape, kind, w, rows, words, groups, middle, x, scratch, out):  # type: ignore[no-untyped-def]
    """out[i] = row i (rows[i], unless rows is empty) of w . x; scratch (tasks, groups)"""
    taken, done, count = state.ctypes.data, state[1:].ctypes.data, len(out)
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return fetch_add(done, 0)
        held = scratch[task].ctypes.data
        begin, end = count * task // tasks, count * (task + 1) // tasks
        for i in range(begin, end):
            then = min(i + 1, count - 1)
            row, then = (rows[i], rows[then]) if len(rows) else (i, then)
            out[i] = row_dot(shape, kind, w, row, place(w, 0, then), words, groups, middle, x, held)
        fetch_add(done, 1)


@_jit
def neurons(  # type: ignore[no-untyped-def]
    state,
    tasks,
    shape,
    kind,
    first,
    second,
    rows,
    words,
    groups,
    middle,
    x,
    scratch,
    bias,
    given,
    acts,
    cutoff,
    h,
):
    """See `kernels_llvm.neurons`; first, second: as `w` in `row_dot`, address 0 where there is none"""
    taken, done, count = state.ctypes.data, state[1:].ctypes.data, len(h)
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return fetch_add(done, 0)
        held = scratch[task].ctypes.data
        begin, end = count * task // tasks, count * (task + 1) // tasks
        for i in range(begin, end):
            then = min(i + 1, count - 1)
            row, then = (rows[i], rows[then]) if len(rows) else (i, then)
            if len(given):
                value = given[i]
            else:
                following = place(second, 0, row) if second[0] else place(first, 0, then)
                value = row_dot(shape, kind, first, row, following, words, groups, middle, x, held)
                if len(bias):
                    value += bias[i]
                value = plain.act(acts[0], value)
                value = np.float32(0) if abs(value) <= cutoff else value
            if second[0] and value != 0:
                following = place(first, 0, then) if first[0] else place(second, 0, then)
                value *= plain.act(
                    acts[1], row_dot(shape, kind, second, row, following, words, groups, middle, x, held)
                )
            h[i] = value
        fetch_add(done, 1)


@_jit
def tiles(  # type: ignore[no-untyped-def]
    state, tasks, shape, kind, rows, h, starts, across, unit_words, unit_groups, words, groups, least, scratch, sums
):
    """sums[b] = the sum of block b, spread; a task is one of `across` ranges of whole units of one block. rows (3, m):
    addresses of codes, scales and biases; scratch (tasks, 5, groups)"""
    taken, done = state.ctypes.data, state[1:].ctypes.data
    per_word = sums.shape[1] // words
    units = words // unit_words
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return fetch_add(done, 0)
        block, tile = task // across, task % across
        low, high = units * tile // across, units * (tile + 1) // across
        first, last = low * unit_words, high * unit_words if tile + 1 < across else words
        ends, beyond = low * unit_groups, high * unit_groups if tile + 1 < across else groups
        sums[block, first * per_word : last * per_word] = 0
        y = sums[block, first * per_word :].ctypes.data
        factors, more = scratch[task].ctypes.data, scratch[task, 4].ctypes.data
        item = 4 if kind == 0 else 2
        i, end = starts[block], starts[block + 1]
        while i < end:
            scratch[task, 4, :] = 0
            four = i, min(i + 1, end - 1), min(i + 2, end - 1), min(i + 3, end - 1)
            for r, row in enumerate(four):
                factor = h[row] if i + r < end else np.float32(0)
                at, begin = factors + 4 * groups * r, ends * item
                ends_add(kind, rows[1, row] + begin, rows[2, row] + begin, beyond - ends, factor, least, at, more)
            at = 4 * first
            now = rows[0, four[0]] + at, rows[0, four[1]] + at, rows[0, four[2]] + at, rows[0, four[3]] + at
            e, f, g, j = min(i + 4, end - 1), min(i + 5, end - 1), min(i + 6, end - 1), min(i + 7, end - 1)
            then = rows[0, e] + at, rows[0, f] + at, rows[0, g] + at, rows[0, j] + at
            codes_add(shape, y, last - first, now, then, factors, 4 * groups, more)
            i += ROWS
        fetch_add(done, 1)


@_jit
def spread_group(h, bits, words, out, less, sums):  # type: ignore[no-untyped-def]
    """Of each bundle's h (n,): out, the factors of the k-th codes of 16 words for every k, which belong to several rows
    or are half of one; less, per word -(2**bits + middle) times their sum; sums (m,)"""
    per_word, middle = 32 // bits, 1 << (bits - 1)
    halves = max(1, words // LANES)
    for i in range(len(h)):
        total = np.float32(0)
        for j in range(h.shape[1]):
            total += h[i, j]
        sums[i] = total
        for half in range(halves):
            for lane in range(LANES):
                word, total = half * LANES + lane % words, np.float32(0)
                for k in range(per_word):
                    out[i, (half * per_word + k) * LANES + lane] = h[i, word * per_word + k]
                    total += h[i, word * per_word + k]
                less[i, half * LANES + lane] = np.float32(-((1 << bits) + middle)) * total


@_jit
def groups(  # type: ignore[no-untyped-def]
    state, tasks, shape, kind, found, inner, starts, across, middle, h, less, totals, scratch, sums
):
    """sums[b] = the sum of block b of bundles; a task is one of `across` ranges of 16s of rows of one block. found (3,
    m): addresses of codes, scales and biases; inner: bytes from a row to the next"""
    taken, done, units = state.ctypes.data, state[1:].ctypes.data, sums.shape[1] // LANES
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return fetch_add(done, 0)
        block, tile = task // across, task % across
        first, last = units * tile // across * LANES, units * (tile + 1) // across * LANES
        sums[block, first:last] = 0
        y, held = sums[block, first:].ctypes.data, scratch[task].ctypes.data
        for i in range(starts[block], starts[block + 1]):
            factors, lesser = h[i].ctypes.data, less[i].ctypes.data
            group_dots(shape, found[0, i] + first * inner[0], last - first, factors, lesser, held)
            scales, biases = found[1, i] + first * inner[1], found[2, i] + first * inner[2]
            group_ends(kind, scales, biases, held, last - first, middle, totals[i], y)
        fetch_add(done, 1)


def _address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


class _Form:
    """How rows are quantised, in the numbers that the kernels take. Raises ValueError for what they do not know."""

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
        self.unit_words = max(LANES, self.rest)
        self.unit_groups = max(1, LANES // self.rest)
        self.middle = np.float32(1 << (w.bits - 1))

    def same(self, w: AffineRows) -> bool:
        return w.shape[1] == self.n and w.bits == self.bits and KINDS.get(w.scales.dtype) == self.kind

    def prepared(self, x: np.ndarray) -> tuple[tuple[int, int, int], Any]:
        """Addresses of x (n,) as the kernels take it, and what must stay in memory."""
        if x.dtype != np.float32 or x.shape != (self.n,) or not x.flags.c_contiguous:
            raise ValueError(f"x is {x.dtype} {x.shape}, the rows have {self.n} items; x must be contiguous fp32")
        held = np.empty(self.n, np.float32), np.empty(self.words, np.float32), np.empty(self.groups, np.float32)
        prepare(x, self.bits, self.size, self.rest, *held)
        return (_address(held[0]), _address(held[1]), _address(held[2])), held


def _places(w: AffineRows | AffineBundles | None) -> tuple[int, ...]:
    """Of codes, scales and biases the address, the bytes from one bundle to the next and from one row to the next; then
    the logarithm of the rows in a bundle."""
    if w is None:
        return (0,) * 10
    numbers: list[int] = []
    for part in (w.codes, w.scales, w.biases):
        numbers += [_address(part), part.strides[0], part.strides[1] if part.ndim == 3 else 0]
    return (*numbers, w.codes.shape[1].bit_length() - 1 if isinstance(w, AffineBundles) else 0)


def _chosen(rows: np.ndarray | None, count: int) -> np.ndarray:
    if rows is None:
        return _ALL
    chosen = np.array(rows, np.int64)
    if plain.outside(chosen, count):
        raise IndexError(f"rows {chosen.min()}..{chosen.max()} of {count}")
    return chosen


class QuantisedKernels:
    """`dots`, `begin_neurons` and `add_blocks` of `kernels.Kernels` on quantised rows."""

    def __init__(self, workers: Workers):
        self._workers = workers

    def dots(self, w: AffineRows, rows: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        form, chosen = _Form(w), _chosen(rows, len(w))
        at, held = form.prepared(x)
        out = np.empty(len(w) if rows is None else len(chosen), np.float32)
        if not len(out):
            return out
        tasks = self._workers.tasks(4 * form.words * len(out), len(out))
        scratch = np.empty((tasks, form.groups), np.float32)
        numbers = (form.words, form.groups, form.middle)
        self._workers.run(dots, tasks, form.shape, form.kind, _places(w), chosen, *numbers, at, scratch, out)
        del held
        return out

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
        form, chosen = _Form(parts[0]), _chosen(rows, len(parts[0]))
        if any(not form.same(part) or len(part) != len(parts[0]) for part in parts):
            raise ValueError(f"parts {[(part.bits, part.shape, part.scales.dtype) for part in parts]} differ")
        count = len(parts[0]) if rows is None else len(chosen)
        return self._neurons(form, first, second, chosen, x, given, bias, acts, cutoff, count)

    def _neurons(
        self,
        form: _Form,
        first: AffineRows | AffineBundles | None,
        second: AffineRows | AffineBundles | None,
        chosen: np.ndarray,
        x: np.ndarray,
        given: np.ndarray | None,
        bias: np.ndarray | None,
        acts: tuple[str, str],
        cutoff: float,
        count: int,
    ) -> Callable[[], np.ndarray]:
        at, held = form.prepared(x)
        h = np.empty(count, np.float32)
        if not len(h):
            return lambda: h
        for values in (given, bias):
            if values is not None and (values.shape != h.shape or values.dtype != np.float32):
                raise ValueError(f"{values.dtype} {values.shape} for {len(h)} rows")
        tasks = self._workers.tasks(
            4 * form.words * len(h) * (2 if first is not None and second is not None else 1), len(h)
        )
        finish = self._workers.start(
            neurons,
            tasks,
            form.shape,
            form.kind,
            _places(first),
            _places(second),
            chosen,
            form.words,
            form.groups,
            form.middle,
            at,
            np.empty((tasks, form.groups), np.float32),
            _NONE if bias is None else np.ascontiguousarray(bias),
            _NONE if given is None else np.ascontiguousarray(given),
            (ACTS[acts[0]], ACTS[acts[1]]),
            np.float32(cutoff),
            h,
            keep=(first, second, held),
        )

        def result() -> np.ndarray:
            finish()
            return h

        return result

    def add_blocks(
        self,
        sources: Sequence[AffineRows],
        source: np.ndarray | None,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        y: np.ndarray,
    ) -> None:
        form = _Form(sources[0])
        if any(not form.same(w) for w in sources) or y.shape != (form.n,):
            raise ValueError(f"sources {[(w.bits, w.shape, w.scales.dtype) for w in sources]} for y {y.shape}")
        found, _ = _found(sources, source, rows)
        blocks = len(starts) - 1
        units = max(1, form.words // form.unit_words)
        tasks = self._workers.tasks(len(found[0]) * 4 * form.words, blocks * units)
        across = min(units, -(-tasks // blocks))
        sums, total = np.empty((blocks, form.n), np.float32), np.empty(form.n, np.float32)
        self._workers.run(
            tiles,
            blocks * across,
            form.shape,
            form.kind,
            found,
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
        spread(y, LANES, form.per_word, form.rest, False, total)
        plain.fold(sums, total)
        spread(total, LANES, form.per_word, form.rest, True, y)

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
        found = self._neurons(form, first, second, chosen, x, None, None, acts, cutoff, len(chosen))()
        return found.reshape(len(rows), count)

    def add_groups(
        self,
        sources: Sequence[AffineBundles],
        source: np.ndarray,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        y: np.ndarray,
    ) -> None:
        one = _one(sources[0])
        form, d = _Form(one), sources[0].codes.shape[1]
        shapes = [(w.bits, w.codes.shape[1:], w.scales.dtype) for w in sources]
        if len(set(shapes)) != 1 or y.shape != (d,) or d % LANES or form.groups != 1 or h.shape[1] != form.n:
            raise ValueError(f"sources {shapes} for h {h.shape} and y {y.shape}")
        found, inner = _found(sources, source, rows)
        width = max(LANES, form.words)
        factors = np.empty((len(rows), form.per_word * width), np.float32)
        less, totals = np.empty((len(rows), width), np.float32), np.empty(len(rows), np.float32)
        spread_group(np.ascontiguousarray(h, np.float32), form.bits, form.words, factors, less, totals)
        blocks = len(starts) - 1
        tasks = self._workers.tasks(len(rows) * d * 4 * form.words, blocks * max(1, d // 256))
        across = -(-tasks // blocks)
        sums = np.empty((blocks, d), np.float32)
        self._workers.run(
            groups,
            blocks * across,
            form.shape,
            form.kind,
            found,
            inner,
            np.array(starts, np.int64),
            across,
            form.middle,
            factors,
            less,
            totals,
            np.empty((blocks * across, d), np.float32),
            sums,
        )
        plain.fold(sums, y)


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
        if plain.addresses(table, which, rows, found[index]):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {[len(w) for w in sources]}")
        inner.append(arrays[0].strides[1])
    return found, (inner[0], inner[1], inner[2])
