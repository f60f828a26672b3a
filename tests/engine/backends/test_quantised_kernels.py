"""Quantised rows on every backend: against dequantise-then-multiply, against MLX, and with themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.backends.base import SEGMENTS
from mlx_flash.engine.backends.numpy.kernels import base as kernels
from mlx_flash.engine.numerics.affine import AffineBundles, AffineRows, quantise
from mlx_flash.engine.numerics.casting import from_float32, to_float32
from mlx_flash.engine.storage.bundle_weights import VIEWS

SHAPES = [(bits, size) for bits in (4, 8) for size in (32, 64, 128)]
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=["numba", "plain"])
def kernel_set(request: pytest.FixtureRequest) -> Any:
    if request.param == "numba":
        pytest.importorskip("numba")
    return kernels.load(request.param == "numba")


def coded(values: np.ndarray, bits: int, size: int, dtype: str) -> AffineRows:
    codes, scales, biases = quantise(values, bits, size, dtype)
    return AffineRows(codes, scales.view(VIEWS[dtype]), biases.view(VIEWS[dtype]), bits)


def wide(rows: AffineRows) -> np.ndarray:
    out = np.empty(rows.shape, np.float32)
    rows.widen(out)
    return out


def weights(seed: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.05)


def records(rows: AffineRows) -> AffineRows:
    """The same rows, the three parts of each side by side and other bytes between."""
    fields = [rows.codes, rows.scales, rows.biases]
    widths = [field.shape[1] * field.itemsize for field in fields]
    memory = np.full((len(rows), 512 * (sum(widths) // 512 + 1)), 0xFF, np.uint8)
    found, at = [], 0
    for field, width in zip(fields, widths, strict=True):
        memory[:, at : at + width] = np.ascontiguousarray(field).view(np.uint8)
        found.append(memory[:, at : at + width].view(field.dtype))
        at += width
    return AffineRows(found[0], found[1], found[2], rows.bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size"), SHAPES)
def test_products_equal_those_of_the_numbers(kernel_set: Any, bits: int, size: int, dtype: str) -> None:
    rng = np.random.default_rng(bits * size)
    for groups in (1, 3, 4, 7):
        n = groups * size
        rows = records(coded(weights(groups, (41, n)), bits, size, dtype))
        numbers, x = wide(rows).astype(np.float64), rng.standard_normal(n).astype(np.float32)
        for values in (x, np.abs(x)):  # of one sign offsets do not cancel
            near(kernel_set.dots(rows, None, values), numbers @ values)
        chosen = rng.permutation(41)[:23]
        near(kernel_set.dots(rows, chosen, x), numbers[chosen] @ x)
        lead, follow = np.maximum(numbers[chosen] @ x, 0), numbers[chosen] @ x
        near(kernel_set.neurons(rows, rows, chosen, x, acts=("relu", "")), lead * follow)
        h, y = np.abs(rng.standard_normal(23)).astype(np.float32), np.zeros((SEGMENTS, n), np.float32)
        for _ in range(2):  # one after the other, added up
            kernel_set.add_blocks([rows], None, chosen, h, np.array([0, 6, 6, 23]), np.array([0, 2, 5]), y)
        near(kernel_set.total(y, rows), 2 * h @ numbers[chosen])


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("bits", "size"), SHAPES)
def test_groups_of_neurons_equal_the_numbers(kernel_set: Any, bits: int, size: int) -> None:
    rng, dim, bundles = np.random.default_rng(size), 2 * max(size, 64), 5

    def make(rows: int, items: int, turned: bool) -> AffineBundles:
        found = coded(weights(rows, (bundles * rows, items)), bits, size, "bfloat16")
        fields = [field.reshape(bundles, rows, -1) for field in (found.codes, found.scales, found.biases)]
        return AffineBundles(fields[0], fields[1], fields[2], bits, turned)

    gate, up, down = make(size, dim, False), make(size, dim, False), make(dim, size, True)
    x, chosen = rng.standard_normal(dim).astype(np.float32), np.array([4, 0, 3])
    numbers = [part[chosen].widen().astype(np.float64) for part in (gate, up, down)]
    wanted = np.maximum(numbers[0] @ x, 0) * (numbers[1] @ x)
    h = kernel_set.group_neurons(gate, up, chosen, x, acts=("relu", ""))
    near(h.reshape(-1), wanted)
    y = np.zeros((SEGMENTS, dim), np.float32)
    wanted = h.reshape(-1).astype(np.float64) @ numbers[2]
    kernel_set.add_groups([down], np.zeros(3, np.int64), chosen, h, np.array([0, 2, 3]), np.array([1, 6]), y)
    near(kernel_set.total(y, None), wanted)


def test_the_same_bits_at_every_thread_count_and_place(kernel_set: Any) -> None:
    rng, n = np.random.default_rng(0), 3 * 64
    rows = coded(weights(0, (600, n)), 4, 64, "bfloat16")
    x, h = rng.standard_normal(n).astype(np.float32), rng.standard_normal(600).astype(np.float32)
    edges, every, moved = np.array([0, 256, 512, 600]), np.arange(600), rng.permutation(600)
    segments, back, found = np.array([0, 2, 2]), np.argsort(moved), []
    for threads in (1, 2, 3):
        kernel_set.threads = threads
        for w, places in ((rows, every), (records(rows[moved]), back)):
            y = np.zeros((SEGMENTS, n), np.float32)
            kernel_set.add_blocks([w], None, places, h, edges, segments, y)
            found.append(np.concatenate([kernel_set.dots(w, places, x), kernel_set.total(y, w)]))
    kernel_set.threads = 1
    y = np.zeros((SEGMENTS, n), np.float32)
    for block, (begin, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):  # one by one, as they stream
        here = slice(begin, end)
        edge, segment = np.array([0, end - begin]), segments[block : block + 1]
        kernel_set.add_blocks([rows], None, every[here], h[here], edge, segment, y)
    found.append(np.concatenate([kernel_set.dots(rows, every, x), kernel_set.total(y, rows)]))
    y = np.zeros((SEGMENTS, n), np.float32)
    scalars = kernel_set.dense(rows, rows, rows, x, y, 256, segments, acts=("relu", ""))
    again = np.zeros((SEGMENTS, n), np.float32)
    fired = np.flatnonzero(scalars)
    starts = np.searchsorted(fired, [0, 256, 512, 600])
    kernel_set.add_blocks([rows], None, fired, scalars[fired], starts, segments, again)
    assert all(np.array_equal(each, found[0]) for each in found) and np.array_equal(y, again)


def test_bad_arguments_are_refused() -> None:
    pytest.importorskip("numba")
    numba = kernels.load(True)
    rows, x = coded(weights(0, (8, 64)), 4, 32, "float32"), np.zeros(64, np.float32)
    y = np.zeros((SEGMENTS, 64), np.float32)
    for call in (
        lambda: numba.dots(rows, None, x[:32]),
        lambda: numba.dots(rows, None, x.astype(np.float64)),
        lambda: numba.dots(AffineRows(rows.codes[:, ::2], rows.scales[:, ::2], rows.biases[:, ::2], 4), None, x[:32]),
        lambda: numba.neurons(rows, coded(weights(0, (8, 64)), 8, 32, "float32"), None, x),
        lambda: numba.add_blocks([rows], None, np.arange(8), x[:8], np.array([0, 8]), np.array([0]), y[:, :32].copy()),
    ):
        with pytest.raises(ValueError):
            call()
    for places in ([8], [-1]):
        with pytest.raises(IndexError):
            numba.dots(rows, np.array(places), x)
        with pytest.raises(IndexError):
            numba.add_blocks([rows], None, np.array(places), x[:1], np.array([0, 1]), np.array([0]), y)


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-9, 0.02, 1.0, 300.0]),
    st.sampled_from([0.0, 1.0, -1.0]),
)
def test_the_quantiser_is_mlx_s_bit_for_bit(
    shape: tuple[int, int], dtype: str, seed: int, spread: float, middle: float
) -> None:
    mx = pytest.importorskip("mlx.core")
    bits, size = shape
    values = np.random.default_rng(seed).standard_normal((4, 2 * size)).astype(np.float32)
    values[0] = np.abs(values[0])
    values[1, : size // 2] = 0
    raw = from_float32(values * np.float32(spread) + np.float32(middle), dtype)
    kind = getattr(mx, dtype)
    given_values = mx.array(raw).view(kind)
    wanted = mx.quantize(given_values, size, bits)
    found = quantise(to_float32(raw, dtype), bits, size, dtype)
    for mine, theirs in zip(found, wanted, strict=True):
        items = theirs if theirs.dtype == mx.uint32 else theirs.view(mx.uint32 if dtype == "float32" else mx.uint16)
        assert np.array_equal(mine, np.array(items))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size"), [(4, 64), (8, 32)])
def test_a_pass_multiplies_as_mlx_does(bits: int, size: int, dtype: str) -> None:
    """The scalars of a pass over quantised bundles are `mx.quantized_matmul`'s, bit for bit."""
    mx = pytest.importorskip("mlx.core")
    import mlx.nn as nn

    from mlx_flash.engine.backends.base import FFNSpec
    from mlx_flash.engine.backends.mlx.backend import MlxBackend
    from mlx_flash.engine.storage.bundle import Layout, Part, Quantisation, quantised

    dim, count = 128, 300
    layout = quantised(
        Layout(tuple(Part(name, dtype, dim) for name in ("gate", "up", "down")), count), Quantisation(bits, size)
    )
    backend, names = MlxBackend(), [part.name for part in layout.parts]
    slab, held = backend.slab(layout, count, names), {}
    for index, matrix in enumerate(layout.matrices):
        rows = coded(weights(index, (count, dim)), bits, size, dtype)
        held[matrix] = rows
        fields = (rows.codes, rows.scales, rows.biases)
        for name, field in zip(layout.parts_of(matrix), fields, strict=True):
            target = next(t for t in slab.targets if t.offset == layout.offset(name))
            target.rows[...] = np.ascontiguousarray(field).view(np.uint8)
    for tokens in (1, 5):
        x = mx.random.normal((1, tokens, dim), key=mx.random.key(tokens)).astype(getattr(mx, dtype))
        product = {
            name: mx.quantized_matmul(x, *(slab.parts[part] for part in layout.parts_of(name)), True, size, bits)
            for name in ("gate", "up")
        }
        wanted = nn.silu(product["gate"]) * product["up"]
        work, h = backend.ffn(FFNSpec(layout, "silu", True), x), np.empty((tokens, count), np.float32)
        work.dense(slab, 0, 0, count, h)
        assert np.array_equal(h, np.array(wanted[0].astype(mx.float32)))
        found = np.array(work.result()[0].astype(mx.float32))
        exact = h.astype(np.float64) @ wide(held["down"]).astype(np.float64)
        step = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}[dtype]
        assert np.abs(found - exact).max() <= step * np.abs(exact).max()
