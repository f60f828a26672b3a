"""A mixture of experts is opened and planned once; the plan that was made is the one that runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.config import FlashConfig
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.models.numpy import decoder
from mlx_flash.models.numpy import experts as numpy_experts
from mlx_flash.models.specs import source
from mlx_flash.runtime import backends
from mlx_flash.runtime.loading import load_model
from mlx_flash.runtime.planning.planner import plan_model
from mlx_flash.tools.inspection import inspect_plan

pytest.importorskip("mlx_lm", reason="mlx-lm makes the tiny mixtures")
from tests.tiny_experts import config_of, make_model, save  # noqa: E402


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of("qwen3_moe")
    return save(make_model(config), config, tmp_path_factory.mktemp("mixture") / "model")


class CountingCode:
    """numpy's code for mixtures of experts, which counts how often it opens a folder."""

    opened = 0

    def open_experts(
        self, folder: Path, tensors: Any, config: Mapping[str, Any], backend: NumpyBackend
    ) -> numpy_experts.ExpertDecoder:
        self.opened += 1
        return numpy_experts.open_experts(folder, tensors, config, backend)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> CountingCode:
    """Used by the backend "counting"."""
    code = CountingCode()
    monkeypatch.setattr(backends, "_ENTRIES", dict(backends._ENTRIES))
    entry = backends.Entry(NumpyBackend, lambda: decoder, "numpy", lambda: False, lambda: code)
    backends.register("counting", entry)
    return code


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each file was read."""
    read, counts = source.read_header, Counter[str]()
    monkeypatch.setattr(source, "read_header", lambda path: counts.update([Path(path).name]) or read(path))
    return counts


def logits(model: Any) -> np.ndarray:
    return np.array([each.copy() for each in model.flash.forced(model, [5, 6, 7, 8], [9, 10])])


def test_a_mixture_is_opened_and_planned_once(mixture: Path, code: CountingCode, headers: Counter[str]) -> None:
    plan = plan_model(mixture, FlashConfig(backend="counting", slots=0.3, memory="1GB"))
    assert inspect_plan(plan)["fits"]
    model = load_model(plan)
    assert model.flash.plan is plan
    assert np.isfinite(logits(model)).all() and model.flash.stats.bytes_read > 0
    model.flash.close()
    assert code.opened == 1 and headers == {"model.safetensors": 1}


def test_a_second_run_of_a_plan_is_like_the_first(mixture: Path, code: CountingCode, headers: Counter[str]) -> None:
    plan = plan_model(mixture, FlashConfig(backend="counting", slots=0.3, memory="1GB"))
    first, second = load_model(plan), load_model(plan)
    assert (logits(first) == logits(second)).all()
    for model in (first, second):
        model.flash.close()
    assert code.opened == 2 and headers == {"model.safetensors": 1}


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_a_plan_runs_on_another_thread_and_twice(mixture: Path, backend: str) -> None:
    """As a server does it: MLX's arrays belong to the thread that opened the files."""
    plan = plan_model(mixture, FlashConfig(backend=backend, slots=0.3, memory="1GB"))
    found: list[np.ndarray] = []

    def run() -> None:
        model = load_model(plan)
        found.append(logits(model))
        model.flash.close()

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert len(found) == 3 and (found[0] == found[1]).all() and (found[0] == found[2]).all()
