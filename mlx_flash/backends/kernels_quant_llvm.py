"""The compiled half of the kernels on quantised rows: the loops over rows and bundles, and who takes which of them.

As `kernels_llvm`, whose place in the project this has: addresses instead of arrays, no checks. A block's rows are added
up four at a time, in the order of the ids, so that its sum depends on nothing but which rows they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from . import kernels_llvm as plain
from . import kernels_quant_emit
from .kernels_emit import fetch_add
from .kernels_quant_emit import ROWS, codes_add, codes_dot, ends_add, ends_dot, group_dots, group_ends

LANES = 16
# As in `kernels_llvm`: what a function is built on goes into its name.
_FILES = (kernels_quant_emit.__file__, plain.__file__)
BUILT_ON = hashlib.sha256(b"".join(Path(file).read_bytes() for file in _FILES)).hexdigest()[:8]


def _jit(function: Any) -> Any:
    function.__qualname__ += f"-{BUILT_ON}"
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
