"""The runs of `mlx_flash bench`: fixed tokens, with and without clocks in turn, replayed traces, cold and warm."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.tools.bench import measuring
from mlx_flash.tools.bench.bench_report import consecutive
from mlx_flash.tools.bench.measuring import replies
from mlx_flash.tools.bench.options import BenchOptions
from mlx_flash.tools.bench.timeline import (
    TimedToken,
    Timeline,
)
from mlx_flash.tools.bench.trace_replay import let_named_neurons_fire, name_neurons
from tests.calibrated import make_calibrated
from tests.tools.bench.tiny_bench import decoding, loaded, replay_for


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated("openelm-relu", tmp_path_factory.mktemp("bench"), "float32")


@pytest.fixture(autouse=True)
def keep_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the page cache, which other tests and other processes use."""
    monkeypatch.setattr(measuring, "drop_page_cache", lambda: False)


def test_tokens_are_fixed_and_kinds_alternate(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(flash)
    list(decoding(model))  # compiling keeps the frames that call a function first
    model.flash.close()
    del model
    seen: list[list[int]] = []
    order: list[int] = []
    plan = plan_checkpoint(flash, mlx_flash.FlashConfig(select="predictor", backend="numpy", slots=0.3, max_context=64))
    forced, timed, untimed = plan.models.forced, Timeline.time, measuring._seconds

    def spy(model: Any, prompt: list[int], following: list[int], chunk: int) -> Any:
        seen.append([*prompt, -1, *following])
        return forced(model, prompt, following, chunk)

    monkeypatch.setattr(plan.models, "forced", spy)
    monkeypatch.setattr(Timeline, "time", lambda self, step: order.append(1) or timed(self, step))
    monkeypatch.setattr(measuring, "_seconds", lambda steps: order.append(0) or untimed(steps))
    load, slabs = measuring.load, []

    def alone(*arguments: Any) -> Any:
        assert all(slab() is None for slab in slabs), "two models in memory"
        loaded = load(*arguments)
        slabs.append(weakref.ref(loaded[0].layers[0].ffn.slab))
        return loaded

    monkeypatch.setattr(measuring, "load", alone)
    options = BenchOptions(tokens=3, warm=2, prompt=5, rounds=2)
    gc.disable()
    found = measuring.run_bench(plan, options, replay_for(plan))
    gc.enable()
    assert order == 2 * [0, 0, *(0, 1, 1, 0, 0, 1)]
    assert seen[0] == seen[2] != seen[1], "the warm start has the first round's"
    assert seen[:2] == [[*prompt, -1, *reply] for prompt, reply in replies(plan, options)]
    assert all(len(each) == 5 + 1 + 2 + 6 and max(each) < plan.spec.vocab for each in seen)
    assert (len(found.warming_s), len(found.untimed_s), len(found.timed), found.decoded) == (4, 6, 6, 12)
    asked = sum(len(layer[0]) for layer in replay_for(plan).trace.ids)
    assert found.warm is not None and found.stats.hits + found.stats.misses == 12 * asked
    assert found.stats.bytes_read > 0 and found.memory.peak > plan.memory.total_bytes


def test_what_a_trace_names_is_asked_for_and_fires(flash: Path) -> None:
    def use(fires: bool) -> np.ndarray:
        model = loaded(flash)
        steps = model.flash.forced(model, [1, 2, 3], [4])
        next(steps)
        replay = replay_for(model.flash.plan)
        name_neurons(model, replay)
        if fires:
            let_named_neurons_fire(model)
        token = Timeline(model).time(lambda: next(steps))
        model.flash.close()
        assert token.use[:, 0].tolist() == [len(layer[0]) for layer in replay.trace.ids]
        return token.use

    assert (use(True)[:, 2] == use(True)[:, 0]).all()
    assert use(False)[:, 2].sum() < 0.8 * use(False)[:, 0].sum(), "ReLU drops half of random gates"


def test_the_picture_shows_tokens_that_followed_each_other() -> None:
    tokens = [TimedToken(seconds, (), (), np.zeros((0, 3))) for seconds in (1, 9, 2, 2.5, 2, 8, 2, 2)]
    assert consecutive(tokens, 6) == tokens[2:4]
    assert consecutive(tokens[:1], 1) == tokens[:1] and consecutive(tokens[:3], 3) == tokens[:2]
