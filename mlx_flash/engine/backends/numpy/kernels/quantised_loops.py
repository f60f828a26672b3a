"""The compiled half of the kernels on quantised rows: the loops over rows and bundles, and which task takes which.

As in `loops`, arguments are addresses and are not checked. A block's rows are summed four at a time in the order of the
ids, so the sum depends only on which rows they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.engine.numerics.compile_cache import built_on

from . import loops, quantised_vector_code
from .loops import share
from .quantised_vector_code import ROWS, SHAPES, codes_add, codes_dot, ends_add, ends_dot, group_dots, group_ends
from .thread_pool_loops import floats, integers, jit, task_kernel

LANES = 16
PLACES = 10  # numbers that say where rows are: see `quantised._places`
PER_WORD = tuple(32 // bits for bits, _ in SHAPES)
# What a function is built on goes into its name, for the disk cache.
BUILT_ON = built_on(quantised_vector_code.__file__)


def _jit(function: Any) -> Any:
    function.__qualname__ += f"-{BUILT_ON}"
    return jit(function)


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


@task_kernel
def prepare_step(p, task):  # type: ignore[no-untyped-def]
    """`prepare` of x (n,) for rows of so many words and groups"""
    v = integers(p, 11)
    turned, less, sums = floats(v[6], v[2]), floats(v[7], v[9]), floats(v[8], v[10])
    prepare(floats(v[1], v[2]), v[3], v[4], v[5], turned, less, sums)


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


# A kernel does one task of a call whose arguments, int64, lie at address p (see `thread_pool`).


@task_kernel
def dots(p, task):  # type: ignore[no-untyped-def]
    """out[i] = row i (rows[i], unless rows is 0) of w . x; w: address of what `place` takes; scratch (tasks, groups)"""
    a = integers(p, 14)
    tasks, shape, kind, w, rows, count = a[0], a[1], a[2], integers(a[3], PLACES), a[4], a[5]
    words, groups, middle, x = a[6], a[7], floats(p + 8 * 8, 1)[0], (a[9], a[10], a[11])
    held, found, chosen = a[12] + task * groups * 4, floats(a[13], count), integers(rows, count)
    begin, end = share(count, task, tasks)
    for i in range(begin, end):
        then = min(i + 1, count - 1)
        row, then = (chosen[i], chosen[then]) if rows else (i, then)
        found[i] = row_dot(shape, kind, w, row, place(w, 0, then), words, groups, middle, x, held)


@task_kernel
def neurons(p, task):  # type: ignore[no-untyped-def]
    """See `loops.neurons`; first, second: addresses of what `place` takes, its first 0 where there is none"""
    a = integers(p, 20)
    tasks, shape, kind, rows, count = a[0], a[1], a[2], a[5], a[6]
    first, second = integers(a[3], PLACES), integers(a[4], PLACES)
    words, groups, middle, x = a[7], a[8], floats(p + 8 * 9, 1)[0], (a[10], a[11], a[12])
    held, bias, given, lead_act, follow_act = a[13] + task * groups * 4, a[14], a[15], a[16], a[17]
    cutoff, h = floats(p + 8 * 18, 1)[0], floats(a[19], count)
    chosen, offset, known = integers(rows, count), floats(bias, count), floats(given, count)
    begin, end = share(count, task, tasks)
    for i in range(begin, end):
        then = min(i + 1, count - 1)
        row, then = (chosen[i], chosen[then]) if rows else (i, then)
        if given:
            value = known[i]
        else:
            following = place(second, 0, row) if second[0] else place(first, 0, then)
            value = row_dot(shape, kind, first, row, following, words, groups, middle, x, held)
            if bias:
                value += offset[i]
            value = loops.act(lead_act, value)
            value = np.float32(0) if abs(value) <= cutoff else value
        if second[0] and value != 0:
            following = place(first, 0, then) if first[0] else place(second, 0, then)
            more = row_dot(shape, kind, second, row, following, words, groups, middle, x, held)
            value *= loops.act(follow_act, more)
        h[i] = value


@task_kernel
def tiles(p, task):  # type: ignore[no-untyped-def]
    """Row b of sums = the sum of block b, spread; a task is one of `across` ranges of whole units of one block. rows
    (3, m): addresses of codes, scales and biases; scratch (tasks, 5, groups)"""
    v = integers(p, 15)
    shape, kind, rows, count, h, starts, across, unit_words = v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]
    unit_groups, words, groups, least, scratch, sums = v[9], v[10], v[11], floats(p + 8 * 12, 1)[0], v[13], v[14]
    per_word, units = PER_WORD[shape], words // unit_words
    block, tile = task // across, task % across
    low, high = share(units, tile, across)
    first, last = low * unit_words, high * unit_words if tile + 1 < across else words
    ends, beyond = low * unit_groups, high * unit_groups if tile + 1 < across else groups
    y = sums + (block * words + first) * per_word * 4
    floats(y, (last - first) * per_word)[:] = 0
    factors = scratch + task * (ROWS + 1) * groups * 4
    more = factors + ROWS * groups * 4
    item = 4 if kind == 0 else 2
    codes, scales, biases = integers(rows, count), integers(rows + 8 * count, count), integers(rows + 16 * count, count)
    edges, weight = integers(starts, block + 2), floats(h, count)
    i, end = edges[block], edges[block + 1]
    while i < end:
        floats(more, groups)[:] = 0
        four = i, min(i + 1, end - 1), min(i + 2, end - 1), min(i + 3, end - 1)
        for r, row in enumerate(four):
            factor = weight[row] if i + r < end else np.float32(0)
            at, begin = factors + 4 * groups * r, ends * item
            ends_add(kind, scales[row] + begin, biases[row] + begin, beyond - ends, factor, least, at, more)
        at = 4 * first
        now = codes[four[0]] + at, codes[four[1]] + at, codes[four[2]] + at, codes[four[3]] + at
        e, f, g, j = min(i + 4, end - 1), min(i + 5, end - 1), min(i + 6, end - 1), min(i + 7, end - 1)
        then = codes[e] + at, codes[f] + at, codes[g] + at, codes[j] + at
        codes_add(shape, y, last - first, now, then, factors, 4 * groups, more)
        i += ROWS


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


@task_kernel
def groups(p, task):  # type: ignore[no-untyped-def]
    """Row b of sums (., d) = the sum of block b of bundles; a task is one of `across` ranges of 16s of rows of one
    block. found (3, m): addresses of codes, scales and biases; apart: bytes from a row to the next, of the three"""
    v = integers(p, 19)
    shape, kind, found, count, apart, starts, across = v[1], v[2], v[3], v[4], (v[5], v[6], v[7]), v[8], v[9]
    middle, h, width, less, lesser_width, totals = floats(p + 8 * 10, 1)[0], v[11], v[12], v[13], v[14], v[15]
    d, scratch, sums = v[16], v[17], v[18]
    block, tile = task // across, task % across
    low, high = share(d // LANES, tile, across)
    first, last = low * LANES, high * LANES
    y, held = sums + (block * d + first) * 4, scratch + task * d * 4
    floats(y, last - first)[:] = 0
    codes, scales = integers(found, count), integers(found + 8 * count, count)
    biases, total = integers(found + 16 * count, count), floats(totals, count)
    edges = integers(starts, block + 2)
    for i in range(edges[block], edges[block + 1]):
        factors, lesser = h + i * width * 4, less + i * lesser_width * 4
        group_dots(shape, codes[i] + first * apart[0], last - first, factors, lesser, held)
        at, also = scales[i] + first * apart[1], biases[i] + first * apart[2]
        group_ends(kind, at, also, held, last - first, middle, total[i], y)
