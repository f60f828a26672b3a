"""The compiled half of the Numba kernels: the loops over rows, and which task takes which rows.

Arguments are addresses: each array type, layout or writability would need a compilation of its own, and threads
outside Python can take addresses. `compiled` checks the arguments, this module checks nothing. Importing compiles
nothing.
"""

from __future__ import annotations

import math

import numpy as np

from .thread_pool_loops import floats, integers, jit, task_kernel, wait_for_tasks
from .vector_code import FLOAT32, add_4_rows, add_row, dot, dot_4

SHORT_BYTES = 1024  # of a row: below, folding its sums takes longer than adding them up
FAR = 16  # rows that such ones are fetched ahead
RELU, SILU = 1, 2  # activations; 0: none


@jit
def row_at(w, stride, rows, i, end):  # type: ignore[no-untyped-def]
    """The address of row i of w (row rows[i], unless rows is 0); for i >= end that of the last row"""
    i = min(i, end - 1)
    return w + (integers(rows, end)[i] if rows else i) * stride


@jit
def row_dots(kind, w, stride, rows, begin, end, x, n, out):  # type: ignore[no-untyped-def]
    """Item i of out = row i (item i of rows, unless that is 0) of w . x for begin <= i < end, four rows at a time"""
    found, i = floats(out, end), begin
    ahead = 4 if stride >= SHORT_BYTES else FAR
    while i + 4 <= end:
        a, b = row_at(w, stride, rows, i, end), row_at(w, stride, rows, i + 1, end)
        c, d = row_at(w, stride, rows, i + 2, end), row_at(w, stride, rows, i + 3, end)
        e, f = row_at(w, stride, rows, i + ahead, end), row_at(w, stride, rows, i + ahead + 1, end)
        g, h = row_at(w, stride, rows, i + ahead + 2, end), row_at(w, stride, rows, i + ahead + 3, end)
        dot_4(kind, (a, b, c, d), (e, f, g, h), x, n, out + 4 * i)
        i += 4
    for j in range(i, end):
        row = row_at(w, stride, rows, j, end)
        found[j] = dot(kind, row, row, x, n)


@jit
def act(kind, value):  # type: ignore[no-untyped-def]
    """value (fp32) through an activation"""
    if kind == RELU:
        return np.float32(0) if value < 0 else value  # NaN stays
    if kind == SILU:
        return value / (np.float32(1) + np.float32(math.exp(-value)))
    return value


@jit
def share(count, task, tasks):  # type: ignore[no-untyped-def]
    """Which of `count` items are this task's: first and end"""
    return count * task // tasks, count * (task + 1) // tasks


# A kernel does one task of a call whose arguments, int64, lie at address p (see `thread_pool`).


@task_kernel
def dots(p, task):  # type: ignore[no-untyped-def]
    """out[i] = row i (rows[i], unless rows is 0) of w . x"""
    a = integers(p, 9)
    tasks, kind, w, stride, rows, count, x, n, out = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    begin, end = share(count, task, tasks)
    if rows or stride < SHORT_BYTES:
        row_dots(kind, w, stride, rows, begin, end, x, n, out)
    else:
        found = floats(out, count)
        for i in range(begin, end):
            found[i] = dot(kind, w + i * stride, w + min(i + 1, count - 1) * stride, x, n)


@task_kernel
def low_rank(p, task):  # type: ignore[no-untyped-def]
    """out = step * (b . z) + bias for z = a . x: the first `first` tasks are rows of a (rank, n), the others rows of b
    (count, rank), which wait for z"""
    v = integers(p, 15)
    tasks, first, kind, a, a_stride, rank, b, b_stride, count = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]
    x, n, step, bias, z, out = v[9], v[10], floats(p + 8 * 11, 1)[0], v[12], v[13], v[14]
    if task < first:
        begin, end = share(rank, task, first)
        found = floats(z, rank)
        for i in range(begin, end):
            row = a + i * a_stride
            found[i] = dot(kind, row, row + a_stride if i + 1 < rank else row, x, n)
        return
    wait_for_tasks(p, first)
    begin, end = share(count, task - first, tasks - first)
    row_dots(kind, b, b_stride, 0, begin, end, z, rank, out)
    found, offset = floats(out, count), floats(bias, count)
    for i in range(begin, end):
        found[i] = step * found[i] + offset[i]


@jit
def add_terms(kind, y, n, down, stride, rows, h, begin, end):  # type: ignore[no-untyped-def]
    """Add h[i] times row i (rows[i], unless rows is 0) of `down` to the n fp32 at y for begin <= i < end, but for the
    zeros, four at a time."""
    a = b = c = found = 0
    p = q = r = np.float32(0)
    scalars = floats(h, end)
    for i in range(begin, end):
        weight = scalars[i]
        if weight == 0:
            continue
        row = row_at(down, stride, rows, i, end)
        if found == 0:
            a, p = row, weight
        elif found == 1:
            b, q = row, weight
        elif found == 2:
            c, r = row, weight
        else:
            e, f = row_at(down, stride, rows, i + 1, end), row_at(down, stride, rows, i + 2, end)
            g, j = row_at(down, stride, rows, i + 3, end), row_at(down, stride, rows, i + 4, end)
            add_4_rows(kind, y, n, (a, b, c, row), (e, f, g, j), (p, q, r, weight))
        found = (found + 1) % 4
    if found > 0:
        add_row(kind, y, n, a, a, p)
    if found > 1:
        add_row(kind, y, n, b, b, q)
    if found > 2:
        add_row(kind, y, n, c, c, r)


@task_kernel
def neurons(p, task):  # type: ignore[no-untyped-def]
    """h[i] = lead[i] * follow[i] of row i (rows[i], unless rows is 0): lead is `given` or from the rows at `first`,
    follow from those at `second` (0: none), left out where lead is zero. lead_act, follow_act: activations of the two.
    The last tasks, one for each of `spans`, wait for all h and sum up: row b of sums (., width) = the terms spans[b, 0]
    to spans[b, 1], with the rows at `down`"""
    v = integers(p, 20)
    tasks, kind, first, second, stride, rows, count, x, n = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]
    bias, given, lead_act, follow_act, cutoff = v[9], v[10], v[11], v[12], floats(p + 8 * 13, 1)[0]
    h, follow, blocks, spans, down, sums = v[14], v[15], v[16], v[17], v[18], v[19]
    width, parts = n, tasks - blocks
    if task >= parts:
        block = task - parts
        y = sums + block * width * 4
        floats(y, width)[:] = 0
        wait_for_tasks(p, parts)
        edges = integers(spans, 2 * blocks)
        add_terms(kind, y, width, down, stride, rows, h, edges[2 * block], edges[2 * block + 1])
        return
    begin, end = share(count, task, parts)
    found, other, chosen = floats(h, count), floats(follow, count), integers(rows, count)
    if given:
        found[begin:end] = floats(given, count)[begin:end]
    else:
        row_dots(kind, first, stride, rows, begin, end, x, n, h)
        offset = floats(bias, count)
        for i in range(begin, end):
            value = act(lead_act, found[i] + offset[i] if bias else found[i])
            found[i] = np.float32(0) if abs(value) <= cutoff else value
    if second:
        zeros = 0
        for i in range(begin, end):
            zeros += found[i] == 0
        if 4 * zeros <= end - begin:
            row_dots(kind, second, stride, rows, begin, end, x, n, follow)
        for i in range(begin, end):
            if found[i] == 0:
                continue
            if 4 * zeros > end - begin:
                row = second + (chosen[i] if rows else i) * stride
                other[i] = dot(kind, row, row, x, n)
            found[i] *= act(follow_act, other[i])


@task_kernel
def records(p, task):  # type: ignore[no-untyped-def]
    """`neurons` of all rows and `tiles` over blocks of `block` of them, in one pass over records that hold the parts
    side by side; a task is one block"""
    v = integers(p, 16)
    kind, first, second, down, stride, count, x, n, bias = v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]
    lead_act, follow_act, cutoff, block, h, sums = v[10], v[11], floats(p + 8 * 12, 1)[0], v[13], v[14], v[15]
    y = sums + task * n * 4
    floats(y, n)[:] = 0
    found, offset = floats(h, count), floats(bias, count)
    for i in range(task * block, min(count, (task + 1) * block)):
        row = i * stride
        value = dot(kind, first + row, (second if second else down) + row, x, n)
        if bias:
            value += offset[i]
        value = act(lead_act, value)
        if abs(value) <= cutoff:
            value = np.float32(0)
        if second and value != 0:
            value *= act(follow_act, dot(kind, second + row, down + row, x, n))
        found[i] = value
        if value != 0:
            add_row(kind, y, n, down + row, first + min(i + 1, count - 1) * stride, value)


@task_kernel
def tiles(p, task):  # type: ignore[no-untyped-def]
    """Row which[b] of sums (., d) = the sum of block b; a task is one of `across` column ranges of one block. rows:
    addresses"""
    v = integers(p, 10)
    kind, rows, h, starts, across, which, sums, d = v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]
    block, tile = task // across, task % across
    first, last = share(d, tile, across)
    edges = integers(starts, block + 2)
    i, end = edges[block], edges[block + 1]
    y, n = sums + (integers(which, block + 1)[block] * d + first) * 4, last - first
    at = first * (4 if kind == FLOAT32 else 2)
    row, weight = integers(rows, end), floats(h, end)
    floats(y, n)[:] = 0
    while i + 4 <= end:
        a, b, c, e = row[i] + at, row[i + 1] + at, row[i + 2] + at, row[i + 3] + at
        f, g, j = row[min(i + 4, end - 1)] + at, row[min(i + 5, end - 1)] + at, row[min(i + 6, end - 1)] + at
        then = f, g, j, row[min(i + 7, end - 1)] + at
        add_4_rows(kind, y, n, (a, b, c, e), then, (weight[i], weight[i + 1], weight[i + 2], weight[i + 3]))
        i += 4
    for j in range(i, end):
        add_row(kind, y, n, row[j] + at, row[j] + at, weight[j])


@jit
def fold(sums, segments, y):  # type: ignore[no-untyped-def]
    """y[segments[b]] += sums[b], b ascending"""
    for block in range(len(sums)):
        total = y[segments[block]]
        for j in range(len(total)):
            total[j] += sums[block, j]


@jit
def add_pairwise(y, out):  # type: ignore[no-untyped-def]
    """out (d,) = the rows of y (8, d) added pairwise"""
    for j in range(len(out)):
        low = (y[0, j] + y[1, j]) + (y[2, j] + y[3, j])
        out[j] = low + ((y[4, j] + y[5, j]) + (y[6, j] + y[7, j]))


@jit
def addresses(table, source, rows, out):  # type: ignore[no-untyped-def]
    """out[i] = the address of row rows[i] of array source[i] (empty: 0), of which table has address, stride and number
    of rows; returns how many rows are out of range"""
    wrong = 0
    for i in range(len(rows)):
        k = source[i] if len(source) else 0
        wrong += rows[i] < 0 or rows[i] >= table[k, 2]
        out[i] = table[k, 0] + rows[i] * table[k, 1]
    return wrong


@jit
def outside(rows, count):  # type: ignore[no-untyped-def]
    """How many of rows are not in 0..count-1"""
    wrong = 0
    for row in rows:
        wrong += row < 0 or row >= count
    return wrong


@jit
def rms(x, n, weight, eps, out):  # type: ignore[no-untyped-def]
    """out = the n fp32 at x / their root mean square * weight; out may be x"""
    root = np.float32(math.sqrt(dot(FLOAT32, x, x, x, n) / np.float32(n) + eps))
    value, factor, found = floats(x, n), floats(weight, n), floats(out, n)
    for i in range(n):
        found[i] = value[i] / root * factor[i]


@jit
def norm(x, count, n, weight, eps, out):  # type: ignore[no-untyped-def]
    """`rms` of each of `count` rows"""
    for i in range(count):
        rms(x + 4 * n * i, n, weight, eps, out + 4 * n * i)
