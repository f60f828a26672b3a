"""The numpy backend: slabs that a reader fills, FFNs whose bits the budget cannot change, a decoder's arithmetic."""

from __future__ import annotations

import mmap
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.backends.base import BLOCK, FFNSpec, Widths
from mlx_flash.engine.backends.numpy import backend as module
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.engine.backends.numpy.slab import NumpySlab
from mlx_flash.engine.storage.bundle import Layout, Part

DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = {"plain": NumpyBackend(numba=False), "default": NumpyBackend()}
both = pytest.mark.parametrize("name", BACKENDS)
quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    out = np.empty(values.shape, module.DTYPES[dtype])
    module.kernels.narrow(values.astype(np.float32), out)
    return out


def wide(w: np.ndarray) -> np.ndarray:
    return BACKENDS["plain"].to_float32(w).astype(np.float64)


class Network:
    """An FFN's bundles, and slabs filled with them as a reader would."""

    def __init__(
        self,
        seed: int,
        d: int,
        count: int,
        dtype: str,
        activation: str = "relu",
        gated: bool = True,
        biased: bool | None = None,
    ):
        self.rng, self.d, self.count = np.random.default_rng(seed), d, count
        names = ("gate", "up", "down") if gated else ("up", "down")
        layout = Layout(tuple(Part(name, dtype, d) for name in names), count)
        biases: dict[str, Any] = {}
        if biased or (biased is None and not gated):
            sizes = {"up_bias": count, "down_bias": d} | ({"gate_bias": count} if gated else {})
            biases = {name: stored(random(self.rng, size), dtype) for name, size in sizes.items()}
        self.spec = FFNSpec(layout, activation, gated, **biases)
        self.weights = {name: stored(random(self.rng, count, d), dtype) for name in names}
        self.records = np.zeros((count, layout.stride), np.uint8)
        for name in names:
            at, part = layout.offset(name), layout.part(name)
            self.records[:, at : at + part.nbytes] = self.weights[name].view(np.uint8).reshape(count, -1)

    def slab(self, rows: int, parts: tuple[str, ...] | None = None) -> NumpySlab:
        return BACKENDS["plain"].slab(self.spec.layout, rows, parts or tuple(self.weights))

    def load(self, slab: NumpySlab, ids: np.ndarray, rows: np.ndarray) -> NumpySlab:
        for target in slab.targets:
            target.rows[rows] = self.records[ids, target.offset : target.offset + target.rows.shape[1]]
        return slab

    def full(self) -> NumpySlab:
        return self.load(self.slab(self.count), np.arange(self.count), np.arange(self.count))

    def dense(self, backend: NumpyBackend, x: np.ndarray, cut: int = 0) -> np.ndarray:
        """Ids below `cut` from one slab, the others from another one, at rows 3 and on."""
        step = backend.ffn(self.spec, x)
        if cut:
            low = np.arange(cut)
            step.dense(self.load(self.slab(cut), low, low), 0, 0, cut)
        if cut < self.count:
            high = np.arange(cut, self.count)
            slab = self.load(self.slab(len(high) + 3), high, high - cut + 3)
            step.dense(slab, 3, cut, len(high))
        return step.result()

    def gate(self, backend: NumpyBackend, x: np.ndarray, per_down: int) -> np.ndarray:
        """The selected ids shuffled over two slabs of what is not the first part, `per_down` blocks to a sum. What was
        not selected is NaN: it must not be touched."""
        first, *rest = self.weights
        everything = np.arange(self.count)
        step = backend.ffn(self.spec, x)
        ids = step.gate(self.load(self.slab(self.count, (first,)), everything, everything))
        assert ids.dtype == np.int32
        for block in range(0, -(-self.count // BLOCK), per_down):
            mine = self.rng.permutation(ids[(ids // BLOCK >= block) & (ids // BLOCK < block + per_down)])
            split, slabs = int(self.rng.integers(0, len(mine) + 1)), []
            for part in (mine[:split], mine[split:]):
                slab = self.slab(len(part) + 5, tuple(rest))
                slab.targets[0].rows[...] = 0xFF
                rows = self.rng.permutation(len(part) + 5)[: len(part)]
                step.scalars(part, self.load(slab, part, rows), rows)
                slabs.append(slab)
            # What an earlier use left in the scratch must not be used either.
            for scratch in (backend.tiles.scratch, *backend.tiles._others):
                for flat in scratch._flat.values():
                    if flat is not scratch._flat.get("active"):
                        flat[...] = np.nan
            step.down()
            for slab in slabs:
                slab.targets[0].rows[...] = 0xFF  # `down` has returned: the rows are free
        step.settle()
        return step.result()

    def exact(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The output in float64, and the sum of its terms' sizes."""
        w, act = {name: wide(rows) for name, rows in self.weights.items()}, x.astype(np.float64)
        biases = {name: wide(found) for name in w if (found := self.spec.biases.get(name)) is not None}
        lead = "gate" if self.spec.gated else "up"
        first = act @ w[lead].T + biases.get(lead, 0)
        with np.errstate(over="ignore"):
            h = np.maximum(first, 0) if self.spec.activation == "relu" else first / (1 + np.exp(-first))
        if self.spec.gated:
            h = h * (act @ w["up"].T + biases.get("up", 0))
        y = h @ w["down"]
        if self.spec.down_bias is not None:
            y = y + wide(self.spec.down_bias)
        return y, np.abs(h) @ np.abs(w["down"]) + 1


networks = st.builds(
    Network,
    seed=seeds,
    d=st.integers(1, 60),
    count=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(["relu", "silu"]),
    gated=st.booleans(),
    biased=st.booleans(),
)


@both
@quick
@given(network=networks, tokens=st.sampled_from([1, 1, 2, 7]), per_down=st.integers(1, 3), data=st.data())
def test_an_ffn_has_the_same_bits_at_every_split_and_by_gate_or_dense(
    name: str, network: Network, tokens: int, per_down: int, data: st.DataObject
) -> None:
    backend, x = BACKENDS[name], random(network.rng, tokens, network.d)
    dense = network.dense(backend, x)
    exact, size = network.exact(x)
    assert dense.dtype == np.float32 and dense.shape == x.shape
    assert np.all(np.abs(dense - exact) <= 1e-5 * size)
    cut = data.draw(st.sampled_from([*range(0, network.count, BLOCK), network.count]))
    assert network.dense(backend, x, cut).tobytes() == dense.tobytes()
    gated = network.gate(backend, x, per_down)
    if tokens == 1:
        assert gated.tobytes() == dense.tobytes()
    assert np.array_equal(gated, dense)  # BLAS may turn a zero's sign where a row is zero


@both
@quick
@given(
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    share=st.sampled_from([0.01, 0.3, 1.0]),
    most_late=st.sampled_from([0, 1, 4, 400]),
)
def test_ids_that_come_late_change_no_bits(
    name: str, seed: int, dtype: str, gated: bool, share: float, most_late: int
) -> None:
    """With few of them most blocks are summed up before they are there, with many none is."""
    backend, network = BACKENDS[name], Network(seed, 40, 1300, dtype, gated=gated, biased=bool(seed % 2))
    rng, slab, x = network.rng, network.full(), random(network.rng, 1, 40)
    ids = np.flatnonzero(rng.random(1300) < share)
    late = np.zeros(len(ids), bool)
    late[rng.permutation(len(ids))[:most_late]] = True

    def result(*parts: np.ndarray) -> bytes:
        work, ends = backend.ffn(network.spec, x), np.concatenate([ids[part] for part in parts[1:]] or [ids[:0]])
        for k, part in enumerate(parts):
            if part.any():
                work.scalars(ids[part], slab, ids[part], np.sort(ends) if k == 0 else None)
        work.down()
        y: bytes = work.result().tobytes()
        return y

    assert result(~late, late) == result(np.ones(len(ids), bool)) == result(late, ~late)


def test_gate_names_the_ids_that_are_active_for_any_token() -> None:
    network = Network(3, 20, 300, "float32")
    first = wide(network.weights["gate"])
    for tokens in (1, 4):
        x = random(network.rng, tokens, 20)
        ids = BACKENDS["default"].ffn(network.spec, x).gate(network.full())
        assert ids.tolist() == np.flatnonzero((x @ first.T > 0).any(axis=0)).tolist()


def test_numba_and_plain_agree_on_an_ffn() -> None:
    network = Network(4, 100, 600, "bfloat16", "silu")
    x = random(network.rng, 1, 100)
    one, other = (network.dense(backend, x) for backend in BACKENDS.values())
    assert np.max(np.abs(one - other)) <= 1e-5 * np.max(np.abs(one))


@pytest.mark.parametrize("tokens", [1, 3])
def test_bad_calls_are_refused(tokens: int) -> None:
    network = Network(5, 8, 600, "float32")
    x, slab = np.ones((tokens, 8), np.float32), network.full()
    for first_id, count in ((1, 255), (0, 100), (512, 256)):
        with pytest.raises(ValueError, match="whole blocks of 256"):
            BACKENDS["plain"].ffn(network.spec, x).dense(slab, 0, first_id, count)
    with pytest.raises(ValueError, match="gelu"):
        BACKENDS["plain"].ffn(replace(network.spec, activation="gelu"), x).dense(slab, 0, 0, 600)


def test_a_slab_of_whole_bundles_is_records_as_they_lie_in_the_file() -> None:
    layout = Layout(tuple(Part(name, "bfloat16", 100) for name in ("gate", "up", "down")), 50)
    slab = NumpySlab(layout, 9, ("gate", "up", "down"))
    (target,) = slab.targets
    assert (target.offset, target.rows.shape, target.rows.strides) == (0, (9, 1024), (1024, 1))
    assert target.rows.ctypes.data % mmap.PAGESIZE == 0 and not target.rows.any()
    assert slab.nbytes == 3 * 4096 == BACKENDS["plain"].slab_bytes(layout, 9, ("gate", "up", "down"))
    target.rows[2, 200:204] = (1, 2, 3, 4)
    assert slab.matrices["up"].shape == (9, 100) and slab.matrices["up"][2, :2].tolist() == [0x201, 0x403]


def test_a_slab_of_some_parts_has_rows_of_their_bytes_alone() -> None:
    layout = Layout(tuple(Part(name, "float32", 100) for name in ("gate", "up", "down")), 50)
    slab = NumpySlab(layout, 3, ("up", "down"))
    (target,) = slab.targets
    assert (target.offset, target.rows.shape, target.rows.strides) == (400, (3, 800), (1024, 1))
    target.rows[1, 400:404] = np.array([1.5], np.float32).view(np.uint8)
    assert slab.matrices["down"][1, 0] == 1.5 and slab.matrices["up"][1].sum() == 0
    assert slab.nbytes == BACKENDS["plain"].slab_bytes(layout, 3, ("up", "down")) == 4096
    for parts in ((), ("gate", "down"), ("up", "gate"), ("other",)):
        with pytest.raises(ValueError, match="gate"):
            NumpySlab(layout, 1, parts)


@pytest.mark.parametrize("parts", [("gate", "up", "down"), ("gate",), ("up", "down")])
def test_a_slab_without_rows_takes_nothing(parts: tuple[str, ...]) -> None:
    network = Network(1, 10, 20, "bfloat16")
    slab = network.slab(0, parts)
    assert slab.nbytes == 0 == BACKENDS["plain"].slab_bytes(network.spec.layout, 0, parts)
    assert len(slab.targets[0].rows) == 0 and all(slab.matrices[name].shape == (0, 10) for name in parts)
    none = np.empty(0, np.int32)
    network.load(slab, none, none)
    for tokens in (1, 2) if parts[-1] == "down" else ():
        step = BACKENDS["default"].ffn(network.spec, -np.ones((tokens, 10), np.float32))
        step.gate(network.full())
        step.scalars(none, slab, none)
        step.down()
        step.down()
        assert not step.result().any()


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_linear(name: str, dtype: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ROWS", 7)
    rng = np.random.default_rng(7)
    x, w, bias = random(rng, tokens, 50), stored(random(rng, 23, 50), dtype), stored(random(rng, 23), dtype)
    raw = np.ascontiguousarray(w).view(np.uint8).reshape(-1)
    w = BACKENDS[name].from_bytes(raw, dtype, (23, 50))
    assert np.shares_memory(w, raw)
    for b in (None, bias):
        expected = x @ wide(w).T + (0 if b is None else wide(b))
        np.testing.assert_allclose(BACKENDS[name].linear(x, w, b), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_rope_and_embedding(dtype: str) -> None:
    backend, rng = BACKENDS["default"], np.random.default_rng(8)
    x, weight, bias = random(rng, 3, 4, 10), stored(random(rng, 10), dtype), stored(random(rng, 10), dtype)
    rms = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 0.1) * wide(weight)
    np.testing.assert_allclose(backend.rms_norm(x, weight, 0.1), rms, rtol=1e-5, atol=1e-6)
    centred = x - x.mean(-1, keepdims=True, dtype=np.float64)
    layer = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 0.1) * wide(weight) + wide(bias)
    np.testing.assert_allclose(backend.layer_norm(x, weight, bias, 0.1), layer, rtol=1e-5, atol=1e-6)
    angle = rng.uniform(0, 6, (3, 1, 5))
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angle)
    rope = backend.rope(x, np.cos(angle[:, 0]).astype(np.float32), np.sin(angle[:, 0]).astype(np.float32))
    np.testing.assert_allclose(rope, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-6)
    table = stored(random(rng, 9, 10), dtype)
    got = backend.embed(table, np.array([8, 0, 8]))
    assert got.dtype == np.float32 and np.array_equal(got, wide(table)[[8, 0, 8]])
    for out in (rope, backend.rms_norm(x, weight, 0.1), backend.layer_norm(x, weight, bias, 0.1)):
        assert out.dtype == np.float32


@both
@quick
@given(
    seed=seeds,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.integers(1, 20),
    start=st.integers(0, 6),
    tokens=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_over_what_was_stored_is_the_naive_one(
    name: str, seed: int, kv_heads: int, group: int, size: int, start: int, tokens: int, dtype: str
) -> None:
    backend, rng = BACKENDS[name], np.random.default_rng(seed)
    keys, values = (backend.new_cache(kv_heads, 16, size, dtype) for _ in range(2))
    fed = [random(rng, start + tokens, kv_heads, size) for _ in range(2)]
    for cache, new in zip((keys, values), fed, strict=True):
        assert cache.shape == (kv_heads, 16, size) and cache.dtype == module.DTYPES[dtype]
        backend.store(cache, 0, new[:start])
        backend.store(cache, start, new[start:])
        assert np.array_equal(cache[:, : start + tokens], stored(new.transpose(1, 0, 2), dtype))
        cache[:, start + tokens :] = stored(np.float32([np.nan]), dtype)[0]  # the future
    q = random(rng, tokens, kv_heads * group, size)
    got = backend.attend(q, keys, values, start)
    assert got.dtype == np.float32 and got.shape == q.shape
    for t in range(tokens):
        for head in range(kv_heads * group):
            seen = slice(0, start + t + 1)
            scores = wide(keys[head // group, seen]) @ q[t, head] / np.sqrt(size)
            p = np.exp(scores - scores.max())
            np.testing.assert_allclose(got[t, head], p @ wide(values[head // group, seen]) / p.sum(), rtol=0, atol=1e-5)


def prefill(backend: NumpyBackend, widths: Widths, tokens: int, context: int, dtype: str) -> None:
    """One layer as a decoder runs it, at the end of the context; weights and cache come ready made."""
    d, hd = widths.dim, widths.head_dim
    heads = widths.qkv_rows // 3 // hd
    qkv, o = (np.zeros((rows, d), module.DTYPES[dtype]) for rows in (3 * heads * hd, d))
    cache = [backend.new_cache(heads, context, hd, dtype) for _ in range(2)]
    network = Network(1, d, widths.intermediate, dtype)
    slab = network.full()
    table, cos = stored(random(network.rng, 10, d), dtype), np.ones((tokens, hd // 2), np.float32)
    tracemalloc.start()
    x = backend.embed(table, np.arange(tokens) % 10)
    h = backend.rms_norm(x, table[0], 1e-6)
    q, k, v = (part.reshape(tokens, heads, hd) for part in np.split(backend.linear(h, qkv), 3, axis=-1))
    q, k = backend.rms_norm(q, table[0, :hd], 1e-6), backend.rms_norm(k, table[0, :hd], 1e-6)
    q, k = backend.rope(q, cos, cos), backend.rope(k, cos, cos)
    for where, new in zip(cache, (k, v), strict=True):
        backend.store(where, context - tokens, new)
    y = backend.attend(q, cache[0], cache[1], context - tokens)
    x = x + backend.linear(y.reshape(tokens, -1), o[:, : heads * hd])
    h = backend.rms_norm(x, table[0], 1e-6)
    step = backend.ffn(network.spec, h)
    step.dense(slab, 0, 0, network.count)
    x = x + step.result()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("widths", "tokens", "context"),
    [
        (Widths(512, 600, 1536, 64, 8), 200, 200),
        (Widths(128, 2000, 384, 32, 4), 100, 1500),
        (Widths(64, 64, 192, 32, 2), 16, 8000),
        (Widths(64, 9000, 192, 32, 2), 100, 100),
    ],
)
def test_prefill_stays_within_the_scratch_that_the_budget_was_told(
    dtype: str, widths: Widths, tokens: int, context: int
) -> None:
    backend = NumpyBackend()
    backend.threads = 2
    layout = Network(1, widths.dim, widths.intermediate, dtype).spec.layout
    stated = backend.prefill_scratch_bytes(layout, widths, tokens, context)
    try:
        prefill(backend, Widths(64, 64, 192, 32, 2), 2, 100, dtype)  # compiles
        tracemalloc.stop()
        prefill(backend, widths, tokens, context, dtype)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= stated <= 6 * peak + (4 << 20)
    assert stated <= backend.prefill_scratch_bytes(layout, widths, 10 * tokens, 10 * context)


def test_threads_are_the_kernels() -> None:
    backend = NumpyBackend()
    backend.threads = 1
    assert backend.threads == backend.kernels.threads == 1
