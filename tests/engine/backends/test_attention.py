"""Decoding attention in one call: against float64, step by step; the same bits at every number of threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.backends.decoder_base import Activations, Attention
from mlx_flash.engine.backends.numpy.kernels import base as kernels
from mlx_flash.engine.backends.numpy.kernels import thread_pool
from mlx_flash.engine.backends.numpy.kernels.base import widen
from mlx_flash.engine.numerics.affine import AffineRows, quantise
from mlx_flash.engine.storage.bundle_weights import VIEWS
from tests.engine.backends.test_kernels import DTYPES, random, stored, wide

pytest.importorskip("numba")
DIM, CONTEXT, EPS = 64, 12, 1e-5


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest work be shared among threads."""
    monkeypatch.setattr(thread_pool, "TASK_BYTES", 64)


def weights(rng: np.random.Generator, rows: int, n: int, dtype: str, bits: int) -> Any:
    values = random(rng, rows, n) / np.float32(np.sqrt(n))
    if not bits:
        return stored(values, dtype)
    codes, scales, biases = quantise(values, bits, 32, dtype)
    return AffineRows(codes, scales.view(VIEWS[dtype]), biases.view(VIEWS[dtype]), bits)


def layer(
    seed: int, heads: int, kv_heads: int, size: int, dtype: str, kind: str = "rms", bits: int = 0, **options: bool
) -> Attention:
    """options: bias, apart (three projections), turns; head_norms or whole_norms."""
    rng = np.random.default_rng(seed)
    rows = [heads * size, kv_heads * size, kv_heads * size]

    def vector(n: int) -> np.ndarray:
        return random(rng, n) / 4 + 1

    def linear(rows: int, n: int) -> tuple[Any, np.ndarray | None]:
        return weights(rng, rows, n, dtype, bits), random(rng, rows) if options.get("bias") else None

    def norm(n: int) -> tuple[np.ndarray, np.ndarray | None]:
        return vector(n), random(rng, n) if kind == "layer" else None

    widths = None if not options.get("whole_norms") else rows[:2]
    widths = [size, size] if options.get("head_norms") else widths
    angle = rng.uniform(0, 6, (CONTEXT, size // 2))
    keys, values = (stored(np.full((kv_heads, CONTEXT, size), np.nan, np.float32), dtype) for _ in range(2))
    return Attention(
        heads,
        kv_heads,
        size,
        kind,
        EPS,
        before=norm(DIM),
        after=norm(DIM),
        inputs=[linear(r, DIM) for r in rows] if options.get("apart") else [linear(sum(rows), DIM)],
        output=linear(DIM, heads * size),
        q_norm=None if widths is None else norm(widths[0]),
        k_norm=None if widths is None else norm(widths[1]),
        rotations=np.array([np.cos(angle), np.sin(angle)], np.float32) if options.get("turns") else None,
        keys=keys,
        values=values,
    )


class Naive:
    """The same in float64, its keys and values those of the cache."""

    def __init__(self, a: Attention):
        self.a = a

    def norm(self, x: np.ndarray, norm: Any) -> np.ndarray:
        weight, bias = norm
        x = x.reshape(-1, len(weight))
        x = x - x.mean(-1, keepdims=True) if self.a.norm == "layer" else x
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS) * weight
        return (x if bias is None else x + bias).reshape(-1)

    def linear(self, x: np.ndarray, linear: Any) -> np.ndarray:
        w, bias = linear
        full = np.empty(w.shape, np.float32)
        widen(w, full)
        return full.astype(np.float64) @ x + (0 if bias is None else bias)

    def turned(self, x: np.ndarray, position: int) -> np.ndarray:
        if self.a.rotations is None:
            return x
        half = x.shape[1] // 2
        cos, sin = self.a.rotations[:, position].astype(np.float64)
        pairs = (x[:, :half] + 1j * x[:, half:]) * (cos + 1j * sin)
        return np.concatenate([pairs.real, pairs.imag], 1)

    def heads(self, x: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, h = self.a, self.norm(x, self.a.before)
        flat = np.concatenate([self.linear(h, each) for each in a.inputs])
        q, k, v = np.split(flat, [a.heads * a.size, (a.heads + a.kv_heads) * a.size])
        if a.q_norm is not None:
            q, k = self.norm(q, a.q_norm), self.norm(k, a.k_norm)
        q, k, v = (each.reshape(-1, a.size) for each in (q, k, v))
        return self.turned(q, position), self.turned(k, position), v

    def __call__(self, x: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        a, (q, _, _) = self.a, self.heads(x, position)
        seen = slice(0, position + 1)
        found = []
        for head, query in enumerate(q):
            mine = head // (a.heads // a.kv_heads)
            scores = wide(a.keys[mine, seen]).astype(np.float64) @ query / np.sqrt(a.size)
            p = np.exp(scores - scores.max())
            found.append(p @ wide(a.values[mine, seen]) / p.sum())
        x = x + self.linear(np.concatenate(found), a.output)
        return x, self.norm(x, a.after)


def memory_for(a: Attention) -> Activations:
    return Activations(DIM, a.width, a.heads, CONTEXT)


def begun(a: Attention, threads: int = 2) -> tuple[Any, Activations, kernels.Kernels]:
    kernel, memory = kernels.load(True), memory_for(a)
    kernel.threads = threads
    step = kernel.attention(a, memory)
    assert step is not None
    return step, memory, kernel


flag = st.booleans()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([2, 6, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["rms", "layer"]),
    bits=st.sampled_from([0, 0, 4, 8]),
    norms=st.sampled_from([{}, {"head_norms": True}, {"whole_norms": True}]),
    options=st.fixed_dictionaries({"bias": flag, "apart": flag, "turns": flag}),
)
def test_it_is_the_naive_one(
    seed: int,
    kv_heads: int,
    group: int,
    size: int,
    dtype: str,
    kind: str,
    bits: int,
    norms: dict[str, bool],
    options: dict[str, bool],
) -> None:
    bits = bits if kv_heads * group * size % 32 == 0 else 0  # of whole groups
    a = layer(seed, kv_heads * group, kv_heads, size, dtype, kind, bits, **norms, **options)
    step, memory, _ = begun(a)
    naive, rng = Naive(a), np.random.default_rng(seed)
    coarse = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for position in range(4):
        x = random(rng, DIM)
        _, k, v = naive.heads(x.astype(np.float64), position)
        memory.x[0], memory.position[0] = x, position
        step()
        for cache, fed in ((a.keys, k), (a.values, v)):  # rounded to the cache's dtype, and nothing else is touched
            np.testing.assert_allclose(wide(cache[:, position]), fed, rtol=coarse, atol=2e-5)
            assert np.isnan(wide(cache[:, position + 1 :])).all()
        wanted, h = naive(x.astype(np.float64), position)
        np.testing.assert_allclose(memory.x[0], wanted, rtol=1e-5, atol=3e-5)
        np.testing.assert_allclose(memory.h[0], h, rtol=1e-4, atol=1e-4)


def replies(a: Attention, threads: int, then: int | None = None, seed: int = 1) -> bytes:
    """What five tokens give; from the fourth on with `then` threads."""
    step, memory, kernel = begun(a, threads)
    rng, found = np.random.default_rng(seed), b""
    for position in range(5):
        if position == 3 and then is not None:
            kernel.threads = then
        memory.x[0], memory.position[0] = random(rng, DIM), position
        step()
        found += memory.x.tobytes() + memory.h.tobytes()
    return found


@pytest.mark.parametrize("bits", [0, 4])
def test_every_number_of_threads_gives_the_same_bits_also_when_it_changes(bits: int) -> None:
    a = layer(3, 6, 2, 32, "bfloat16", bits=bits, bias=True, turns=True)
    assert len({replies(a, *threads) for threads in ((1,), (2,), (5,), (1, 5), (5, 1))}) == 1


def test_models_in_two_python_threads_do_not_disturb_each_other() -> None:
    layers = {seed: layer(seed, 6, 2, 32, "bfloat16", turns=True) for seed in (1, 2)}
    expected = {seed: replies(a, 3, seed=seed) for seed, a in layers.items()}
    wrong: list[int] = []

    def work(seed: int) -> None:
        wrong.extend(seed for _ in range(15) if replies(layers[seed], 3, seed=seed) != expected[seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_does_not_fit_is_refused_before_compiled_code_sees_it() -> None:
    a, kernel = layer(4, 4, 2, 16, "float32", bias=True, turns=True, head_norms=True), kernels.load(True)
    assert a.rotations is not None and a.q_norm is not None
    w, bias = a.inputs[0]
    wrong = {
        "rows and output": {"inputs": [(w[:-16], bias)], "output": (a.output[0][:, :16], None)},
        "heads": {"heads": 5, "inputs": [(stored(np.ones((144, DIM)), "float32"), None)], "output": (w[:80].T, None)},
        "values": {"values": a.values[:, :-1]},
        "rotations": {"rotations": a.rotations[:, :-1]},
        "norm's": {"q_norm": (a.q_norm[0].astype(np.float64), None)},
        "a bias": {"inputs": [(w, np.zeros(3, np.float32))]},
        "contiguous": {"output": (np.asfortranarray(a.output[0]), None)},
    }
    for message, change in wrong.items():
        changed = replace(a, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            kernel.attention(changed, memory_for(a))
    assert kernel.attention(a, memory_for(a)) is not None
    assert kernels.load(False).attention(a, memory_for(a)) is None


def test_exponentials_are_the_exact_ones() -> None:
    from mlx_flash.engine.backends.numpy.kernels.attention_loops import exps

    rng = np.random.default_rng(5)
    values = np.concatenate([-np.abs(rng.normal(size=5000) * 20), [0, -1e-30, -86.9, -200, -np.inf, np.nan]])
    values = (values + 3).astype(np.float32)
    got = values.copy()
    exps(got.ctypes.data, len(got), np.float32(3))
    exact = np.exp(np.maximum(values - np.float32(3), -87).astype(np.float64))
    np.testing.assert_allclose(got, exact, rtol=3e-7)
