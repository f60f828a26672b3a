"""Selectors that lose quality lose nothing else: the same logits at every budget, exact prompts, no memory of the last
reply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.storage.readers import FaultyReader
from mlx_flash.tools.inspection import inspect_model
from tests.calibrated import selectors
from tests.runtime.lossy_models import (
    PROMPTS,
    TOKENS,
    Models,
    all_logits,
    assert_same,
    exact_logits,
    ids_of,
    load,
    logits_of,
    reply,
)
from tests.runtime.plans import load_split
from tests.tiny import three_budgets

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


@pytest.mark.parametrize(("kind", "select", "reselect"), LOSSY)
def test_logits_are_identical_at_every_budget(
    models: Models, backend: str, kind: str, select: str, reselect: int | None
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
    for capacities, staging in (((0, counts[1], 7), 3), ((counts[0], 1, counts[2] - 1), 1)):
        got = logits_of(load_split(path, capacities, staging, backend=backend, select=select, reselect=reselect))
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
        model.flash.shared.begin_reply()
        with model.flash.shared.phase(decoding=False):
            model(mx.array([prompt]), cache=cache)
        for token in rest:
            with model.flash.shared.phase(decoding=True):
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
