"""The kernels against float64, and their promise: the order of a sum depends on nothing but the ids."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.backends.base import BLOCK, SEGMENTS
from mlx_flash.engine.backends.numpy.kernels import base as kernels
from mlx_flash.engine.backends.numpy.kernels import thread_pool

DTYPES = ("float32", "float16", "bfloat16")
SETS = {"plain": kernels.load(False)}
with suppress(ImportError):
    SETS["numba"] = kernels.load(True)
both_sets = pytest.mark.parametrize("name", SETS)
needs_numba = pytest.mark.skipif("numba" not in SETS, reason="numba is not installed")
quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest work be shared among threads."""
    monkeypatch.setattr(thread_pool, "TASK_BYTES", 64)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    out = np.empty(values.shape, np.uint16 if dtype == "bfloat16" else dtype)
    kernels.narrow(values.astype(np.float32), out)
    return out


def wide(w: np.ndarray) -> np.ndarray:
    out = np.empty(w.shape, np.float32)
    kernels.widen(w, out)
    return out


def within_record(w: np.ndarray, before: int, after: int) -> np.ndarray:
    """The same weights as a part of records: rows further apart, at another alignment."""
    count, n = w.shape
    record = np.full((count, before + n + after), 7, w.dtype)
    record[:, before : before + n] = w
    return record[:, before : before + n]


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@both_sets
@quick
@given(seed=seeds, count=st.integers(1, 300), n=st.integers(1, 150), dtype=st.sampled_from(DTYPES))
def test_dots_are_the_products_in_float64_and_a_rows_bits_do_not_depend_on_its_company(
    name: str, seed: int, count: int, n: int, dtype: str
) -> None:
    rng, kernel = np.random.default_rng(seed), SETS[name]
    w, x = stored(random(rng, count, n), dtype), random(rng, n)
    got = kernel.dots(w, None, x)
    scale = np.abs(wide(w)).astype(np.float64) @ np.abs(x)
    assert np.all(np.abs(got - wide(w).astype(np.float64) @ x) <= 1e-6 * scale)
    rows = rng.integers(0, count, rng.integers(0, count + 1))
    assert kernel.dots(w, rows, x).tobytes() == got[rows].tobytes()
    apart = within_record(w, int(rng.integers(0, 9)), int(rng.integers(0, 9)))
    assert kernel.dots(apart, None, x).tobytes() == got.tobytes()
    for row in rows[:3]:
        assert kernel.dots(apart[row : row + 1], None, x).tobytes() == got[row].tobytes()


def blocks_of(ids: np.ndarray, count: int, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Where each block of ascending ids begins and the last one ends; the segments of a layer of `count` neurons."""
    blocks = -(-count // block)
    starts = np.searchsorted(ids, np.arange(blocks) * block)
    return np.append(starts, len(ids)), np.arange(blocks) * SEGMENTS // blocks


def zeros(d: int) -> np.ndarray:
    return np.zeros((SEGMENTS, d), np.float32)


@both_sets
@quick
@given(seed=seeds, count=st.integers(1, 700), d=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_a_sum_over_blocks_has_the_same_bits_wherever_the_rows_lie(
    name: str, seed: int, count: int, d: int, dtype: str
) -> None:
    rng, kernel = np.random.default_rng(seed), SETS[name]
    w, h = stored(random(rng, count, d), dtype), random(rng, count)
    h[rng.random(count) < 0.3] = 0
    ids, one = np.arange(count), np.zeros(count, np.int64)
    start = np.abs(random(rng, SEGMENTS, d))
    y = start.copy()
    starts, segments = blocks_of(ids, count)
    kernel.add_blocks([w], one, ids, h, starts, segments, y)
    exact = start.sum(axis=0, dtype=np.float64) + wide(w).astype(np.float64).T @ h
    size = start.sum(axis=0) + np.abs(wide(w)).astype(np.float64).T @ np.abs(h)
    assert np.all(np.abs(kernel.total(y, w) - exact) <= 2e-6 * size)

    # Without the zeros, the rows shuffled over two slabs, in as many calls as there are blocks.
    kept = np.flatnonzero(h)
    place, split = rng.permutation(count), int(rng.integers(0, count + 1))
    shuffled = np.empty_like(w)
    shuffled[place] = w
    sources = [within_record(shuffled[:split], 1, 2), within_record(shuffled[split:], 3, 0)]
    again = start.copy()
    for block in range(-(-count // BLOCK)):
        mine = kept[kept // BLOCK == block]
        rows, second = place[mine], (place[mine] >= split).astype(np.int64)
        edges, segment = np.array([0, len(mine)]), segments[block : block + 1]
        kernel.add_blocks(sources, second, rows - second * split, h[mine], edges, segment, again)
    assert again.tobytes() == y.tobytes()


def both_sums(kernel: kernels.Kernels, dtype: str, seed: int = 5) -> list[np.ndarray]:
    rng, d = np.random.default_rng(seed), 1000  # wide enough to be cut into columns too, at odd places
    w, x = stored(random(rng, 1000, d), dtype), random(rng, d)
    h, y, ids = kernel.dots(w, None, x), zeros(d), np.arange(1000)
    kernel.add_blocks([w], np.zeros(1000, np.int64), ids, h, *blocks_of(ids, 1000), y)
    return [h, kernel.total(y, w)]


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_threads_gives_the_same_bits(dtype: str) -> None:
    kernel, results = kernels.load(True), []
    for count in (1, 2, 5):
        kernel.threads = count
        results.append([array.tobytes() for array in both_sums(kernel, dtype)])
        assert kernel.threads == count
    assert results[0] == results[1] == results[2]


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
def test_numba_and_plain_agree(dtype: str) -> None:
    for one, other in zip(*(both_sums(kernel, dtype) for kernel in SETS.values()), strict=True):
        assert np.max(np.abs(one - other)) <= 1e-5 * np.max(np.abs(one))


@needs_numba
def test_calls_from_two_python_threads_do_not_disturb_each_other() -> None:
    kernel = kernels.load(True)
    kernel.threads = 3
    expected = {seed: [array.tobytes() for array in both_sums(kernel, "bfloat16", seed)] for seed in (1, 2)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(15):
            if [array.tobytes() for array in both_sums(kernel, "bfloat16", seed)] != expected[seed]:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@both_sets
def test_a_low_rank_product_is_that_of_its_factors(name: str) -> None:
    rng, kernel = np.random.default_rng(8), SETS[name]
    for dtype in (np.int8, np.float32):
        a, b = (rng.integers(-127, 128, shape).astype(dtype) for shape in ((24, 3000), (501, 24)))
        x, bias = random(rng, 3000), random(rng, 501)
        predict, exact = kernel.low_rank(a, b, 1e-3, bias), 1e-3 * (b.astype(np.float64) @ (a @ x.astype(np.float64)))
        results = set()
        for threads in (1, 2, 5):
            kernel.threads = threads
            results.add(predict(x)().tobytes())
            np.testing.assert_allclose(predict(x)(), exact + bias, rtol=1e-5, atol=1e-4 * np.abs(exact).max())
        assert len(results) == 1
    assert np.array_equal(kernel.low_rank(a[:0], b[:, :0], 1e-3, bias)(x)(), bias)


@needs_numba
def test_low_rank_factors_that_do_not_fit_are_refused() -> None:
    a, b = np.ones((24, 30), np.float32), np.ones((501, 23), np.float32)
    with pytest.raises(ValueError, match=r"\(501, 23\)"):
        SETS["numba"].low_rank(a, b, 1.0, np.zeros(501, np.float32))


@both_sets
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_blocks_that_wait_for_nothing_are_summed_at_once(name: str, dtype: str, gated: bool) -> None:
    """Some terms begun with their sums, the others later: the bits of all at once."""
    kernel, rng, (count, d) = SETS[name], np.random.default_rng(9), (1100, 70)
    records = stored(rng.normal(size=(count, 3 * d)) / 8, dtype)
    first, second, down = records[:, :d], records[:, d : 2 * d] if gated else None, records[:, 2 * d :]
    x, options = random(rng, d), {"acts": ("relu", ""), "cutoff": 0.05}
    for threads in (1, 2, 5):
        kernel.threads = threads
        ids = np.flatnonzero(rng.random(count) < 0.3)
        y, z, late = zeros(d), zeros(d), (ids // BLOCK == 1) | (ids // BLOCK == 3)
        h = kernel.neurons(first, second, ids, x, **options)
        begins, segments = blocks_of(ids, count)
        kernel.add_blocks([down], None, ids, h, begins, segments, y)
        spans = np.stack([begins[:-1], begins[1:]], 1)
        spans[[1, 3], 1] = spans[[1, 3], 0]
        sums = np.full((5, d), np.nan, np.float32)
        early = kernels.EarlySums(down, spans, sums)
        finish = kernel.begin_neurons(first, second, ids, x, **options, early=early)
        assert finish().tobytes() == h.tobytes()
        starts, which = np.array([0, (ids[late] // BLOCK == 1).sum(), late.sum()]), np.array([1, 3])
        kernel.add_blocks([down], None, ids[late], h[late], starts, segments, z, (sums, which))
        assert z.tobytes() == y.tobytes()
    kernel.add_blocks([down], None, ids[:0], h[:0], np.array([0]), segments, z := zeros(d), (sums, which[:0]))
    assert z.tobytes() == y.tobytes()


@needs_numba
def test_numba_set_refuses_what_compiled_code_would_take_on_trust() -> None:
    kernel, x = SETS["numba"], np.ones(8, np.float32)
    w = np.ones((4, 8), np.float32)
    for rows in ([4], [-1]):
        with pytest.raises(IndexError, match="of 4"):
            kernel.dots(w, np.array(rows), x)
        with pytest.raises(IndexError, match=r"of \[4\]"):
            kernel.add_blocks([w], np.array([0]), np.array(rows), x[:1], np.array([0, 1]), np.array([0]), zeros(8))
    for segments in ([SEGMENTS], [-1], [0, 1]):
        with pytest.raises(ValueError, match="there are 8"):
            kernel.add_blocks([w], None, np.array([0]), x[:1], np.array([0, 1]), np.array(segments), zeros(8))
    for y in (zeros(8)[:7], zeros(8).astype(np.float64), zeros(16)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous fp32"):
            kernel.add_blocks([w], None, np.array([0]), x[:1], np.array([0, 1]), np.array([0]), y)
    for bad in (w.astype(np.float64), np.ones((8, 4), np.float32).T):
        with pytest.raises(ValueError, match="contiguous"):
            kernel.dots(bad, None, x)
    for vector in (x[:7], x.astype(np.float64), np.ones(16, np.float32)[::2]):
        with pytest.raises(ValueError, match="8 items"):
            kernel.dots(w, None, vector)


@needs_numba
def test_importing_compiles_nothing_and_an_unwritable_cache_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_flash.engine.backends.numpy.kernels import thread_pool_loops

    real = thread_pool_loops.numba.njit

    def no_locator(cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(thread_pool_loops.numba, "njit", no_locator)
    compiled = thread_pool_loops.jit(lambda x: x + 1)
    assert compiled.signatures == []
    assert compiled(2) == 3


@needs_numba
@pytest.mark.parametrize("hardware", [None, False])
def test_every_half_is_decoded_exactly(hardware: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    from mlx_flash.engine.backends.numpy.kernels import vector_code

    if hardware is not None:  # compile as for a processor that cannot convert
        monkeypatch.setattr(vector_code, "HALF_IN_HARDWARE", hardware)
    dot, store = vector_code.dot, vector_code.store

    @numba.njit
    def products(w, n, x, out):  # type: ignore[no-untyped-def]
        for i in range(len(out)):
            out[i] = dot(vector_code.FLOAT16, w + 2 * n * i, w + 2 * n * i, x, n)

    @numba.njit
    def store_all(values, address):  # type: ignore[no-untyped-def]
        for i in range(len(values)):
            store(vector_code.FLOAT16, address, i, values[i])

    def dots(w: np.ndarray, x: np.ndarray) -> np.ndarray:
        out = np.empty(len(w), np.float32)
        products(w.ctypes.data, w.shape[1], x.ctypes.data, out)
        return out

    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 1)
    one = np.ones(1, np.float32)
    assert np.array_equal(dots(every, one)[:, None], every.astype(np.float32), equal_nan=True)
    lanes = every[np.isfinite(every)].reshape(-1, 16)
    for lane in range(16):
        x = np.eye(16, dtype=np.float32)[lane]
        assert np.array_equal(dots(lanes, x), lanes[:, lane].astype(np.float32))
    # Back again, also what lies half way between two of them and a hair to either side.
    exact = np.sort(lanes.ravel().astype(np.float32))
    between = (exact[1:] / 2 + exact[:-1] / 2).astype(np.float32)
    values = np.concatenate([exact, between, np.nextafter(between, -1e9), np.nextafter(between, 1e9), [7e4, np.inf]])
    values = values.astype(np.float32)
    got = np.empty(values.shape, np.float16)
    store_all(values, got.ctypes.data)
    with np.errstate(over="ignore"):
        assert np.array_equal(got, values.astype(np.float16))


def test_widening_is_exact_and_narrowing_rounds_to_nearest_even() -> None:
    every = np.arange(65536, dtype=np.uint16)
    got, narrowed = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    kernels.widen(every, got)
    assert np.array_equal(got.view(np.uint32), every.astype(np.uint32) << 16)
    kernels.narrow(got, narrowed)
    nan = np.isnan(got)
    assert np.array_equal(narrowed[~nan], every[~nan]) and np.all(np.isnan(wide(narrowed[nan])))
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001], np.uint32)
    kernels.narrow(ties.view(np.float32), narrowed[:6])
    assert [hex(bits) for bits in narrowed[:6]] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0x7f80", "0x7fc0"]
    half = np.empty(3, np.float16)
    kernels.narrow(np.array([1 + 2**-11, 1 + 3 * 2**-11, 1e6], np.float32), half)
    assert half.tolist() == [1.0, 1 + 2**-9, np.inf]


@both_sets
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_neurons_and_dense_are_the_same_terms(name: str, dtype: str, gated: bool, act: str) -> None:
    """Gathered, in place, and in one pass over records: the same bits; and the right ones."""
    kernel, rng, (count, d) = SETS[name], np.random.default_rng(5), (1100, 70)
    records = stored(rng.normal(size=(count, 3 * d)) / 8, dtype)
    first, second, down = records[:, :d], records[:, d : 2 * d] if gated else None, records[:, 2 * d :]
    x, bias = rng.normal(size=d).astype(np.float32), (rng.normal(size=count) / 4).astype(np.float32)
    kernel.threads, options = 2, {"bias": bias, "acts": (act, ""), "cutoff": 0.05}
    h = kernel.neurons(first, second, None, x, **options)
    lead = wide(first) @ x.astype(np.float64) + bias
    lead = np.maximum(lead, 0) if act == "relu" else lead / (1 + np.exp(-lead))
    sure = np.abs(np.abs(lead) - 0.05) > 1e-3
    wanted = np.where(np.abs(lead) <= 0.05, 0, lead) * (1 if second is None else wide(second) @ x.astype(np.float64))
    np.testing.assert_allclose(h[sure], wanted[sure], rtol=1e-4, atol=1e-4)
    rows = rng.permutation(count)[:301]
    picked = kernel.neurons(first, second, rows, x, **{**options, "bias": bias[rows]})
    assert picked.tobytes() == h[rows].tobytes()
    given = kernel.neurons(first, None, None, x, **options)
    again = kernel.neurons(None, second, rows, x, given=given[rows], acts=(act, ""))
    assert again.tobytes() == h[rows].tobytes()
    for block in (256, 64):  # two numbers of tasks: by records, and in two steps
        y, z, kept = zeros(d), zeros(d), np.flatnonzero(h)
        starts, segments = blocks_of(kept, count, block)
        assert kernel.dense(first, second, down, x, y, block, segments, **options).tobytes() == h.tobytes()
        kernel.add_blocks([down], None, kept, h[kept], starts, segments, z)
        assert y.tobytes() == z.tobytes()


@both_sets
def test_norms(name: str) -> None:
    kernel, rng = SETS[name], np.random.default_rng(6)
    x, weight = rng.normal(size=(3, 50)).astype(np.float32), rng.normal(size=50).astype(np.float32)
    wanted = x / np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(kernel.norm(x, weight, 1e-5), wanted, rtol=1e-5)
