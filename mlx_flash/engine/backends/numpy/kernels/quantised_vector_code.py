"""LLVM vector instructions for quantised rows: dot products with codes, and sums of codes times numbers.

A vector is 16 words of codes. Shifted to the top of a fraction below a fixed exponent, a code of b bits is the fp32
2**b + code: one shift and one mask instead of a conversion. So the k-th codes of 16 words stand in one vector, and x
and sums are kept in that order ("spread"): of 16 words all first codes, then all second ones, ... What does not fill 16
words is one group at a time, spread over the words of a group. The order of every sum is written down, as in
`kernels_emit`. Knows addresses and counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector_code import BFLOAT16, FLOAT16, FLOAT32, LANES, _load, _loop, _store

SHAPES = [(bits, size) for bits in (4, 8) for size in (32, 64, 128)]  # bits and group size by number
WORD_BITS, FRACTION_BITS, EXPONENT_BIAS = 32, 23, 127
ROWS = 4  # added up in one pass over the sums
_INT, _I32, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()


class _Shape:
    """One way of quantising, and the instructions that depend on it."""

    def __init__(self, builder: Any, number: int):
        self.builder = builder
        self.bits, self.size = SHAPES[number]
        self.per_word = WORD_BITS // self.bits
        self.rest_lanes = self.size // self.per_word  # words of a group

    def _constant(self, lanes: int, value: int) -> Any:
        return ir.Constant(ir.VectorType(_I32, lanes), [value] * lanes)

    def words(self, address: Any, i: Any, lanes: int) -> Any:
        at = self.builder.add(address, self.builder.mul(i, _INT(4)))
        return self.builder.load(self.builder.inttoptr(at, ir.VectorType(_I32, lanes).as_pointer()), align=4)

    def decode(self, words: Any, k: int, lanes: int) -> Any:
        """2**bits + the k-th code of each word, fp32."""
        builder, place = self.builder, FRACTION_BITS - self.bits
        right = k * self.bits - place
        if right > 0:
            words = builder.lshr(words, self._constant(lanes, right))
        elif right < 0:
            words = builder.shl(words, self._constant(lanes, -right))
        codes = builder.and_(words, self._constant(lanes, ((1 << self.bits) - 1) << place))
        exponent = self._constant(lanes, (EXPONENT_BIAS + self.bits) << FRACTION_BITS)
        return builder.bitcast(builder.or_(codes, exponent), ir.VectorType(_FLOAT, lanes))

    def at(self, address: Any, i: Any, k: int, lanes: int) -> Any:
        """Where, in spread items, the k-th codes of the words i.. are: address and index for a load."""
        index = self.builder.add(self.builder.mul(i, _INT(self.per_word)), _INT(k * lanes))
        return address, index

    def per_group(self, address: Any, i: Any, lanes: int) -> Any:
        """fp32 per group, spread over the words i.. ."""
        builder = self.builder
        group = builder.lshr(builder.mul(i, _INT(self.per_word)), _INT(self.size.bit_length() - 1))
        groups = max(1, lanes * self.per_word // self.size)
        value = _vector_load(builder, address, group, groups)
        places = [lane * groups // lanes for lane in range(lanes)]
        return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, lanes), places))


def _vector_load(builder: Any, address: Any, index: Any, lanes: int) -> Any:
    at = builder.add(address, builder.mul(index, _INT(4)))
    return builder.load(builder.inttoptr(at, ir.VectorType(_FLOAT, lanes).as_pointer()), align=4)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    lanes = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{lanes}"), [a, b, c])


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = builder.insert_element(ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _folded(builder: Any, total: Any) -> Any:
    """The sum of a vector's items, in halves."""
    width = total.type.count
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(b, b + width))) for b in (0, width))
        total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
    return builder.extract_element(total, _I32(0))


def _prefetch(builder: Any, address: Any) -> None:
    """Fetch the line at an address, to be read."""
    pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
    builder.call(fetch, [builder.inttoptr(address, pointer), _I32(0), _I32(1), _I32(1)])


def _switch(builder: Any, value: Any, known: int, emit: Callable[[int], Any]) -> Any:
    """Emit for each number below `known` and branch on `value` while running; emit gives a fp32 or nothing."""
    end = builder.append_basic_block("end")
    results = []
    for number in range(known):
        mine, other = builder.append_basic_block("case"), builder.append_basic_block("other")
        builder.cbranch(builder.icmp_signed("==", value, _INT(number)), mine, other)
        builder.position_at_end(mine)
        results.append((emit(number), builder.block))
        builder.branch(end)
        builder.position_at_end(other)
    builder.unreachable()
    builder.position_at_end(end)
    if results[0][0] is None:
        return None
    phi = builder.phi(_FLOAT)
    for result, block in results:
        phi.add_incoming(result, block)
    return phi


def _emit_dot(builder: Any, number: int, codes: Any, following: Any, words: Any, x: Any, less: Any, scales: Any) -> Any:
    shape = _Shape(builder, number)

    def body(lanes: int) -> Callable[..., list[Any]]:
        def step(i: Any, sums: list[Any]) -> list[Any]:
            if lanes == LANES:
                _prefetch(builder, builder.add(following, builder.mul(i, _INT(4))))
            found = shape.words(codes, i, lanes)
            total = _vector_load(builder, less, i, lanes)
            for k in range(shape.per_word):
                address, index = shape.at(x, i, k, lanes)
                total = _fma(
                    builder, shape.decode(found, k, lanes), _vector_load(builder, address, index, lanes), total
                )
            return [_fma(builder, shape.per_group(scales, i, lanes), total, sums[0])]

        return step

    zero = ir.Constant(ir.VectorType(_FLOAT, LANES), [0.0] * LANES)
    i, (total,) = _loop(builder, _INT(0), words, LANES, [zero], body(LANES))
    found = _folded(builder, total)
    lanes = shape.rest_lanes
    if lanes >= LANES:
        return found
    rest = ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)
    _, (total,) = _loop(builder, i, words, lanes, [rest], body(lanes))
    return builder.fadd(found, _folded(builder, total))


def _emit_add(
    builder: Any, number: int, y: Any, words: Any, rows: list[Any], then: list[Any], scales: list[Any], more: Any
) -> None:
    shape = _Shape(builder, number)

    def body(lanes: int) -> Callable[..., list[Any]]:
        def step(i: Any, _: list[Any]) -> list[Any]:
            if lanes == LANES:
                for row in then:
                    _prefetch(builder, builder.add(row, builder.mul(i, _INT(4))))
            found = [shape.words(row, i, lanes) for row in rows]
            factors = [shape.per_group(scale, i, lanes) for scale in scales]
            offset = shape.per_group(more, i, lanes)
            for k in range(shape.per_word):
                address, index = shape.at(y, i, k, lanes)
                total = builder.fadd(_vector_load(builder, address, index, lanes), offset)
                for row, factor in zip(found, factors, strict=True):
                    total = _fma(builder, factor, shape.decode(row, k, lanes), total)
                _store(builder, total, address, index)
            return []

        return step

    i, _ = _loop(builder, _INT(0), words, LANES, [], body(LANES))
    if shape.rest_lanes < LANES:
        _loop(builder, i, words, shape.rest_lanes, [], body(shape.rest_lanes))


@intrinsic
def codes_dot(typing: Any, shape: Any, codes: Any, following: Any, words: Any, x: Any, less: Any, scales: Any) -> Any:
    """Sum over groups of scale times the sum of (code - middle) x, of `words` words of codes. x: spread, fp32; less:
    per word -(2**bits + middle) times the sum of its x; scales: fp32; following: codes that are read next."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shape, *rest = arguments
        return _switch(builder, shape, len(SHAPES), lambda number: _emit_dot(builder, number, *rest))

    return types.float32(*[types.int64] * 7), generate


@intrinsic
def codes_add(
    typing: Any, shape: Any, y: Any, words: Any, rows: Any, then: Any, scales: Any, apart: Any, more: Any
) -> Any:
    """Add to the spread fp32 at y `more` of the group, then (2**bits + code) times the group's factor of each of `rows`
    in this order. rows, then: four addresses of codes, of which `then` are read next; scales: factors per group, fp32,
    those of the rows `apart` bytes apart; more: fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shape, y, words, rows, then, scales, apart, more = arguments
        factors = [builder.add(scales, builder.mul(apart, _INT(row))) for row in range(ROWS)]
        here, later = (cgutils.unpack_tuple(builder, group) for group in (rows, then))

        def emit(number: int) -> None:
            _emit_add(builder, number, y, words, here, later, factors, more)

        _switch(builder, shape, len(SHAPES), emit)
        return context.get_dummy_value()

    four = types.UniTuple(types.int64, ROWS)
    return types.void(*[types.int64] * 3, four, four, *[types.int64] * 3), generate


KINDS = (FLOAT32, BFLOAT16, FLOAT16)


@intrinsic
def ends_dot(typing: Any, kind: Any, scales: Any, biases: Any, groups: Any, middle: Any, x: Any, out: Any) -> Any:
    """Sum over groups of (bias + middle * scale) times x, fp32 per group; out: the scales as fp32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, scales, biases, groups, middle, x, out = arguments

        def emit(known: int) -> Any:
            def step(lanes: int) -> Callable[..., list[Any]]:
                def body(g: Any, sums: list[Any]) -> list[Any]:
                    scale = _load(builder, scales, g, KINDS[known], lanes)
                    factor = _splat(builder, middle, lanes) if lanes > 1 else middle
                    bias = _fma(builder, factor, scale, _load(builder, biases, g, KINDS[known], lanes))
                    _store(builder, scale, out, g)
                    return [_fma(builder, bias, _load(builder, x, g, FLOAT32, lanes), sums[0])]

                return body

            zero = ir.Constant(ir.VectorType(_FLOAT, LANES), [0.0] * LANES)
            g, (total,) = _loop(builder, _INT(0), groups, LANES, [zero], step(LANES))
            _, (total,) = _loop(builder, g, groups, 1, [_folded(builder, total)], step(1))
            return total

        return _switch(builder, kind, len(KINDS), emit)

    arguments = (types.int64, types.int64, types.int64, types.int64, types.float32, types.int64, types.int64)
    return types.float32(*arguments), generate


@intrinsic
def ends_add(
    typing: Any, kind: Any, scales: Any, biases: Any, groups: Any, h: Any, least: Any, factors: Any, more: Any
) -> Any:
    """factors[g] = h * scale; more[g] += h * (bias - least * scale)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, scales, biases, groups, h, least, factors, more = arguments
        minus = builder.fneg(least)

        def emit(known: int) -> None:
            def step(lanes: int) -> Callable[..., list[Any]]:
                def body(g: Any, _: list[Any]) -> list[Any]:
                    scale = _load(builder, scales, g, KINDS[known], lanes)
                    less, factor = (_splat(builder, v, lanes) if lanes > 1 else v for v in (minus, h))
                    bias = _fma(builder, less, scale, _load(builder, biases, g, KINDS[known], lanes))
                    _store(builder, builder.fmul(factor, scale), factors, g)
                    _store(builder, _fma(builder, factor, bias, _load(builder, more, g, FLOAT32, lanes)), more, g)
                    return []

                return body

            g, _ = _loop(builder, _INT(0), groups, LANES, [], step(LANES))
            _loop(builder, g, groups, 1, [], step(1))

        _switch(builder, kind, len(KINDS), emit)
        return context.get_dummy_value()

    numbers = (types.float32, types.float32)
    return types.void(*[types.int64] * 4, *numbers, types.int64, types.int64), generate


def _emit_group(builder: Any, number: int, codes: Any, rows: Any, h: Any, less: Any, out: Any) -> None:
    shape = _Shape(builder, number)
    words, halves = shape.rest_lanes, max(1, shape.rest_lanes // LANES)  # words of a row

    def sixteen(r: Any, _: list[Any]) -> list[Any]:
        begin = builder.mul(r, _INT(words))
        totals = []
        for vector in range(words):
            half = vector % halves
            found = shape.words(codes, builder.add(begin, _INT(vector * LANES)), LANES)
            total = _vector_load(builder, less, _INT(half * LANES), LANES)
            for k in range(shape.per_word):
                factor = _vector_load(builder, h, _INT((half * shape.per_word + k) * LANES), LANES)
                total = _fma(builder, shape.decode(found, k, LANES), factor, total)
            totals.append(total)
        if halves > 1:
            totals = [builder.fadd(a, b) for a, b in zip(totals[0::2], totals[1::2], strict=True)]
        even, odd = (ir.Constant(ir.VectorType(_I32, LANES), list(range(b, 2 * LANES, 2))) for b in (0, 1))
        while len(totals) > 1:
            pairs = zip(totals[0::2], totals[1::2], strict=True)
            totals = [
                builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
            ]
        _store(builder, totals[0], out, r)
        return []

    _loop(builder, _INT(0), rows, LANES, [], sixteen)


@intrinsic
def group_dots(typing: Any, shape: Any, codes: Any, rows: Any, h: Any, less: Any, out: Any) -> Any:
    """out[r] = sum of (code - middle) h over the codes of row r, a group each; rows: a multiple of 16. h, less: as
    `quantised_loops.spread_group` gives them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shape, *rest = arguments
        _switch(builder, shape, len(SHAPES), lambda number: _emit_group(builder, number, *rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def group_ends(
    typing: Any, kind: Any, scales: Any, biases: Any, dots: Any, rows: Any, middle: Any, total: Any, y: Any
) -> Any:
    """y[r] += scale dots[r] + (bias + middle * scale) total; rows: a multiple of 16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, scales, biases, dots, rows, middle, total, y = arguments

        def emit(known: int) -> None:
            def body(r: Any, _: list[Any]) -> list[Any]:
                scale = _load(builder, scales, r, KINDS[known], LANES)
                bias = _load(builder, biases, r, KINDS[known], LANES)
                bias = _fma(builder, _splat(builder, middle, LANES), scale, bias)
                found = _fma(builder, bias, _splat(builder, total, LANES), _load(builder, y, r, FLOAT32, LANES))
                _store(builder, _fma(builder, scale, _load(builder, dots, r, FLOAT32, LANES), found), y, r)
                return []

            _loop(builder, _INT(0), rows, LANES, [], body)

        _switch(builder, kind, len(KINDS), emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.float32, types.float32, types.int64), generate
