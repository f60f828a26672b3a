"""The order in which an FFN's terms are added: blocks within segments, ascending, then the segments pairwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.backends.base import BLOCK, SEGMENTS, FFNSpec, add_pairwise, block_segments
from mlx_flash.engine.backends.numpy.backend import DTYPES, NumpyBackend
from mlx_flash.engine.backends.numpy.kernels import base as kernels
from mlx_flash.engine.storage.bundle import Layout, Part, Quantisation, quantised

BACKENDS = {"plain": NumpyBackend(numba=False)}
with suppress(ImportError):
    BACKENDS["numba"] = NumpyBackend(numba=True)
both_sets = pytest.mark.parametrize("name", BACKENDS)
# Of neurons: less than a block, fewer blocks than segments, as many, more with and without a short last one.
COUNTS = (96, 3 * BLOCK, 8 * BLOCK, 11 * BLOCK, 18 * BLOCK + 96)
DIM = 128


def in_stated_order(blocks: np.ndarray) -> np.ndarray:
    """The blocks' sums (blocks, ...) fp32 added up as docs/how-it-works.md says; uses none of the code under test."""
    s = [np.zeros(blocks.shape[1:], np.float32) for _ in range(8)]
    for number, block in enumerate(blocks):
        s[8 * number // len(blocks)] += block
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))


def one_after_the_other(blocks: np.ndarray) -> np.ndarray:
    total = np.zeros(blocks.shape[1:], np.float32)
    for block in blocks:
        total += block
    return total


def layout_of(count: int, neurons: int = 1) -> Layout:
    return Layout((Part("down", "float32", DIM * neurons),), count, neurons=neurons)


@given(st.integers(1, 3000), st.sampled_from([1, 32, 64, 128]))
def test_segments_are_runs_of_blocks_and_cover_all(blocks: int, neurons: int) -> None:
    for count in {blocks * BLOCK // neurons, (blocks - 1) * BLOCK // neurons + 1}:
        found = block_segments(layout_of(count, neurons))
        assert len(found) == blocks and found[0] == 0 and (np.diff(found) >= 0).all() and found[-1] < SEGMENTS == 8
        lengths = np.bincount(found, minlength=SEGMENTS)
        assert lengths.max() - lengths.min() <= 1
        assert found.tolist() == [8 * block // blocks for block in range(blocks)]
    with pytest.raises(ValueError):
        found[0] = 1


def test_pairs_are_added_pairwise() -> None:
    s = [np.float32(value) for value in np.random.default_rng(0).standard_normal(8)]
    assert add_pairwise(np.array(s)) == ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))


@both_sets
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([*COUNTS, 5 * BLOCK + 1]),
    d=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_a_kernel_adds_term_by_term_in_the_stated_order(
    name: str, seed: int, count: int, d: int, dtype: str, threads: int
) -> None:
    """Scalars are powers of two, so that products are exact, fused or not, and only the order of sums rounds."""
    rng, kernel = np.random.default_rng(seed), BACKENDS[name].kernels
    rows, down = np.empty((count, d), DTYPES[dtype]), np.empty((count, d), np.float32)
    kernels.narrow(rng.standard_normal((count, d)), rows)
    kernels.widen(rows, down)
    h = np.ldexp(rng.choice(np.float32([-1, 1]), count), rng.integers(-6, 7, count)).astype(np.float32)
    h[rng.random(count) < 0.5] = 0
    blocks = np.zeros((-(-count // BLOCK), d), np.float32)
    for i in np.flatnonzero(h):
        blocks[i // BLOCK] += h[i] * down[i]
    y = np.zeros((SEGMENTS, d), np.float32)
    BACKENDS[name].threads = threads
    kernels.add_dense(kernel, rows, h, y, BLOCK, block_segments(layout_of(count)))
    assert kernel.total(y, rows).tobytes() == in_stated_order(blocks).tobytes()
    assert len(blocks) < 8 or d < 20 or not np.array_equal(in_stated_order(blocks), one_after_the_other(blocks))


class Net:
    """An FFN of random weights, all in one slab of a backend; the row of a bundle is its id.

    kind: "plain" rows, "quantised" ones, or "groups" of quantised neurons.
    """

    def __init__(self, backend: Any, count: int, kind: str, biased: bool):
        rng, neurons = np.random.default_rng(count), 32 if kind == "groups" else 1
        layout = Layout(tuple(Part(name, "float32", DIM) for name in ("gate", "up", "down")), count)
        if kind != "plain":
            layout = quantised(layout, Quantisation(4, 32), neurons)
        biases = {name: rng.standard_normal(count).astype(np.float32) for name in ("gate_bias", "up_bias") if biased}
        self.backend, self.layout, self.size = backend, layout, BLOCK // neurons  # bundles in a block
        self.spec = FFNSpec(layout, "relu", True, **biases)
        records = np.zeros((layout.count, layout.stride), np.uint8)
        for part in layout.parts:
            if part.dtype == "uint32":
                values = rng.integers(0, 2**32, (layout.count, part.length), np.uint32)
            else:
                size = 0.01 if "." in part.name else 1
                values = (size * rng.standard_normal((layout.count, part.length))).astype(np.float32)
            at = layout.offset(part.name)
            records[:, at : at + part.nbytes] = values.view(np.uint8)
        self.slab = backend.slab(layout, layout.count, [part.name for part in layout.parts])
        for target in self.slab.targets:
            target.rows[...] = records[:, target.offset : target.offset + target.rows.shape[1]]

    def dense(self, x: Any, *pieces: np.ndarray) -> np.ndarray:
        """All terms of these runs of ids."""
        work = self.backend.ffn(self.spec, x)
        for ids in pieces:
            work.dense(self.slab, int(ids[0]), int(ids[0]), len(ids))
        return self.backend.to_numpy(work.result())

    def chosen(self, x: Any, *pieces: np.ndarray, late: int = 0) -> np.ndarray:
        """The terms of these ids, piece by piece; `late` of them, spread over all, come after the others."""
        work = self.backend.ffn(self.spec, x)
        for ids in pieces:
            last = np.zeros(len(ids), bool)
            last[np.linspace(0, len(ids) - 1, late).astype(int)] = late > 0
            work.scalars(ids[~last], self.slab, ids[~last], ids[last])
            if late:
                work.scalars(ids[last], self.slab, ids[last])
            work.down()
        return self.backend.to_numpy(work.result())

    def blocks(self) -> list[np.ndarray]:
        """All ids, block by block."""
        ids = np.arange(self.layout.count)
        return np.split(ids, ids[self.size :: self.size])

    def segments(self) -> list[np.ndarray]:
        """All ids, segment by segment; none in those that are empty."""
        blocks = self.blocks()
        cuts = np.searchsorted(np.arange(len(blocks)) * 8 // len(blocks), range(1, 8)) * self.size
        return np.split(np.arange(self.layout.count), cuts)


def sums_of(add: Callable[..., np.ndarray], x: Any, parts: list[np.ndarray]) -> np.ndarray:
    """What each part gives by itself; zeros for one without ids."""
    shape = np.shape(x)[-2:]
    return np.stack([add(x, ids).reshape(shape) if len(ids) else np.zeros(shape, np.float32) for ids in parts])


def check_order(net: Net, x: Any, split: Callable[[], list[np.ndarray]]) -> None:
    """What parts of the layer give by themselves, added in the stated order, is what all of them give in one pass."""
    every, blocks, parts = np.arange(net.layout.count), net.blocks(), split()
    alone, shape = sums_of(net.dense, x, parts), np.shape(x)[-2:]
    wanted = in_stated_order(alone)
    for pieces in ([every], blocks, [every[: net.size], every[net.size :]][: len(blocks)]):
        assert np.array_equal(net.dense(x, *pieces).reshape(shape), wanted)
    if len(blocks) >= 8:  # fewer are added in the same order either way
        assert not np.array_equal(one_after_the_other(alone), wanted)
    kept = np.random.default_rng(1).random(len(every)) < 0.5
    if len(blocks) > 2:
        kept[blocks[1]] = False  # a block without any
    ids = every[kept]
    wanted = in_stated_order(sums_of(net.chosen, x, [part[kept[part]] for part in parts]))
    for pieces in ([ids], [mine for block in blocks if len(mine := block[kept[block]])]):
        for late in {0, min(3, len(pieces[0])), len(pieces[0]) // 2}:
            assert np.array_equal(net.chosen(x, *pieces, late=late).reshape(shape), wanted), late


@both_sets
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["plain", "quantised", "groups"])
@pytest.mark.parametrize(("tokens", "biased"), [(1, False), (1, True), (5, False), (5, True)])
def test_a_numpy_pass_adds_blocks_in_the_stated_order(
    name: str, kind: str, count: int, tokens: int, biased: bool
) -> None:
    net = Net(BACKENDS[name], count, kind, biased)
    x = np.random.default_rng(tokens).standard_normal((tokens, DIM)).astype(np.float32)
    check_order(net, x, net.blocks)
    check_order(net, x, net.segments)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["plain", "quantised"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_an_mlx_pass_adds_segments_in_the_stated_order(kind: str, count: int, tokens: int) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_flash.engine.backends.mlx.backend import MlxBackend

    net = Net(MlxBackend(), count, kind, False)
    x = mx.random.normal((1, tokens, DIM), key=mx.random.key(tokens))
    check_order(net, x, net.segments)
