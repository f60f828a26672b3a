"""LLVM vector instructions for the Numba kernels: dot products and row sums over weights as they are stored.

The order of every sum is written down: what a compiler may reassociate ("fastmath") can come out differently in two
kernels that inline the same dot product. LLVM turns the vectors into whatever the processor has. Knows addresses and
counts. Addresses are i64, `index` counts items, a vector is 16 lanes; loads need an item's alignment only.
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
CHAINS = 2  # vectors of partial sums per row: more would not fit the registers when four rows go together
FLOAT32, BFLOAT16, FLOAT16, INT8 = 0, 1, 2, 3  # how weights are stored
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT8: 1}
AHEAD_BYTES = 3072  # how long before use an item is fetched: the processor's own prefetch stops at page ends
LINE_BYTES = 64

_INT, _I8, _I16, _I32, _FLOAT = (*(ir.IntType(bits) for bits in (64, 8, 16, 32)), ir.FloatType())
_VECTOR = ir.VectorType(_FLOAT, LANES)


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


def _emit_store(builder: Any, kind: int, address: Any, index: Any, value: Any) -> None:
    size = ITEM_BYTES[kind]
    at = builder.add(address, builder.mul(index, _INT(size)))
    if kind == FLOAT32:
        builder.store(value, builder.inttoptr(at, _FLOAT.as_pointer()), align=size)
        return
    bits = builder.bitcast(value, _I32)
    if kind == FLOAT16:
        stored = _half_bits(builder, value, bits)
    else:  # nothing is stored as int8
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
        quiet = builder.or_(builder.lshr(bits, _I32(16)), _I32(0x40))
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, _I32(0x7FFFFFFF)), _I32(0x7F800000))
        stored = builder.trunc(builder.select(is_nan, quiet, rounded), _I16)
    builder.store(stored, builder.inttoptr(at, _I16.as_pointer()), align=2)


def _half_bits(builder: Any, value: Any, bits: Any) -> Any:
    """fp16 of a fp32, as i16."""
    if HALF_IN_HARDWARE:
        return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _I16)
    sign = builder.and_(builder.lshr(bits, _I32(16)), _I32(0x8000))
    size = builder.and_(bits, _I32(0x7FFFFFFF))
    # Ordinary numbers: exponent and fraction in fp16's places, rounded by what falls off.
    odd = builder.and_(builder.lshr(size, _I32(13)), _I32(1))
    ordinary = builder.lshr(builder.add(size, builder.add(odd, _I32(0xC8000FFF))), _I32(13))
    # Small ones: adding 0.5 lets the processor round to fp16's smallest step, which is fp32's at that size.
    tiny = builder.fadd(builder.bitcast(size, _FLOAT), ir.Constant(_FLOAT, 0.5))
    subnormal = builder.sub(builder.bitcast(tiny, _I32), _I32(0x3F000000))
    endless = builder.select(builder.icmp_unsigned(">", size, _I32(0x7F800000)), _I32(0x7E00), _I32(0x7C00))
    found = builder.select(builder.icmp_unsigned("<", size, _I32(0x38800000)), subnormal, ordinary)
    found = builder.select(builder.icmp_unsigned(">=", size, _I32(0x477FF000)), endless, found)
    return builder.trunc(builder.or_(sign, found), _I16)


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


def _fetch(builder: Any, at: Any, nbytes: int) -> None:
    """Fetch so many bytes at an address: to read, into the outer caches, data."""
    pointer = _I8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
    for line in range(0, nbytes, LINE_BYTES):
        builder.call(fetch, [builder.inttoptr(builder.add(at, _INT(line)), pointer), _I32(0), _I32(1), _I32(1)])


def _prefetch(builder: Any, kind: int, w: Any, following: Any, i: Any, n: Any, items: int) -> None:
    """Fetch the `items` that lie AHEAD_BYTES (at most a row) after item i; past the row's end, the following row's."""
    size = ITEM_BYTES[kind]
    lead = _INT(AHEAD_BYTES // size)
    ahead = builder.add(i, builder.select(builder.icmp_signed("<", n, lead), n, lead))
    beyond = builder.sub(following, builder.mul(n, _INT(size)))
    base = builder.select(builder.icmp_signed("<", ahead, n), w, beyond)
    _fetch(builder, builder.add(base, builder.mul(ahead, _INT(size))), items * size)


def _emit_dots(builder: Any, kind: int, rows: list[Any], following: list[Any], x: Any, n: Any) -> list[Any]:
    """sum row[j] x[j] of each row: CHAINS vectors of partial sums, added, folded in halves, then the last n % 16 items
    one by one. The same sum whatever other rows go in one call."""
    zero = ir.Constant(_VECTOR, [0.0] * LANES)

    def step(chains: int) -> Callable[..., list[Any]]:
        def body(i: Any, sums: list[Any]) -> list[Any]:
            sums = list(sums)
            if chains > 1 and len(rows) == 1:
                _prefetch(builder, kind, rows[0], following[0], i, n, chains * LANES)
            elif chains > 1:
                for later in following:
                    at = builder.add(later, builder.mul(i, _INT(ITEM_BYTES[kind])))
                    _fetch(builder, at, chains * LANES * ITEM_BYTES[kind])
            for chain in range(chains):
                at = builder.add(i, _INT(LANES * chain))
                factor = _load(builder, x, at, FLOAT32, LANES)
                for r, row in enumerate(rows):
                    k = r * CHAINS + chain
                    sums[k] = _fma(builder, _load(builder, row, at, kind, LANES), factor, sums[k])
            return sums

        return body

    def last(i: Any, sums: list[Any]) -> list[Any]:
        factor = _load(builder, x, i, FLOAT32, 1)
        return [_fma(builder, _load(builder, row, i, kind, 1), factor, s) for row, s in zip(rows, sums, strict=True)]

    i, sums = _loop(builder, _INT(0), n, CHAINS * LANES, [zero] * (CHAINS * len(rows)), step(CHAINS))
    i, sums = _loop(builder, i, n, LANES, sums, step(1))
    totals = []
    for r in range(len(rows)):
        total = builder.fadd(sums[r * CHAINS], sums[r * CHAINS + 1])
        width = LANES
        while width > 1:
            width //= 2
            low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(b, b + width))) for b in (0, width))
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        totals.append(builder.extract_element(total, _I32(0)))
    _, totals = _loop(builder, i, n, 1, totals, last)
    return list(totals)


def _emit_add(builder: Any, kind: int, y: Any, rows: list[Any], following: list[Any], h: list[Any], n: Any) -> None:
    """y[j] += h[0] rows[0][j], then h[1] rows[1][j] and so on: the same sum however many rows go in one call."""
    splats = [_splat(builder, value) for value in h]

    def step(lanes: int, factors: list[Any]) -> Callable[..., list[Any]]:
        def body(i: Any, _: list[Any]) -> list[Any]:
            if lanes > 1 and len(rows) == 1:
                _prefetch(builder, kind, rows[0], following[0], i, n, lanes)
            elif lanes > 1:
                for later in following:
                    at = builder.add(later, builder.mul(i, _INT(ITEM_BYTES[kind])))
                    _fetch(builder, at, lanes * ITEM_BYTES[kind])
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
def dot(typing: Any, kind: Any, w: Any, following: Any, x: Any, n: Any) -> Any:
    """Dot product of n weights at address w with n fp32 at address x; `following` is the next row's address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, w, following, x, n = arguments
        return _by_kind(builder, kind, lambda known: _emit_dots(builder, known, [w], [following], x, n)[0])

    return types.float32(*[types.int64] * 5), generate


@intrinsic
def dot_4(typing: Any, kind: Any, rows: Any, following: Any, x: Any, n: Any, out: Any) -> Any:
    """`dot` of the rows at four addresses, to four fp32 at address out; `following` are fetched meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, rows, following, x, n, out = arguments
        here, then = (cgutils.unpack_tuple(builder, each) for each in (rows, following))

        def emit(known: int) -> None:
            for k, total in enumerate(_emit_dots(builder, known, here, then, x, n)):
                _store(builder, total, out, _INT(k))

        _by_kind(builder, kind, emit)
        return context.get_dummy_value()

    four = types.UniTuple(types.int64, 4)
    return types.void(types.int64, four, four, *[types.int64] * 3), generate


@intrinsic
def store(typing: Any, kind: Any, address: Any, index: Any, value: Any) -> Any:
    """Write a fp32 as item `index` of weights at an address: to the nearest, ties to even; a NaN stays a quiet one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, address, index, value = arguments
        _by_kind(builder, kind, lambda known: _emit_store(builder, known, address, index, value))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), generate


@intrinsic
def add_row(typing: Any, kind: Any, y: Any, n: Any, row: Any, following: Any, h: Any) -> Any:
    """Add h times the n weights at address row to the n fp32 at address y; `following` is what is read next."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, y, n, row, following, h = arguments
        _by_kind(builder, kind, lambda known: _emit_add(builder, known, y, [row], [following], [h], n))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.float32), generate


@intrinsic
def add_4_rows(typing: Any, kind: Any, y: Any, n: Any, rows: Any, following: Any, h: Any) -> Any:
    """`add_row` for rows at four addresses times four h in this order, with a quarter of the traffic to y; `following`
    are fetched meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, y, n, *groups = arguments
        here, then, factors = (cgutils.unpack_tuple(builder, each) for each in groups)
        _by_kind(builder, kind, lambda known: _emit_add(builder, known, y, here, then, factors, n))
        return context.get_dummy_value()

    four, factors = (types.UniTuple(item, 4) for item in (types.int64, types.float32))
    return types.void(*[types.int64] * 3, four, four, factors), generate


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address that several threads share; returns what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("add", at, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate
