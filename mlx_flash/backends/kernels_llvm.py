"""The compiled half of the Numba kernels: dot products and row sums as LLVM vector instructions, and the loops on them.

The order of every sum is written down: what a compiler may reassociate ("fastmath") can come out differently in two
kernels that inline the same dot product. LLVM turns the vectors into whatever the processor has. Knows addresses and
counts. It is all in one file, as Numba's disk cache looks at a function's own file only; importing compiles nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
FLOAT32, BFLOAT16, FLOAT16, INT8 = 0, 1, 2, 3  # how weights are stored
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT8: 1}
AHEAD_BYTES = 3072  # how long before use an item is fetched: the processor's own prefetch stops at page ends
LINE_BYTES = 64

_INT, _I8, _I16, _I32, _FLOAT = (*(ir.IntType(bits) for bits in (64, 8, 16, 32)), ir.FloatType())
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _jit(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit`, cached on disk where some folder can be written."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no locator: the install and the home are read-only
            return numba.njit(**options)(function)

    return decorate


def _half_in_hardware() -> bool:
    """Whether the processor compiled for converts fp16. Without that LLVM calls a function which is not there to call,
    and the process dies."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    asked: str | None = getattr(numba.config, "CPU_FEATURES", None)
    if asked is not None:
        return "+f16c" in asked
    return bool(binding.get_host_cpu_features().get("f16c", False))


HALF_IN_HARDWARE = _half_in_hardware()

# Emitting LLVM. Addresses are i64, `index` counts items, a vector is 16 lanes; loads need an item's alignment only.


def _load(builder: Any, address: Any, index: Any, kind: int, lanes: int) -> Any:
    """Items index..index+lanes of the weights at `address`, as fp32."""

    def shaped(item: Any) -> Any:
        return ir.VectorType(item, lanes) if lanes > 1 else item

    size = ITEM_BYTES[kind]
    stored = shaped({FLOAT32: _FLOAT, INT8: _I8}.get(kind, _I16))
    at = builder.add(address, builder.mul(index, _INT(size)))
    value = builder.load(builder.inttoptr(at, stored.as_pointer()), align=size)
    if kind == FLOAT32:
        return value
    if kind == INT8:
        return builder.sitofp(value, shaped(_FLOAT))

    def constant(number: float, item: Any = _I32) -> Any:
        return ir.Constant(shaped(item), [number] * lanes if lanes > 1 else number)

    if kind == FLOAT16 and HALF_IN_HARDWARE:
        return builder.fpext(builder.bitcast(value, shaped(ir.HalfType())), shaped(_FLOAT))
    bits = builder.shl(builder.zext(value, shaped(_I32)), constant(16))
    if kind == BFLOAT16:
        return builder.bitcast(bits, shaped(_FLOAT))
    # Exponent and fraction in fp32's places, then 2^112 for the difference in bias; infinity and NaN keep all ones.
    magnitude = builder.lshr(builder.and_(bits, constant(0x7FFF0000)), constant(3))
    scaled = builder.fmul(builder.bitcast(magnitude, shaped(_FLOAT)), constant(2.0**112, _FLOAT))
    endless = builder.or_(magnitude, constant(0x7F800000))
    is_endless = builder.icmp_unsigned(">=", magnitude, constant(0x0F800000))
    magnitude = builder.select(is_endless, endless, builder.bitcast(scaled, shaped(_I32)))
    return builder.bitcast(builder.or_(magnitude, builder.and_(bits, constant(0x80000000))), shaped(_FLOAT))


def _store(builder: Any, value: Any, address: Any, index: Any) -> None:
    at = builder.add(address, builder.mul(index, _INT(4)))
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=4)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c: fused where the processor has it, else two steps; the same choice everywhere on one machine."""
    suffix = f"v{LANES}f32" if isinstance(a.type, ir.VectorType) else "f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{suffix}"), [a, b, c])


def _splat(builder: Any, value: Any) -> Any:
    vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _loop(builder: Any, start: Any, stop: Any, step: int, carried: list[Any], body: Callable[..., list[Any]]) -> Any:
    """`while i + step <= stop: carried = body(i, carried); i += step`; returns the last i and carried."""
    before = builder.block
    head = builder.append_basic_block("head")
    inside = builder.append_basic_block("body")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(_INT)
    values = [builder.phi(value.type) for value in carried]
    following = builder.add(i, _INT(step))
    builder.cbranch(builder.icmp_signed("<=", following, stop), inside, after)
    builder.position_at_end(inside)
    results = body(i, values)
    end = builder.block
    builder.branch(head)
    for phi, first, later in zip([i, *values], [start, *carried], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    builder.position_at_end(after)
    return i, values


def _prefetch(builder: Any, kind: int, w: Any, following: Any, i: Any, n: Any, items: int) -> None:
    """Fetch the `items` that lie AHEAD_BYTES (at most a row) after item i; past the row's end, the following row's."""
    size = ITEM_BYTES[kind]
    pointer = _I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
    lead = _INT(AHEAD_BYTES // size)
    ahead = builder.add(i, builder.select(builder.icmp_signed("<", n, lead), n, lead))
    beyond = builder.sub(following, builder.mul(n, _INT(size)))
    base = builder.select(builder.icmp_signed("<", ahead, n), w, beyond)
    base = builder.add(base, builder.mul(ahead, _INT(size)))
    for line in range(0, items * size, LINE_BYTES):
        at = builder.inttoptr(builder.add(base, _INT(line)), pointer)
        builder.call(fetch, [at, _I32(0), _I32(3), _I32(1)])  # to read, into all caches, data


def _emit_dot(builder: Any, kind: int, w: Any, following: Any, x: Any, n: Any) -> Any:
    """sum w[j] x[j]: four vectors of partial sums, folded in halves, then the last n % 16 items one by one."""

    def step(i: Any, sums: list[Any]) -> list[Any]:
        if len(sums) == 4:
            _prefetch(builder, kind, w, following, i, n, 4 * LANES)
        at = [builder.add(i, _INT(LANES * k)) for k in range(len(sums))]
        return [
            _fma(builder, _load(builder, w, j, kind, LANES), _load(builder, x, j, FLOAT32, LANES), total)
            for j, total in zip(at, sums, strict=True)
        ]

    def last(i: Any, sums: list[Any]) -> list[Any]:
        return [_fma(builder, _load(builder, w, i, kind, 1), _load(builder, x, i, FLOAT32, 1), sums[0])]

    i, sums = _loop(builder, _INT(0), n, 4 * LANES, [ir.Constant(_VECTOR, [0.0] * LANES)] * 4, step)
    i, (sums[0],) = _loop(builder, i, n, LANES, sums[:1], step)
    total = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
    width = LANES
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(b, b + width))) for b in (0, width))
        total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
    i, (result,) = _loop(builder, i, n, 1, [builder.extract_element(total, _I32(0))], last)
    return result


def _emit_add(builder: Any, kind: int, y: Any, rows: list[Any], h: list[Any], n: Any) -> None:
    """y[j] += h[0] rows[0][j], then h[1] rows[1][j] and so on: the same sum however many rows go in one call."""
    splats = [_splat(builder, value) for value in h]

    def step(lanes: int, factors: list[Any]) -> Callable[..., list[Any]]:
        def body(i: Any, _: list[Any]) -> list[Any]:
            total = _load(builder, y, i, FLOAT32, lanes)
            for row, factor in zip(rows, factors, strict=True):
                total = _fma(builder, _load(builder, row, i, kind, lanes), factor, total)
            _store(builder, total, y, i)
            return []

        return body

    i, _ = _loop(builder, _INT(0), n, LANES, [], step(LANES, splats))
    _loop(builder, i, n, 1, [], step(1, h))


def _by_kind(builder: Any, kind: Any, emit: Callable[[int], Any]) -> Any:
    """Emit for every storage dtype and branch on `kind` while running: one compilation for all of them."""
    end = builder.append_basic_block("end")
    results = []
    for known in ITEM_BYTES:
        mine, other = builder.append_basic_block("kind"), builder.append_basic_block("other")
        builder.cbranch(builder.icmp_signed("==", kind, _INT(known)), mine, other)
        builder.position_at_end(mine)
        results.append((emit(known), builder.block))
        builder.branch(end)
        builder.position_at_end(other)
    builder.unreachable()
    builder.position_at_end(end)
    if results[0][0] is None:
        return None
    phi = builder.phi(results[0][0].type)
    for value, block in results:
        phi.add_incoming(value, block)
    return phi


@intrinsic
def _dot(typing: Any, kind: Any, w: Any, following: Any, x: Any, n: Any) -> Any:
    """Dot product of n weights at address w with n fp32 at address x; `following` is the next row's address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, w, following, x, n = arguments
        return _by_kind(builder, kind, lambda known: _emit_dot(builder, known, w, following, x, n))

    return types.float32(*[types.int64] * 5), generate


@intrinsic
def _add_row(typing: Any, kind: Any, y: Any, n: Any, row: Any, h: Any) -> Any:
    """Add h times the n weights at address row to the n fp32 at address y."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, y, n, row, h = arguments
        _by_kind(builder, kind, lambda known: _emit_add(builder, known, y, [row], [h], n))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), generate


@intrinsic
def _add_4_rows(
    typing: Any, kind: Any, y: Any, n: Any, a: Any, b: Any, c: Any, d: Any, h: Any, i: Any, j: Any, k: Any
) -> Any:
    """`_add_row` for rows a, b, c, d times h, i, j, k in this order, with a quarter of the traffic to y."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, y, n, *rest = arguments
        _by_kind(builder, kind, lambda known: _emit_add(builder, known, y, rest[:4], rest[4:], n))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, *[types.float32] * 4), generate


@intrinsic
def _fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address that several threads share; returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("add", at, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


# Kernels. Each takes tasks from `state` (see `workers`) until none is left and returns how many are done.
# Arguments are addresses where an array's type, layout or writability would cost a compilation of its own.


@_jit(nogil=True)
def dots(state, tasks, kind, w, stride, rows, x, n, out):  # type: ignore[no-untyped-def]
    """out[i] = row i (rows[i], unless rows is empty) of w . x"""
    taken, done, count = state.ctypes.data, state[1:].ctypes.data, len(out)
    while True:
        task = _fetch_add(taken, 1)
        if task >= tasks:
            return _fetch_add(done, 0)
        for i in range(count * task // tasks, count * (task + 1) // tasks):
            j = min(i + 1, count - 1)
            row, following = (rows[i], rows[j]) if len(rows) else (i, j)
            out[i] = _dot(kind, w + row * stride, w + following * stride, x, n)
        _fetch_add(done, 1)


@_jit(nogil=True)
def tiles(state, tasks, kind, rows, h, starts, across, sums):  # type: ignore[no-untyped-def]
    """sums[b] = the sum of block b; a task is one of `across` column ranges of one block. rows: addresses."""
    taken, done, d = state.ctypes.data, state[1:].ctypes.data, sums.shape[1]
    item = 4 if kind == FLOAT32 else 2
    while True:
        task = _fetch_add(taken, 1)
        if task >= tasks:
            return _fetch_add(done, 0)
        block, tile = task // across, task % across
        first, last = d * tile // across, d * (tile + 1) // across
        y, n, at = sums[block, first:].ctypes.data, last - first, first * item
        sums[block, first:last] = 0
        i, end = starts[block], starts[block + 1]
        while i + 4 <= end:
            a, b, c, e = rows[i] + at, rows[i + 1] + at, rows[i + 2] + at, rows[i + 3] + at
            _add_4_rows(kind, y, n, a, b, c, e, h[i], h[i + 1], h[i + 2], h[i + 3])
            i += 4
        for j in range(i, end):
            _add_row(kind, y, n, rows[j] + at, h[j])
        _fetch_add(done, 1)


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
        head = _fetch_add(taken, 1)
        if head >= tasks:
            return _fetch_add(done, 0)
        key = keys + head // group * head_stride
        for i in range(out.shape[1]):
            row = key + i * stride
            out[head, i] = _dot(kind, row, row + stride, q + head * size * 4, size)
        _fetch_add(done, 1)


@_jit(nogil=True)
def weigh(state, tasks, kind, weights, values, head_stride, stride, group, out):  # type: ignore[no-untyped-def]
    """out[head] = sum of weights[head, i] times value i of head // group, i ascending; a task is one head"""
    taken, done, size, length = state.ctypes.data, state[1:].ctypes.data, out.shape[1], weights.shape[1]
    while True:
        head = _fetch_add(taken, 1)
        if head >= tasks:
            return _fetch_add(done, 0)
        out[head] = 0
        y, row, p, i = out[head].ctypes.data, values + head // group * head_stride, weights[head], 0
        while i + 4 <= length:
            a, b, c, d = row, row + stride, row + 2 * stride, row + 3 * stride
            _add_4_rows(kind, y, size, a, b, c, d, p[i], p[i + 1], p[i + 2], p[i + 3])
            row += 4 * stride
            i += 4
        for j in range(i, length):
            _add_row(kind, y, size, values + head // group * head_stride + j * stride, p[j])
        _fetch_add(done, 1)
