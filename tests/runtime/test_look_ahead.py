"""Look-ahead may cost time but never changes a bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.selection.look_ahead import Trial
from mlx_flash.engine.storage.readers import MemoryReader
from mlx_flash.tools.inspection import inspect_model
from tests.calibrated import calibrate_by_hand, check_slots, selectors, stored_bundles
from tests.runtime.lossy_models import (
    PROMPTS,
    TOKENS,
    Models,
    all_logits,
    load,
    reply,
)
from tests.tiny import three_budgets


@pytest.mark.parametrize("select", ["predictor", "gate"])
def test_look_ahead_changes_no_bit(models: Models, backend: str, select: str) -> None:
    path = models("relu")
    for memory in three_budgets(path, backend, select)[:2]:
        off = all_logits(path, backend, memory, select, look_ahead="off")
        for mode in ("on", "auto"):
            try:
                got = all_logits(path, backend, memory, select, look_ahead=mode)
            except mlx_flash.BudgetError:  # `gate` alone has no predictors in memory
                continue
            assert (got == off).all(), f"{select} at {memory} bytes: look-ahead {mode} gives other logits"


def with_guesses(model: Any, guess: Callable[[int], np.ndarray]) -> None:
    """Replace what look-ahead expects of each layer by `guess(layer)` (count,) logits."""
    ahead = model.flash.selectors[0].look_ahead
    ahead.predictors = [lambda x, layer=layer: partial(guess, layer) for layer in range(len(ahead.predictors))]
    ahead.margins = [0.0] * len(ahead.predictors)


@pytest.mark.parametrize("mode", ["right", "wrong", "everything", "nothing", "half right"])
def test_guesses_of_every_quality_change_no_bit(models: Models, backend: str, mode: str) -> None:
    path = models("relu")
    counts = inspect_model(path, mlx_flash.FlashConfig(backend=backend))["bundles"]
    rng = np.random.default_rng(3)
    asked = [[np.flatnonzero(rng.random(n) < 0.2).astype(np.int32) for n in counts] for _ in range(TOKENS)]
    at = {"step": -1}

    def wanted(layer: int) -> np.ndarray:
        at["step"] += layer == 0
        logits = np.full(counts[layer], -1.0, np.float32)
        logits[asked[at["step"] % TOKENS][layer]] = 1.0
        return logits

    def guess(layer: int) -> np.ndarray:
        truth = np.full(counts[layer], -1.0, np.float32)
        truth[asked[at["step"] % TOKENS][layer]] = 1.0
        swap = truth * np.where(rng.random(counts[layer]) < 0.5, -1, 1)
        return {"right": truth, "wrong": -truth, "everything": truth * 0 + 1, "nothing": truth * 0 - 1}.get(mode, swap)

    results = []
    for look_ahead in ("off", "on"):
        at["step"] = -1
        partly = three_budgets(path, backend, "predictor")[1]
        model = load(path, backend, partly, "predictor", look_ahead=look_ahead)
        for selector in model.flash.selectors:
            selector.predict = lambda x, layer=selector.layer: partial(wanted, layer)
        # From memory: a read from disk may not have ended when its bundles are due, and is then given up.
        files = [(f.layout, stored_bundles(f)) for f in model.flash.plan.checkpoint.layer_files]
        model.flash.shared.reader = MemoryReader(files)
        if look_ahead == "on":
            with_guesses(model, guess)
        results.append(np.array([reply(model, length) for length in PROMPTS]))
        check_slots(model)
        stats = model.flash.stats
        guessed, right = stats.guessed, stats.guessed_right
        model.flash.close()
    assert (results[0] == results[1]).all()
    # Who expects everything wants no resident bundle to give way.
    assert (guessed > 0) == (mode in ("right", "wrong", "half right"))
    assert (right > 0) == (mode in ("right", "half right"))
    if mode == "right":
        assert right == guessed


@pytest.mark.parametrize("gain", [0.0, 1e9])
def test_a_trial_that_ends_either_way_changes_no_bit(models: Models, backend: str, gain: float) -> None:
    path, seen = models("relu"), []

    class WatchedTrial(Trial):
        def token(self, seconds: float) -> None:
            super().token(seconds)
            seen.append((self.on, self.kept))

    memory = three_budgets(path, backend, "predictor")[1]
    model = load(path, backend, memory, "predictor", look_ahead="auto")
    model.flash.selectors[0].look_ahead.trial = WatchedTrial(tokens=1, keep=2, gain=gain)
    got = reply(model, 17, 12)
    model.flash.close()
    off = load(path, backend, memory, "predictor", look_ahead="off")
    assert (reply(off, 17, 12) == got).all()
    off.flash.close()
    kept = {on for on, left in seen if left}
    assert kept == {gain > 1}, "the verdict of a trial is not kept"
    assert {on for on, _ in seen} == {True, False}, "a trial tries both"


def test_a_dropped_model_is_gone_at_once_with_look_ahead_too(models: Models) -> None:
    import gc
    import weakref

    path = models("relu")
    gc.disable()  # no cycle may keep gigabytes until the collector comes by
    try:
        model = load(path, "numpy", three_budgets(path, "numpy", "predictor")[1], "predictor", look_ahead="on")
        reply(model, 3)
        assert model.flash.plan.look_ahead == "on"
        model.flash.close()
        alive = weakref.ref(next(selectors(model)))
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_calibration_of_its_own_is_read(models: Models, tmp_path: Path) -> None:
    """`static` follows the calibrated energies: with others it keeps others."""
    import shutil

    path = shutil.copytree(models("silu"), tmp_path / "copy")
    before = all_logits(path, "numpy", "auto", "static:0.3")
    calibrate_by_hand(path, None, "gate")
    assert (all_logits(path, "numpy", "auto", "static:0.3") == before).all()
