"""Selectors that lose quality lose nothing else: the same logits at every budget, exact prompts, no memory of the last
reply, no stale rows after faults; and look-ahead, which may cost time but never changes a bit.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.selection.look_ahead import Trial
from mlx_flash.engine.storage.readers import FaultyReader, MemoryReader
from mlx_flash.runtime.planning.selective_persistence import MemoryPlan
from mlx_flash.tools.inspection import inspect_model
from tests.calibrated import calibrate_by_hand, check_slots, make_calibrated, selectors, stored_bundles
from tests.tiny import three_budgets

PROMPTS = (1, 17, 257)  # the last one is a chunk of 256 and one token, which is prompt all the same
TOKENS = 4
BACKENDS = ("numpy", "mlx")
MODELS = {"relu": "openelm-relu", "silu": "openelm", "silu-up": "llama", "opt": "opt"}
LOSSY = [
    ("relu", "predictor", None),
    ("relu", "prompt:0.3", None),
    ("relu", "threshold:0.5", None),
    ("silu", "prompt:0.25", None),
    ("silu", "prompt:0.5", 2),
    ("silu", "threshold:0.5", None),
    ("silu-up", "threshold:0.7", None),
    ("silu-up", "static:0.4", None),
]


@dataclass
class Models:
    """Tiny checkpoints with a made-up calibration, one of each kind and dtype."""

    folder: Path
    made: dict[tuple[str, str, float], Path]

    def __call__(self, kind: str, dtype: str = "bfloat16", share: float = 0.4) -> Path:
        key = kind, dtype, share
        if key not in self.made:
            lead = "up" if kind == "silu-up" else "gate"
            folder = self.folder / f"{kind}-{dtype}-{share}"
            folder.mkdir()
            predicts = share if kind == "relu" else None
            self.made[key] = make_calibrated(MODELS[kind], folder, dtype, predicts, lead)
        return self.made[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("lossy"), {})


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="the mlx backend needs mlx-lm")
    return str(request.param)


def load(path: Path, backend: str, memory: int | str = "auto", select: str = "all", **fields: Any) -> Any:
    return mlx_flash.load(path, backend=backend, memory=memory, select=select, **fields)[0]


def ids_of(length: int, tokens: int = TOKENS) -> tuple[list[int], list[int]]:
    ids = np.random.default_rng(length).integers(0, 256, length + tokens).tolist()
    return ids[:length], ids[length:]


def reply(model: Any, length: int, tokens: int = TOKENS) -> np.ndarray:
    """Logits (1 + tokens, vocab) after a prompt and along a fixed reply."""
    return np.array(list(model.flash.forced(model, *ids_of(length, tokens))))


def all_logits(path: Path, backend: str, memory: int | str, select: str, **fields: Any) -> np.ndarray:
    model = load(path, backend, memory, select, **fields)
    try:
        return np.array([reply(model, length) for length in PROMPTS])
    finally:
        model.flash.close()


@cache
def exact_logits(path: Path, backend: str) -> np.ndarray:
    return all_logits(path, backend, "auto", "all")


def assert_same(got: np.ndarray, wanted: np.ndarray, backend: str, what: str = "") -> None:
    """Bit for bit where both did the same sums: numpy with Numba. Else within what fp32 sums of another order give."""
    if backend == "numpy" and importlib.util.find_spec("numba"):
        assert (got == wanted).all(), what
    else:
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max(), what


@pytest.mark.parametrize(("kind", "select", "reselect"), LOSSY)
def test_logits_are_identical_at_every_budget(
    models: Models, backend: str, kind: str, select: str, reselect: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models(kind)
    low, partly, high = three_budgets(path, backend, select)
    wanted = all_logits(path, backend, high, select, reselect=reselect)
    exact = exact_logits(path, backend)
    assert np.isfinite(wanted).all() and (wanted[:, -1] != exact[:, -1]).any(), "the selector selects nothing"
    for memory in (low, partly):
        got = all_logits(path, backend, memory, select, reselect=reselect)
        assert (got == wanted).all(), f"{select} differs at {memory} bytes"
    counts = inspect_model(path, mlx_flash.FlashConfig(backend=backend, select=select))["bundles"]
    module = sys.modules["mlx_flash.runtime.loading"]
    for capacities, staging in (((0, counts[1], 7), 3), ((counts[0], 1, counts[2] - 1), 1)):
        monkeypatch.setattr(
            module, "split_budget", lambda costs, size, c=capacities, s=staging: MemoryPlan(size, {}, c, s)
        )
        got = all_logits(path, backend, high, select, reselect=reselect)
        assert (got == wanted).all(), f"{select} differs with {capacities} slots"


def test_prompt_auto_is_the_fraction_that_fits(models: Models, backend: str) -> None:
    path = models("silu")
    _, partly, high = three_budgets(path, backend, "prompt:0.5")
    model = load(path, backend, partly, "prompt:auto")
    name, got = model.flash.plan.selector, np.array([reply(model, length) for length in PROMPTS])
    model.flash.stats.reset()
    assert (reply(model, 17) == got[1]).all()
    decoded = model.flash.stats
    model.flash.close()
    assert name.startswith("prompt:0.") and decoded.hit_rate > 0
    assert (all_logits(path, backend, high, name) == got).all()


@pytest.mark.parametrize(("kind", "select", "reselect"), LOSSY)
def test_a_prompt_is_exact(models: Models, backend: str, kind: str, select: str, reselect: int | None) -> None:
    path = models(kind, "float32")
    exact = exact_logits(path, backend)
    low = three_budgets(path, backend, select)[1]
    got = all_logits(path, backend, low, select, reselect=reselect)
    assert_same(got[:, 0], exact[:, 0], backend, f"{select}: a prompt lost something")
    assert (got[:, -1] != exact[:, -1]).any()


def test_a_predictor_that_names_everything_is_the_gate(models: Models, backend: str) -> None:
    path = models("relu", "float32", 1.0)
    gate, predictor = (all_logits(path, backend, "auto", select) for select in ("gate", "predictor"))
    assert_same(predictor, gate, backend)
    low = three_budgets(path, backend, "predictor")[0]
    assert (all_logits(path, backend, low, "predictor") == predictor).all()


@pytest.mark.parametrize("select", ["static:1", "prompt:1"])
@pytest.mark.parametrize("kind", ["relu", "silu", "opt"])
def test_all_of_them_are_all(models: Models, backend: str, kind: str, select: str) -> None:
    if kind == "opt" and backend == "mlx":
        pytest.skip("mlx-lm has no OPT")
    path = models(kind, "float32")
    got, wanted = all_logits(path, backend, "auto", select), exact_logits(path, backend)
    if kind == "silu" and select == "prompt:1":  # compensates for what was not selected, up to rounding
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    else:
        assert_same(got, wanted, backend)


@pytest.mark.parametrize("reselect", [None, 2])
@pytest.mark.parametrize("select", ["prompt:0.2", "threshold:0.5", "static:0.4"])
def test_a_second_reply_does_not_remember_the_first(
    models: Models, backend: str, select: str, reselect: int | None
) -> None:
    if reselect and not select.startswith("prompt"):
        pytest.skip("reselect goes with prompt")
    path = models("silu")
    budget = three_budgets(path, backend, select)[1]
    model = load(path, backend, budget, select, reselect=reselect)
    wanted = {length: reply(model, length) for length in (17, 3, 1)}
    for length in (3, 1, 17):
        model.flash.close()
        model = load(path, backend, budget, select, reselect=reselect)
        assert (reply(model, length) == wanted[length]).all()
    for stop in range(1, TOKENS):  # replies that are cut short
        left = model.flash.forced(model, *ids_of(257))
        for _ in range(stop):
            next(left)
        left.close()
        assert (reply(model, 17) == wanted[17]).all()
    model.flash.close()


def test_prompt_selects_by_the_prompt_and_reselect_selects_anew(models: Models, backend: str) -> None:
    path = models("silu")
    model = load(path, backend, "auto", "prompt:0.2")
    reply(model, 17)
    chosen = [s.ids for s in selectors(model)]
    reply(model, 3)
    assert any((s.ids != ids).any() for s, ids in zip(selectors(model), chosen, strict=True))
    assert all(len(s.ids) == max(1, round(0.2 * s.count)) for s in selectors(model))
    model.flash.close()
    often = all_logits(path, backend, "auto", "prompt:0.2", reselect=2)
    never = all_logits(path, backend, "auto", "prompt:0.2")
    assert (often[:, :2] == never[:, :2]).all(), "the first decoded token selects by the prompt alone"
    assert (often[:, 2:] != never[:, 2:]).any()
    # Every second decoded token is computed whole: with R = 1 all of them are.
    whole, exact = all_logits(path, backend, "auto", "prompt:0.2", reselect=1), exact_logits(path, backend)
    assert np.abs(whole - exact).max() <= 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("select", ["predictor", "prompt:0.3", "threshold:0.5"])
def test_known_tokens_may_be_fed_without_evaluating(models: Models, select: str) -> None:
    """MLX is lazy: rows of a token that is not computed yet must not be overwritten by the next one's reads."""
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import make_prompt_cache

    path = models("relu")
    model = load(path, "mlx", three_budgets(path, "mlx", select)[1], select)
    prompt, rest = ids_of(17, 12)

    def run(eager: bool) -> np.ndarray:
        cache, found = make_prompt_cache(model), []
        model.flash.begin_reply()
        with model.flash.phase(decoding=False):
            model(mx.array([prompt]), cache=cache)
        for token in rest:
            with model.flash.phase(decoding=True):
                found.append(model(mx.array([[token]]), cache=cache)[:, -1, :])
            if eager:
                mx.eval(found[-1])
        return np.array(mx.concatenate(found).astype(mx.float32))

    try:
        assert (run(eager=False) == run(eager=True)).all()
    finally:
        model.flash.close()


def test_mlx_lms_own_loop_selects_anew_for_a_new_prompt(models: Models) -> None:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    path = models("silu")

    def tokens(model: Any, length: int) -> list[int]:
        prompt = mx.array(ids_of(length)[0])
        return [int(token) for token, _ in generate_step(prompt, model, max_tokens=8)]

    model = load(path, "mlx", "auto", "prompt:0.2")
    first = tokens(model, 17)
    second = tokens(model, 23)
    assert tokens(model, 17) == first and tokens(model, 23) == second
    model.flash.close()
    model = load(path, "mlx", "auto", "prompt:0.2")
    reader = model.flash.shared.reader
    model.flash.shared.reader = FaultyReader(reader, 5)  # layers 0 and 1 have seen the prompt by then
    with pytest.raises(mlx_flash.ReadError):
        tokens(model, 257)
    model.flash.shared.reader = reader
    tokens(model, 23)
    selected = [s.energy.copy() for s in selectors(model)]
    model.flash.close()
    fresh = load(path, "mlx", "auto", "prompt:0.2")
    tokens(fresh, 23)
    for got, selector in zip(selected, selectors(fresh), strict=True):
        assert (got == selector.energy).all(), "a prompt that failed counts for the next one"
    fresh.flash.close()


# Faults


@pytest.mark.parametrize(
    ("kind", "select", "fields"),
    [
        ("relu", "predictor", {"look_ahead": "off"}),
        ("relu", "predictor", {"look_ahead": "on"}),
        ("relu", "gate", {"look_ahead": "on"}),
        ("silu", "prompt:0.4", {"reselect": 2}),
        ("silu-up", "threshold:0.5", {}),
    ],
)
def test_after_every_failed_read_the_model_is_as_good_as_new(
    models: Models,
    backend: str,
    kind: str,
    select: str,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = models(kind)
    counts = inspect_model(path, mlx_flash.FlashConfig(backend=backend))["bundles"]
    capacities = tuple(int(0.6 * count) for count in counts)
    module = sys.modules["mlx_flash.runtime.loading"]
    monkeypatch.setattr(module, "split_budget", lambda costs, size: MemoryPlan(size, {}, capacities, 2))
    fail_at = failed = 0
    guesses = fields.get("look_ahead") == "on"  # the last layer's are for no token
    model = load(path, backend, "auto", select, **fields)
    try:
        wanted = reply(model, 5, 3)
        reader = model.flash.shared.reader
        while True:
            fail_at += 1 if backend == "numpy" else 3
            for selector in selectors(model):  # every run makes the same reads
                selector.residency.reset()
                selector.loaded = False
            faulty = model.flash.shared.reader = FaultyReader(reader, fail_at)
            try:
                got = reply(model, 5, 3)
                assert faulty.submits < fail_at or guesses, f"read {fail_at} failed unnoticed"
                assert (got == wanted).all(), f"read {fail_at} failed unnoticed, and the logits are others"
            except mlx_flash.ReadError:
                failed += 1
            model.flash.shared.reader = reader
            check_after_fault(model)
            assert (reply(model, 5, 3) == wanted).all(), f"after read {fail_at} failed the logits are others"
            check_slots(model)
            if faulty.submits < fail_at:
                break
    finally:
        model.flash.close()
    assert failed > 3, "the run made almost no reads: this tested nothing"


def check_after_fault(model: Any) -> None:
    """What the next call will take for granted: the layer that was cut short has forgotten its slots by then."""
    unfinished = model.flash.shared.unfinished
    model.flash.shared.begin(unfinished or next(selectors(model)))
    model.flash.shared.end()
    check_slots(model)
    if unfinished is not None:
        assert unfinished.residency.num_used == 0


# Look-ahead


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
