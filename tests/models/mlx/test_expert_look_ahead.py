"""Look-ahead for experts on the mlx backend: the next layer's own router guesses, and no bit depends on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.errors import ReadError
from tests.tiny_experts import CONFIGS, config_of, make_model, save

mx = pytest.importorskip("mlx.core", reason="this is about the mlx backend")
pytest.importorskip("mlx_lm", reason="this is about the mlx backend")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_flash.models.mlx.routers import find_router  # noqa: E402
from mlx_flash.models.mlx.switch_layers import SWITCHES, expert_arrays  # noqa: E402
from mlx_flash.tools.trace_recording import record_ids  # noqa: E402
from tests.models.mlx.test_experts import assert_same, load, logits, prompt  # noqa: E402

COUNT, LAYERS = 16, 4
# Those whose router does more than a product of the experts' own input, or has outputs that are no experts.
UNFORESEEN = {"gemma4_text", "longcat_flash", "longcat_flash_ngram"}


@pytest.fixture(scope="module", params=[None, 32], ids=["fp32", "4-bit"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = config_of("qwen3_moe", num_experts=COUNT, num_hidden_layers=LAYERS)
    resident = make_model(config, request.param)
    return save(resident, config, tmp_path_factory.mktemp("ahead") / "model", request.param), resident


def choices(path: Path, share: float) -> dict[int, Iterator[np.ndarray]]:
    """Per layer, what every decoding step chooses."""
    model, chosen = load(path, share), defaultdict(list)
    record_ids(model.flash, lambda layer, ids: chosen[layer].append(ids))
    logits(model, 5, 8)
    model.flash.close()
    return {layer: iter(steps) for layer, steps in chosen.items()}


def logits_of(ids: np.ndarray) -> np.ndarray:
    """Logits by which a router would choose these experts."""
    found = np.zeros(COUNT, np.float32)
    found[ids] = 1
    return found


@pytest.mark.parametrize("kind", ["router", "right", "wrong", "random"])
@pytest.mark.parametrize("share", [2 / COUNT, 0.25, 0.5, 0.95, 1.0])
def test_no_bit_depends_on_what_is_guessed(both: tuple[Path, Any], share: float, kind: str) -> None:
    path, resident = both
    model = load(path, share, look_ahead="on")
    rng = np.random.default_rng(0)
    if kind in ("right", "wrong"):
        chosen = choices(path, share)

    def guess(layer: int, x: Any) -> np.ndarray:
        if kind == "random":
            return logits_of(rng.permutation(COUNT)[:2])
        right = next(chosen[layer])
        return logits_of(right if kind == "right" else np.setdiff1d(np.arange(COUNT), right)[:2])

    if model.flash.look_ahead is not None and kind != "router":
        for layer in range(1, LAYERS):
            model.flash.look_ahead.add_router(layer, partial(guess, layer))
    assert_same(logits(model, 5, 8), logits(resident, 5, 8), f"{kind} {share}")
    stats = model.flash.stats
    assert bool(stats.guessed) == (0.25 <= share < 1) == (model.flash.plan.look_ahead == "on")
    if kind == "right":
        assert stats.guessed_right == stats.guessed
    model.flash.close()


def test_a_failed_read_or_an_interrupt_or_a_dropped_reply_leaves_the_model_right(both: tuple[Path, Any]) -> None:
    path, resident = both
    model = load(path, 0.5, look_ahead="on")
    shared, expected = model.flash.shared, logits(resident, 5, 6)
    reader, real, reads = shared.reader, shared.reader.submit, 0
    for error in (ReadError("the disk failed"), KeyboardInterrupt()):
        for fail_at in (3, 12, 14, 15, 16, 17, 18, 19, 20, 21):

            def submit(*request: Any, fail_at: int = fail_at, error: BaseException = error) -> Any:
                nonlocal reads
                reads += 1
                if reads == fail_at:
                    raise error
                return real(*request)

            reader.submit = submit  # type: ignore[method-assign]
            for selector in selectors(model):
                selector.forget()
            reads = 0
            with pytest.raises(type(error)):
                logits(model, 5, 6)
            assert_same(logits(model, 5, 6), expected, f"{error!r} {fail_at}")
    reader.submit = real  # type: ignore[method-assign]
    cache = make_prompt_cache(model)
    model(prompt(5), cache=cache)
    for seed in (1, 2):
        model(prompt(1, seed), cache=cache)  # is dropped before it has been computed
    assert_same(logits(model, 5, 6), expected, "after a reply that was dropped")
    assert shared.stats.guessed
    model.flash.close()


def selectors(model: Any) -> list[Any]:
    modules = dict(model.named_modules())
    return [modules[path]._run.selector for path in model.flash.plan.checkpoint.experts.paths]


def test_auto_times_itself_and_off_guesses_nothing(both: tuple[Path, Any]) -> None:
    path, resident = both
    expected = logits(resident, 5, 8)
    model = load(path, 0.5, look_ahead="auto")
    trial, seen = model.flash.look_ahead.trial, []
    trial.token = lambda seconds: seen.append(seconds)
    assert_same(logits(model, 5, 8), expected, "auto")
    assert len(seen) == 8 and min(seen) > 0 and model.flash.stats.guessed
    guessed, trial.on = model.flash.stats.guessed, False
    assert_same(logits(model, 5, 8), expected, "auto, turned off")
    assert model.flash.stats.guessed == guessed and len(seen) == 16
    model.flash.close()
    model = load(path, 0.5, look_ahead="off")
    assert_same(logits(model, 5, 8), expected, "off")
    assert not model.flash.stats.guessed and model.flash.look_ahead is None
    model.flash.close()


def test_a_router_applied_to_its_own_layer_names_what_that_layer_chooses(both: tuple[Path, Any]) -> None:
    path, resident = both
    model, seen = load(path, 0.5), []
    for layer, path_ in enumerate(model.flash.plan.checkpoint.experts.paths):
        run = dict(model.named_modules())[path_]._run

        def watched(x: Any, indices: Any, layer: int = layer, run: Any = run) -> Any:
            logits = model.flash.plan.checkpoint.experts.routers[layer](x)
            named = mx.argpartition(-logits, 1, axis=-1)[..., :2]
            seen.append((np.sort(np.array(named)), np.sort(np.array(indices))))
            return run(x, indices)

        dict(model.named_modules())[path_]._run = watched
    model(prompt(30))
    assert len(seen) == LAYERS
    for named, chosen in seen:
        np.testing.assert_array_equal(named, chosen)
    model.flash.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_which_routers_are_found(name: str) -> None:
    model = make_model(config_of(name))
    for path, module in model.named_modules():
        if type(module) in SWITCHES:
            count, *_ = next(iter(expert_arrays(module).values())).shape
            assert (find_router(model, path, count, 64) is None) == (name in UNFORESEEN), path
            assert find_router(model, path, count + 1, 64) is None
