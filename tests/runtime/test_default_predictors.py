"""The shipped calibration of the default model: what its predictors promise, on held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlx_flash
from mlx_flash.runtime.model_path import resolve_model
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.perplexity import measure, windows_of_files
from tests.conftest import shared_path


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model(None)


def test_predictors_are_small_and_good_enough(model: Path) -> None:
    loaded, _ = mlx_flash.load(model, backend="numpy", select="predictor")
    calibration = loaded.flash.plan.calibration
    loaded.flash.close()
    assert calibration.summary["recall"] >= 0.97
    assert calibration.summary["predictor_share"] <= 0.05
    loss = inspect_model(model, mlx_flash.FlashConfig(backend="numpy", select="predictor"))["measured_loss"]
    assert loss["loss"] < 0.01 and loss["tokens"] >= 1024


def test_a_third_of_the_ffn_is_enough(model: Path) -> None:
    """With at most 35 % of the FFN resident a token reads at most 6 % of it, and little is lost."""
    held = sorted(shared_path("data/stories/held").glob("*.txt"))
    found = {}
    for select, memory in (("all", "auto"), ("predictor", 18_156_432)):
        loaded, tokenizer = mlx_flash.load(
            model, backend="numpy", select=select, memory=memory, max_context=385, look_ahead="off"
        )
        windows, _ = windows_of_files(tokenizer, held, 385, 256)
        found[select] = measure(loaded, windows)
        loaded.flash.close()
    predictor = found["predictor"]
    assert predictor["ffn_resident_bytes"] <= 0.35 * predictor["ffn_bytes"]
    assert predictor["bytes_read_per_token"] <= 0.06 * predictor["ffn_bytes"]
    assert predictor["nats_per_token"] - found["all"]["nats_per_token"] < 0.01
