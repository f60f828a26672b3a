"""The clocks of `mlx_flash bench`: every moment belongs to one phase, and clocks change nothing."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.engine.backends.numpy.decode_pass import DecodePass
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.selection.predictor import PredictorSelector
from mlx_flash.engine.storage.reader import CountedReader
from mlx_flash.tools.bench.timeline import (
    CALLS,
    DENSE,
    LAZY_PHASES,
    LEAVE,
    PHASES,
    READS,
    SELECTION,
    SPARSE,
    TimedToken,
    Timeline,
    TimeSpan,
    exclusive,
    middle,
)
from mlx_flash.tools.trace_recording import record_ids
from tests.calibrated import make_calibrated
from tests.tools.bench.tiny_bench import LAYERS, decoding, loaded

COMPILES = NumpyBackend().compiles
SLOW_S = 0.003


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated("openelm-relu", tmp_path_factory.mktemp("bench"), "float32")


def test_the_innermost_phase_counts() -> None:
    marks = [(1.0, SELECTION), (2.0, CALLS), (3.0, LEAVE), (3.0, CALLS), (4.0, LEAVE), (6.0, LEAVE), (6.5, READS)]
    spans = exclusive([*marks, (7.0, LEAVE)], 0.5, 8.0)
    found = [(span.phase, span.begin, span.end) for span in spans]
    assert found == [
        ("python", 0, 0.5),
        ("selection", 0.5, 1.5),
        ("read calls", 1.5, 3.5),
        ("selection", 3.5, 5.5),
        ("python", 5.5, 6),
        ("reads", 6, 6.5),
        ("python", 6.5, 7.5),
    ]
    token = TimedToken(7.5, spans, (), np.zeros((0, 3)))
    assert token.split == {"python": 2, "selection": 3, "read calls": 2, "reads": 0.5}
    lazy = exclusive([(1.0, READS), (2.0, LEAVE)], 0.0, 3.0, LAZY_PHASES)
    assert [span.phase for span in lazy] == ["all else", "reads", "all else"]


def test_the_middle_half_adds_up() -> None:
    def token(reads: float, python: float) -> TimedToken:
        spans = (TimeSpan("reads", 0, reads), TimeSpan("python", reads, reads + python))
        return TimedToken(reads + python, spans, (), np.zeros((0, 3)))

    tokens = [token(9, 90), token(2, 3), token(1, 1), token(4, 3)]
    assert middle(tokens, ("reads", "dense", "python")) == {"reads": 3, "dense": 0, "python": 3}
    assert middle(tokens[:1], ("reads", "python")) == {"reads": 9, "python": 90}


def test_split_is_the_whole_token_and_clocks_change_nothing(flash: Path) -> None:
    model = loaded(flash, look_ahead="on")
    wanted = [logits.tobytes() for logits in decoding(model)]
    model.flash.close()
    model, found = loaded(flash, look_ahead="on"), []
    stats, shared = model.flash.stats, model.flash.shared
    steps = decoding(model)
    before = [set(vars(thing)) for thing in (shared, shared.backend, shared.reader, stats, model.layers[0].ffn)]
    asked: list[tuple[int, int]] = []
    record_ids(model.flash, lambda layer, ids: asked.append((layer, len(ids))))
    timeline = Timeline(model)
    for k in range(12):
        stats.reset()
        begin = time.perf_counter()
        token = timeline.time(lambda: found.append(next(steps).tobytes()))
        outside = time.perf_counter() - begin
        assert sum(token.split.values()) == pytest.approx(token.seconds, rel=1e-9) and token.seconds <= outside
        assert token.spans[0].begin == 0 and token.spans[-1].end == pytest.approx(token.seconds)
        assert all(a.end == b.begin and a.phase != b.phase for a, b in zip(token.spans, token.spans[1:], strict=False))
        assert [layer for layer, _ in token.layers] == list(range(LAYERS))
        assert token.use[:, 0].tolist() == [count for _, count in asked[LAYERS * k :]]
        assert token.use[:, 1].sum() == stats.misses and (token.use[:, 2] <= token.use[:, 0]).all()
        assert set(token.split) >= {"dense", "sparse", "selection", "python"}
    assert found == wanted
    after = [set(vars(thing)) for thing in (shared, shared.backend, shared.reader, stats, model.layers[0].ffn)]
    assert after == before
    model.flash.close()


def test_clocks_let_go_of_the_model(flash: Path) -> None:
    def used() -> tuple[Timeline, weakref.ref[Any]]:
        model = loaded(flash)
        timeline, steps = Timeline(model), decoding(model)
        timeline.time(lambda: next(steps))
        model.flash.close()
        timeline.end()
        return timeline, weakref.ref(model.layers[0].ffn.slab)

    used()  # compiling keeps the frames that call a function first
    gc.disable()
    try:
        timeline, slab = used()
        assert slab() is None, "memory that a cycle keeps is missed by the warm start"
    finally:
        gc.enable()


def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(SLOW_S)
        return call(*args, **options)

    return slow


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        pytest.param(NumpyBackend, "decode", DENSE, marks=pytest.mark.skipif(not COMPILES, reason="numba is missing")),
        (NumpyBackend, "linear", DENSE),
        (DecodePass, "scalars", SPARSE),
        (DecodePass, "down", SPARSE),
        (DecodePass, "gate", SELECTION),
        (PredictorSelector, "choose", SELECTION),
        (Residency, "plan", SELECTION),
        (Residency, "commit", SELECTION),
        (CountedReader, "read", PHASES.index("python")),
        ("reader", "submit", CALLS),
        ("pending", "wait", READS),
    ],
)
def test_what_takes_long_is_found(
    owner: Any, name: str, phase: int, flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(flash, **({"select": "gate", "slots": 1.0} if name == "gate" else {}))
    if owner == "reader":
        owner = type(model.flash.shared.reader)
    steps = decoding(model)
    if owner == "pending":
        submit = type(model.flash.shared.reader).submit

        def slow_to_end(self: Any, *args: Any) -> Any:
            pending = submit(self, *args)
            return SimpleNamespace(wait=slowly(pending.wait), ended=pending.ended, give_up=pending.give_up)

        monkeypatch.setattr(type(model.flash.shared.reader), "submit", slow_to_end)
    else:
        monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))
    split = Timeline(model).time(lambda: next(steps)).split
    model.flash.close()
    times = 1 if name == "linear" and COMPILES else LAYERS  # the output layer's only, where layers decode in one call
    assert split[PHASES[phase]] >= times * SLOW_S


def test_a_lazy_backend_is_not_split_further(flash: Path) -> None:
    pytest.importorskip("mlx_lm")
    model = loaded(flash, backend="mlx")
    steps = decoding(model)
    token = Timeline(model).time(lambda: next(steps))
    model.flash.close()
    assert set(token.split) == {"reads", "read calls", "all else"}
    assert [layer for layer, _ in token.layers] == list(range(LAYERS)) and token.use[:, 1].all()
