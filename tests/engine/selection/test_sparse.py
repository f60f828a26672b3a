"""A selector that errs can only lose quality: never a wrong slot, never a stale row.

Whatever ids a token is said to need, whatever has slots, whatever is guessed and whichever reads fail, the output is
the sum over exactly those ids. Readers here are late on purpose: rows hold rubbish until they are waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.backends.base import BLOCK, FFNSpec
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.staging import BlockStream
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.engine.selection.look_ahead import LookAhead
from mlx_flash.engine.selection.predictor import PredictorSelector
from mlx_flash.engine.selection.sparse import LayerSetup
from mlx_flash.engine.storage.bundle import Layout, Part
from mlx_flash.engine.storage.reader import ReadReport, Target
from mlx_flash.engine.storage.readers import MemoryReader
from mlx_flash.errors import ReadError
from mlx_flash.stats import Stats
from tests.calibrated import check_slab

DIM, COUNTS = 8, (300, 40, 515)
PARTS = tuple(Part(name, "float32", DIM) for name in ("gate", "up", "down"))
LAYOUTS = [Layout(PARTS, count) for count in COUNTS]


def bundles_of(layer: int) -> np.ndarray:
    layout = LAYOUTS[layer]
    raw = np.zeros((layout.count, layout.stride), np.uint8)
    values = np.random.default_rng(layer).normal(size=(layout.count, 3 * DIM)).astype(np.float32)
    raw[:, : 12 * DIM] = values.view(np.uint8)
    return raw


BUNDLES = [bundles_of(layer) for layer in range(len(COUNTS))]


class LateRead:
    """Rubbish in the rows until `wait`, which then either fills them or fails half-way."""

    def __init__(self, reader: LateReader, request: tuple[Any, ...], fails: bool):
        self.reader, self.request, self.fails = reader, request, fails
        self.report: ReadReport | ReadError | None = None
        _, _, rows, targets = request
        for target in targets:
            target.rows[rows] = 0x7F  # 3.4e38: using it shows

    def ended(self) -> bool:
        return self.report is not None or self.reader.quick

    def give_up(self) -> None:
        self.report = self.report or ReadError("given up")

    def wait(self) -> ReadReport:
        if self.report is None:
            layer, ids, rows, targets = self.request
            if self.fails:
                half = len(ids) // 2
                self.reader.inner.submit(layer, ids[:half], rows[:half], targets)
                self.report = ReadError("made to fail")
            else:
                self.report = self.reader.inner.submit(layer, ids, rows, targets).wait()
        if isinstance(self.report, ReadError):
            raise self.report
        return self.report


class LateReader:
    """Reads end when they are waited for, the latest possible moment; the reads numbered in `fails` fail."""

    def __init__(self, fails: set[int], quick: bool):
        self.inner = MemoryReader(list(zip(LAYOUTS, BUNDLES, strict=True)))
        self.fails, self.quick, self.submits = fails, quick, 0
        self.pending: list[LateRead] = []

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> LateRead:
        self.submits += 1
        read = LateRead(self, (layer, ids.copy(), rows.copy(), targets), self.submits in self.fails)
        self.pending.append(read)
        return read

    def drain(self) -> None:
        for read in self.pending:
            read.give_up()

    def close(self) -> None:
        self.drain()


def reference(layer: int, ids: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The FFN over exactly these ids, in fp64."""
    gate, up, down = BUNDLES[layer][ids, : 12 * DIM].view(np.float32).reshape(-1, 3, DIM).transpose(1, 0, 2)
    gate, up, down, wide = (a.astype(np.float64) for a in (gate, up, down, x))
    return (np.maximum(wide @ gate.T, 0) * (wide @ up.T)) @ down


class Model:
    """Three layers' predictor selectors on one `SharedContext`, and look-ahead with guesses drawn anew each time."""

    def __init__(self, backend: Any, capacities: Sequence[int], staging: int, reader: Any, guesses: float, seed: int):
        self.backend, self.rng = backend, np.random.default_rng(seed)
        slabs = [backend.slab(LAYOUTS[0], BLOCK, ["gate", "up", "down"]) for _ in range(staging)]
        self.shared = SharedContext(backend, reader, BlockStream(slabs), Stats())
        ahead = None
        if guesses:
            expect = [lambda x, n=n: lambda: self.rng.random(n, np.float32) - np.float32(1 - guesses) for n in COUNTS]
            ahead = LookAhead(self.shared, expect, [0.0] * len(COUNTS), "on")
        self.layers = [
            PredictorSelector(
                LayerSetup(
                    layer,
                    FFNSpec(layout, "relu", True),
                    self.shared,
                    Residency(layout.count, capacity, compiled=backend.compiles),
                    ahead,
                ),
                lambda x, layer=layer: partial(self.wanted, layer),
            )
            for layer, (layout, capacity) in enumerate(zip(LAYOUTS, capacities, strict=True))
        ]

    def step(self, x: np.ndarray, asked: Sequence[np.ndarray]) -> list[Any]:
        """All layers on the same x (T, d), decoding `asked` where T is 1; results are not evaluated."""
        self.asked = asked
        return [layer(self.given(x)) for layer in self.layers]

    def wanted(self, layer: int) -> np.ndarray:
        """Logits that predict exactly what is asked for."""
        logits = np.full(COUNTS[layer], -1, np.float32)
        logits[self.asked[layer]] = 1
        return logits

    def given(self, x: np.ndarray) -> Any:
        if self.backend.name == "numpy":
            return x
        import mlx.core as mx

        return mx.array(x)

    def check(self) -> None:
        for layer, bundles in zip(self.layers, BUNDLES, strict=True):
            check_slab(layer.residency, layer.slab, bundles)


def make_backend(name: str) -> Any:
    if name == "mlx":
        pytest.importorskip("mlx.core", reason="needs mlx")
        from mlx_flash.engine.backends.mlx.backend import MlxBackend

        return MlxBackend()
    from mlx_flash.engine.backends.numpy.backend import NumpyBackend

    return NumpyBackend()


@pytest.mark.parametrize("name", ["numpy", "mlx"])
@settings(max_examples=40)
@given(data=st.data())
def test_the_output_is_the_sum_over_exactly_the_ids_asked_for(name: str, data: st.DataObject) -> None:
    backend, seed = make_backend(name), data.draw(st.integers(0, 2**31), "seed")
    rng = np.random.default_rng(seed)
    capacities = [data.draw(st.sampled_from([0, 1, count // 5, count // 2, count]), "slots") for count in COUNTS]
    faults = data.draw(st.sets(st.integers(1, 60), max_size=4), "failing reads")
    reader = LateReader(faults, quick=data.draw(st.booleans(), "quick"))
    guesses = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]), "share guessed")
    model = Model(backend, capacities, data.draw(st.integers(1, 3), "staging"), reader, guesses, seed)
    got: list[tuple[int, Any, np.ndarray]] = []
    wanted_faults = 0
    for tokens in data.draw(st.lists(st.sampled_from([1, 1, 1, 3]), min_size=2, max_size=12), "tokens"):
        x = rng.normal(size=(tokens, DIM)).astype(np.float32)
        share = rng.choice([0.0, 0.02, 0.2, 0.9, 1.0], len(COUNTS))
        asked = [np.flatnonzero(rng.random(n) < s) for n, s in zip(COUNTS, share, strict=True)]
        try:
            found = model.step(x, asked)
        except ReadError:
            wanted_faults += 1
            continue
        for layer, output in enumerate(found):
            ids = asked[layer] if tokens == 1 else np.arange(COUNTS[layer])
            got.append((layer, output, reference(layer, ids, x)))
    if model.shared.unfinished is not None:
        model.shared.begin(model.layers[0])
        model.shared.end()
    model.check()
    for layer, output, wanted in got:  # only now: a lazy backend must not have lost rows that it still needs
        value = backend.to_numpy(output)
        assert np.isfinite(value).all(), f"layer {layer} used rows that were not read yet"
        np.testing.assert_allclose(value, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))
    assert wanted_faults <= len(faults)
