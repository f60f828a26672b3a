"""The compiled half of a decoded token's attention: norms, rotary positions, the cache, and the attention itself.

As in `loops`, arguments are addresses and are not checked. What changes from token to token, the position, is read from
memory, so that a layer's steps are put together once (`attention`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .loops import rms
from .thread_pool_loops import floats, integers, jit, task_kernel
from .vector_code import add_4_rows, add_row, dot, store

RMS, LAYER = 0, 1  # norms
LOWEST = np.float32(-87)  # exp of less is no fp32 to speak of
LOG2_E, HALF = np.float32(1.44269504), np.float32(0.5)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # of the first, few digits: products exact
P = tuple(np.float32(p) for p in (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 0.166666665, 0.5))


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """2**exponent, fp32, for -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = ir.IntType(32)
        bits = builder.shl(builder.add(arguments[0], item(127)), item(23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@jit
def exps(address, n, most):  # type: ignore[no-untyped-def]
    """exp(value - most) in place of n fp32, none above `most`, to 2 units in the last place: a polynomial on either
    side of a power of two, which LLVM turns into vectors as it does not the C library's exp."""
    values = floats(address, n)
    for i in range(n):
        value = values[i] - most
        value = LOWEST if value < LOWEST else value
        power = np.floor(value * LOG2_E + HALF)
        rest = value - power * LN_2_HIGH - power * LN_2_LOW
        found = P[0] * rest + P[1]
        found = found * rest + P[2]
        found = found * rest + P[3]
        found = found * rest + P[4]
        found = found * rest + P[5]
        found = found * (rest * rest) + rest + np.float32(1)
        values[i] = found * _power_of_two(np.int32(power))


@jit
def normed(kind, x, n, weight, bias, eps, out):  # type: ignore[no-untyped-def]
    """out = the n fp32 at x, normalised; bias may be 0, out may be x"""
    if kind == RMS:
        rms(x, n, weight, eps, out)
    else:
        value, found, total = floats(x, n), floats(out, n), np.float32(0)
        for i in range(n):
            total += value[i]
        mean = total / np.float32(n)
        for i in range(n):
            found[i] = value[i] - mean
        rms(out, n, weight, eps, out)
    if bias:
        found, offset = floats(out, n), floats(bias, n)
        for i in range(n):
            found[i] += offset[i]


@task_kernel
def add_and_norm(p, task):  # type: ignore[no-untyped-def]
    """x += more (unless that is 0), then out = norm of x"""
    v = integers(p, 9)
    kind, x, more, n, weight, bias, eps, out = v[1], v[2], v[3], v[4], v[5], v[6], floats(p + 8 * 7, 1)[0], v[8]
    if more:
        value, added = floats(x, n), floats(more, n)
        for i in range(n):
            value[i] += added[i]
    normed(kind, x, n, weight, bias, eps, out)


@task_kernel
def add(p, task):  # type: ignore[no-untyped-def]
    """out += more"""
    v = integers(p, 4)
    found, more = floats(v[3], v[1]), floats(v[2], v[1])
    for i in range(v[1]):
        found[i] += more[i]


@task_kernel
def turn_and_store(p, task):  # type: ignore[no-untyped-def]
    """The queries, keys and values at x, heads of `size`, one after the other: norms of queries and of keys (weights,
    bias, over how many items at a time; 0: none), rotary positions (`turns`: cosines, and sines `apart` bytes on; 0:
    none), half-split; then keys and values go to their place in the cache"""
    v = integers(p, 21)
    kind, x, heads, kv_heads, size, norm, eps = v[1], v[2], v[3], v[4], v[5], v[6], floats(p + 8 * 7, 1)[0]
    turns, apart, position, keys, values = v[14], v[15], integers(v[16], 1)[0], v[17], v[18]
    head_stride, stride, k = v[19], v[20], x + heads * size * 4
    if v[8]:
        for at in range(x, k, 4 * v[10]):
            normed(norm, at, v[10], v[8], v[9], eps, at)
    if v[11]:
        for at in range(k, k + kv_heads * size * 4, 4 * v[13]):
            normed(norm, at, v[13], v[11], v[12], eps, at)
    if turns:
        half = size // 2
        cos, sin = floats(turns + position * half * 4, half), floats(turns + apart + position * half * 4, half)
        for head in range(heads + kv_heads):
            found = floats(x + head * size * 4, size)
            for i in range(half):
                a, b = found[i], found[half + i]
                found[i] = a * cos[i] - b * sin[i]
                found[half + i] = b * cos[i] + a * sin[i]
    for head in range(kv_heads):
        to = head * head_stride + position * stride
        key, value = floats(k + head * size * 4, size), floats(k + (kv_heads + head) * size * 4, size)
        for i in range(size):
            store(kind, keys + to, i, key[i])
            store(kind, values + to, i, value[i])


@task_kernel
def attend(p, task):  # type: ignore[no-untyped-def]
    """out[head] = values weighed by softmax(scale * q[head] . keys), over the last `window` positions up to this one; a
    task is one head. scratch (heads, context)"""
    v = integers(p, 15)
    kind, q, group, size, end, keys, values = v[1], v[2], v[3] // v[4], v[5], integers(v[6], 1)[0] + 1, v[7], v[8]
    head_stride, stride, scratch, context, out, window = v[9], v[10], v[11], v[12], v[13], v[14]
    length = end if end < window else window
    begin = (end - length) * stride
    scores = scratch + task * context * 4
    score, at = floats(scores, length), q + task * size * 4
    scale, most = np.float32(1 / np.sqrt(size)), np.float32(-np.inf)
    row = keys + task // group * head_stride + begin
    for i in range(length):
        value = scale * dot(kind, row, row + stride, at, size)
        score[i] = value
        most = value if value > most else most
        row += stride
    exps(scores, length, most)
    total = np.float32(0)
    for i in range(length):
        total += score[i]
    y, row, i = out + task * size * 4, values + task // group * head_stride + begin, 0
    found = floats(y, size)
    found[:] = 0
    while i + 4 <= length:
        here, row = (row, row + stride, row + 2 * stride, row + 3 * stride), row + 4 * stride
        add_4_rows(kind, y, size, here, here, (score[i], score[i + 1], score[i + 2], score[i + 3]))
        i += 4
    for j in range(i, length):
        add_row(kind, y, size, row, row, score[j])
        row += stride
    for i in range(size):
        found[i] /= total
