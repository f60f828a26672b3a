"""The compiled half of the Numba kernels: the loops over rows, and who takes which of them.

Arguments are addresses where an array's type, layout or writability would cost a compilation of its own. Checks
nothing: `kernels_numba` does. Importing compiles nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from . import kernels_emit
from .kernels_emit import FLOAT32, add_4_rows, add_row, dot, dot_4, fetch_add, store

SHORT_BYTES = 1024  # of a row: below, folding its sums takes longer than adding them up
NO_ROWS = np.empty(0, np.int64)
PATIENCE = 20000  # times a thread asks whether the others are done: some 200 microseconds
RELU, SILU = 1, 2  # activations; 0: none
# Numba's disk cache looks at a function's own file only: what that file is built on goes into the functions' names.
BUILT_ON = hashlib.sha256(Path(kernels_emit.__file__).read_bytes()).hexdigest()[:8]


def _jit(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit`, cached on disk where some folder can be written."""

    def decorate(function: Any) -> Any:
        function.__qualname__ += f"-{BUILT_ON}"
        try:
            return numba.njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no locator: the install and the home are read-only
            return numba.njit(error_model="numpy", **options)(function)

    return decorate


@_jit(nogil=True)
def row_dots(kind, w, stride, rows, begin, end, x, n, out):  # type: ignore[no-untyped-def]
    """out[i] = row i (rows[i], unless rows is empty) of w . x for begin <= i < end, four rows at a time"""
    at, i = out.ctypes.data, begin
    while i + 4 <= end:
        if len(rows):
            a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        else:
            a, b, c, d = i, i + 1, i + 2, i + 3
        dot_4(kind, w + a * stride, w + b * stride, w + c * stride, w + d * stride, x, n, at + 4 * i)
        i += 4
    for j in range(i, end):
        row = w + (rows[j] if len(rows) else j) * stride
        out[j] = dot(kind, row, row, x, n)


@_jit(nogil=True)
def act(kind, value):  # type: ignore[no-untyped-def]
    """value (fp32) through an activation"""
    if kind == RELU:
        return np.float32(0) if value < 0 else value  # NaN stays
    if kind == SILU:
        return value / (np.float32(1) + np.float32(math.exp(-value)))
    return value


@_jit(nogil=True)
def finished(done, tasks):  # type: ignore[no-untyped-def]
    """How many tasks are done, once all are or a while has passed: asking again from Python takes several times as long
    as another thread's last task."""
    count = fetch_add(done, 0)
    for _ in range(PATIENCE):
        if count >= tasks:
            break
        count = fetch_add(done, 0)
    return count


# Each kernel with `state` takes tasks from it (see `workers`) until none is left and returns how many are done.


@_jit(nogil=True)
def dots(state, tasks, kind, w, stride, rows, x, n, out):  # type: ignore[no-untyped-def]
    """out[i] = row i (rows[i], unless rows is empty) of w . x"""
    taken, done, count = state.ctypes.data, state[1:].ctypes.data, len(out)
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return finished(done, tasks)
        begin, end = count * task // tasks, count * (task + 1) // tasks
        if len(rows) or stride < SHORT_BYTES:
            row_dots(kind, w, stride, rows, begin, end, x, n, out)
        else:
            for i in range(begin, end):
                out[i] = dot(kind, w + i * stride, w + min(i + 1, count - 1) * stride, x, n)
        fetch_add(done, 1)


@_jit(nogil=True)
def low_rank(  # type: ignore[no-untyped-def]
    state, tasks, first, kind, a, a_stride, rank, b, b_stride, count, x, n, step, bias, z, out
):
    """out = step * (b . z) + bias for z = a . x: the first `first` tasks are rows of a (rank, n), the others rows of b
    (count, rank), which wait for z"""
    taken, done, at = state.ctypes.data, state[1:].ctypes.data, z.ctypes.data
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return finished(done, tasks)
        if task < first:
            for i in range(rank * task // first, rank * (task + 1) // first):
                row = a + i * a_stride
                z[i] = dot(kind, row, row + a_stride if i + 1 < rank else row, x, n)
        else:
            while fetch_add(done, 0) < first:  # whoever took those is at work on them
                pass
            begin, end = count * (task - first) // (tasks - first), count * (task + 1 - first) // (tasks - first)
            row_dots(kind, b, b_stride, NO_ROWS, begin, end, at, rank, out)
            for i in range(begin, end):
                out[i] = step * out[i] + bias[i]
        fetch_add(done, 1)


@_jit(nogil=True)
def add_terms(kind, y, n, down, stride, rows, h, begin, end):  # type: ignore[no-untyped-def]
    """Add h[i] times row i (rows[i], unless rows is empty) of `down` to the n fp32 at y for begin <= i < end, but for
    the zeros, four at a time."""
    a = b = c = found = 0
    p = q = r = np.float32(0)
    for i in range(begin, end):
        if h[i] == 0:
            continue
        row = down + (rows[i] if len(rows) else i) * stride
        if found == 0:
            a, p = row, h[i]
        elif found == 1:
            b, q = row, h[i]
        elif found == 2:
            c, r = row, h[i]
        else:
            add_4_rows(kind, y, n, a, b, c, row, p, q, r, h[i])
        found = (found + 1) % 4
    if found > 0:
        add_row(kind, y, n, a, a, p)
    if found > 1:
        add_row(kind, y, n, b, b, q)
    if found > 2:
        add_row(kind, y, n, c, c, r)


@_jit(nogil=True)
def neurons(  # type: ignore[no-untyped-def]
    state, tasks, kind, first, second, stride, rows, x, n, bias, given, acts, cutoff, h, follow, spans, down, sums
):
    """h[i] = lead[i] * follow[i] of row i (rows[i], unless rows is empty): lead is `given` or from the rows at `first`,
    follow from those at `second` (0: none), left out where lead is zero. acts: of the two. The last tasks, one for each
    of `spans`, wait for all h and sum up: sums[b] = the terms spans[b, 0] to spans[b, 1], with the rows at `down`"""
    taken, done, count = state.ctypes.data, state[1:].ctypes.data, len(h)
    parts, width = tasks - len(spans), sums.shape[1]
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return finished(done, tasks)
        if task >= parts:
            block = task - parts
            sums[block] = 0
            while fetch_add(done, 0) < parts:  # whoever took those is at work on them
                pass
            y = sums[block].ctypes.data
            add_terms(kind, y, width, down, stride, rows, h, spans[block, 0], spans[block, 1])
            fetch_add(done, 1)
            continue
        begin, end = count * task // parts, count * (task + 1) // parts
        if len(given):
            h[begin:end] = given[begin:end]
        else:
            row_dots(kind, first, stride, rows, begin, end, x, n, h)
            for i in range(begin, end):
                value = h[i] + bias[i] if len(bias) else h[i]
                value = act(acts[0], value)
                h[i] = np.float32(0) if abs(value) <= cutoff else value
        if second:
            zeros = 0
            for i in range(begin, end):
                zeros += h[i] == 0
            if 4 * zeros <= end - begin:
                row_dots(kind, second, stride, rows, begin, end, x, n, follow)
            for i in range(begin, end):
                if h[i] == 0:
                    continue
                if 4 * zeros > end - begin:
                    row = second + (rows[i] if len(rows) else i) * stride
                    follow[i] = dot(kind, row, row, x, n)
                h[i] *= act(acts[1], follow[i])
        fetch_add(done, 1)


@_jit(nogil=True)
def records(  # type: ignore[no-untyped-def]
    state, tasks, kind, first, second, down, stride, x, n, bias, acts, cutoff, block, h, sums
):
    """`neurons` of all rows and `tiles` over blocks of `block` of them, in one pass over records that hold the parts
    side by side; a task is one block"""
    taken, done, count, d = state.ctypes.data, state[1:].ctypes.data, len(h), sums.shape[1]
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return finished(done, tasks)
        sums[task] = 0
        y = sums[task].ctypes.data
        for i in range(task * block, min(count, (task + 1) * block)):
            row = i * stride
            value = dot(kind, first + row, (second if second else down) + row, x, n)
            if len(bias):
                value += bias[i]
            value = act(acts[0], value)
            if abs(value) <= cutoff:
                value = np.float32(0)
            if second and value != 0:
                value *= act(acts[1], dot(kind, second + row, down + row, x, n))
            h[i] = value
            if value != 0:
                add_row(kind, y, d, down + row, first + min(i + 1, count - 1) * stride, value)
        fetch_add(done, 1)


@_jit(nogil=True)
def tiles(state, tasks, kind, rows, h, starts, across, which, sums):  # type: ignore[no-untyped-def]
    """sums[which[b]] = the sum of block b; a task is one of `across` column ranges of one block. rows: addresses"""
    taken, done, d = state.ctypes.data, state[1:].ctypes.data, sums.shape[1]
    item = 4 if kind == FLOAT32 else 2
    while True:
        task = fetch_add(taken, 1)
        if task >= tasks:
            return finished(done, tasks)
        block, tile = task // across, task % across
        first, last = d * tile // across, d * (tile + 1) // across
        into = which[block]
        y, n, at = sums[into, first:].ctypes.data, last - first, first * item
        sums[into, first:last] = 0
        i, end = starts[block], starts[block + 1]
        while i + 4 <= end:
            a, b, c, e = rows[i] + at, rows[i + 1] + at, rows[i + 2] + at, rows[i + 3] + at
            add_4_rows(kind, y, n, a, b, c, e, h[i], h[i + 1], h[i + 2], h[i + 3])
            i += 4
        for j in range(i, end):
            add_row(kind, y, n, rows[j] + at, rows[j] + at, h[j])
        fetch_add(done, 1)


@_jit(nogil=True)
def fold(sums, y):  # type: ignore[no-untyped-def]
    """y += sums[b], b ascending"""
    for block in range(len(sums)):
        for j in range(len(y)):
            y[j] += sums[block, j]


@_jit(nogil=True)
def scores(state, tasks, kind, q, size, keys, head_stride, stride, group, out):  # type: ignore[no-untyped-def]
    """out[head, i] = q[head] . key i of head // group; a task is one head"""
    taken, done = state.ctypes.data, state[1:].ctypes.data
    while True:
        head = fetch_add(taken, 1)
        if head >= tasks:
            return finished(done, tasks)
        key = keys + head // group * head_stride
        for i in range(out.shape[1]):
            row = key + i * stride
            out[head, i] = dot(kind, row, row + stride, q + head * size * 4, size)
        fetch_add(done, 1)


@_jit(nogil=True)
def weigh(state, tasks, kind, weights, values, head_stride, stride, group, out):  # type: ignore[no-untyped-def]
    """out[head] = sum of weights[head, i] times value i of head // group, i ascending; a task is one head"""
    taken, done, size, length = state.ctypes.data, state[1:].ctypes.data, out.shape[1], weights.shape[1]
    while True:
        head = fetch_add(taken, 1)
        if head >= tasks:
            return finished(done, tasks)
        out[head] = 0
        y, row, p, i = out[head].ctypes.data, values + head // group * head_stride, weights[head], 0
        while i + 4 <= length:
            a, b, c, d = row, row + stride, row + 2 * stride, row + 3 * stride
            add_4_rows(kind, y, size, a, b, c, d, p[i], p[i + 1], p[i + 2], p[i + 3])
            row += 4 * stride
            i += 4
        for j in range(i, length):
            row = values + head // group * head_stride + j * stride
            add_row(kind, y, size, row, row, p[j])
        fetch_add(done, 1)


@_jit(nogil=True)
def addresses(table, source, rows, out):  # type: ignore[no-untyped-def]
    """out[i] = the address of row rows[i] of array source[i] (empty: 0), of which table has address, stride and number
    of rows; returns how many rows are out of range"""
    wrong = 0
    for i in range(len(rows)):
        k = source[i] if len(source) else 0
        wrong += rows[i] < 0 or rows[i] >= table[k, 2]
        out[i] = table[k, 0] + rows[i] * table[k, 1]
    return wrong


@_jit(nogil=True)
def outside(rows, count):  # type: ignore[no-untyped-def]
    """how many of rows are not in 0..count-1"""
    wrong = 0
    for row in rows:
        wrong += row < 0 or row >= count
    return wrong


@_jit(nogil=True)
def norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """out[i] = x[i] / rms(x[i]) * weight"""
    count, n = x.shape
    for i in range(count):
        at = x[i].ctypes.data
        root = np.float32(math.sqrt(dot(FLOAT32, at, at, at, n) / np.float32(n) + eps))
        for j in range(n):
            out[i, j] = x[i, j] / root * weight[j]


@_jit(nogil=True)
def rotate(x, cos, sin):  # type: ignore[no-untyped-def]
    """x[i] turned by the angles of one position, in place; halves are pairs"""
    half = len(cos)
    for i in range(len(x)):
        for j in range(half):
            a, b = x[i, j], x[i, half + j]
            x[i, j] = a * cos[j] - b * sin[j]
            x[i, half + j] = b * cos[j] + a * sin[j]


@_jit(nogil=True)
def store_rows(kind, x, address, stride):  # type: ignore[no-untyped-def]
    """x[i] in a storage dtype at address + i * stride"""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            store(kind, address + i * stride, j, x[i, j])
