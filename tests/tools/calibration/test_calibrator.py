"""`mlx_flash calibrate` end to end on tiny models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.storage import calibration as calibration_file
from mlx_flash.engine.storage.calibration import load_calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint, verify
from mlx_flash.tools.calibration import calibrator, predictor_training
from mlx_flash.tools.calibration.neuron_statistics import SPARSITIES
from tests.tiny import make_tiny
from tests.tools.calibration.small_calibration import (
    TOKENS,
    calibration_files,
    logits,
    run,
    same,
    stored,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_a_relu_model_gets_statistics_predictors_and_losses(uninterrupted: Path) -> None:
    path, found = uninterrupted, stored(uninterrupted)
    assert verify(path) > 0
    assert [p.name for p in calibration_files(path)] == [
        Path(Checkpoint.open(path).config["flash"]["calibration"]).name
    ]
    summary = found.summary
    assert summary["lead"] in ("gate", "up") and summary["sparsities"] == list(SPARSITIES)
    assert summary["tokens"] == TOKENS // 512 * 512 + 512  # whole windows
    assert set(summary["losses"]) == set(calibrator.LOSSY)
    assert all(loss["tokens"] == 6 for loss in summary["losses"].values())
    for layer in found.layers:
        assert 0.2 < layer.rate.mean() < 0.8 and layer.figures["zeros"] == pytest.approx(
            1 - layer.rate.mean(), abs=1e-6
        )
        assert len(layer.curve) > 3 and (np.diff(layer.curve[:, 0]) >= 0).all() and (layer.energy >= 0).all()
    weights = Checkpoint.open(path)
    dense = sum(info.nbytes for _, info in weights.resident_tensors().values())
    everything = dense + sum(layout.count * layout.bundle_bytes for layout in weights.layouts)
    size = sum(layer.predictor_bytes for layer in found.layers)
    assert size == summary["predictor_bytes"] and size <= 0.05 * everything
    assert summary["predictor_share"] == pytest.approx(size / everything)
    assert summary["recall"] >= 0.97
    exact = logits(path, "all")
    for select in ("predictor", "threshold:0.5", "static:0.5", "prompt:0.5"):
        assert np.isfinite(logits(path, select)).all()
    assert (logits(path, "gate", memory="auto") == exact).mean() > 0.99


def test_predictors_stay_within_five_percent_where_they_would_like_more(
    relu: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    limit: list[int] = []
    choose = predictor_training.choose_ranks

    def watched(*args: Any, budget_bytes: int, **options: Any) -> Any:
        limit.append(budget_bytes)
        return choose(*args, budget_bytes=budget_bytes, **options)

    monkeypatch.setattr(predictor_training, "choose_ranks", watched)
    found = run(path, text, loss_windows=0)
    steps = 4 * len(found["layers"])  # beside a, b and the bias there is a step per layer
    assert limit[0] + steps <= 0.05 * found["predictor_bytes"] / found["predictor_share"]
    assert "losses" not in found


def test_a_silu_model_gets_no_predictors(silu: Path, text: Path, tmp_path: Path) -> None:
    path = shutil.copytree(silu, tmp_path / "copy")
    run(path, text)
    found = stored(path)
    verify(path)
    assert not found.has_predictors and "recall" not in found.summary
    assert set(found.summary["losses"]) == {"threshold:0.5", "prompt:0.5", "static:0.5"}
    assert all((layer.rate == 1).all() and layer.curve.shape == (0, 2) for layer in found.layers)
    dropped = [np.abs(logits(path, f"threshold:{s}") - logits(path, "all")).max() for s in (0.1, 0.9)]
    assert 0 < dropped[0] < dropped[1]
    with pytest.raises(mlx_flash.UsageError, match=r"cut-offs are calibrated from 0\.05 to 0\.95"):
        logits(path, "threshold:0.99")
    with pytest.raises(mlx_flash.UsageError, match="needs a ReLU model.*relufy"):
        logits(path, "predictor")


@pytest.mark.parametrize("lead", ["gate", "up"])
def test_threshold_drops_the_share_it_is_told(silu: Path, text: Path, tmp_path: Path, lead: str) -> None:
    from mlx_flash.tools.perplexity import measure_perplexity

    path = shutil.copytree(silu, tmp_path / "copy")
    run(path, text, loss_windows=0)
    found = stored(path)
    calibration_file.attach(Checkpoint.open(path), replace(found, summary={**found.summary, "lead": lead}))
    neurons = sum(len(layer.rate) for layer in found.layers)
    for share in (0.3, 0.72):
        config = mlx_flash.FlashConfig(backend="numpy", select=f"threshold:{share}")
        asked = measure_perplexity(path, [text], config, tokens=256)["bundles_per_token"]
        assert asked / neurons == pytest.approx(1 - share, abs=0.05)


def test_a_model_without_gates_is_calibrated_too(text: Path, tmp_path: Path) -> None:
    path = mlx_flash.convert(make_tiny("opt", tmp_path), tmp_path / "flash")
    run(path, text)
    found = stored(path)
    assert found.has_predictors and "lead" not in found.summary
    assert set(found.summary["losses"]) == {"predictor", "prompt:0.5", "static:0.5"}
    with pytest.raises(mlx_flash.UsageError, match="gated"):
        logits(path, "threshold:0.5")


def test_both_backends_learn_much_the_same(relu: Path, text: Path, tmp_path: Path, uninterrupted: Path) -> None:
    pytest.importorskip("mlx_lm")
    path = shutil.copytree(relu, tmp_path / "copy")
    run(path, text, backend="mlx", loss_windows=0)
    for got, wanted in zip(stored(path).layers, stored(uninterrupted).layers, strict=True):
        np.testing.assert_allclose(got.rate, wanted.rate, atol=0.02)
        np.testing.assert_allclose(got.energy, wanted.energy, rtol=0.1, atol=0.02 * wanted.energy.max())


def test_a_budget_that_only_all_fits_still_ends_well(relu: Path, text: Path, tmp_path: Path) -> None:
    """Losses are measured within the budget given; a selector that needs more is left out, nothing is lost."""
    from mlx_flash.tools.inspection import inspect_model

    path = shutil.copytree(relu, tmp_path / "copy")
    config = mlx_flash.FlashConfig(backend="numpy", select="all", max_context=512)
    smallest = inspect_model(path, config)["smallest_budget_bytes"]
    run(path, text, memory=smallest)
    assert "predictor" not in stored(path).summary["losses"]
    verify(path)


def test_convert_takes_a_shipped_calibration_along(
    uninterrupted: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(folder / "llama-relu", tmp_path / "hf")
    shutil.copyfile(calibration_files(uninterrupted)[0], source / calibration_file.SHIPPED)
    out = mlx_flash.convert(source, tmp_path / "same", dtype="bfloat16")
    same(out, uninterrupted)
    assert "left out" not in capsys.readouterr().err
    assert (logits(out, "predictor") == logits(uninterrupted, "predictor")).all()
    other = mlx_flash.convert(source, tmp_path / "other", dtype="float16")  # other bits, so not its weights
    assert "left out" in capsys.readouterr().err
    assert load_calibration(Checkpoint.open(other)) is None and not calibration_files(other)
    verify(other)
    (source / calibration_file.SHIPPED).write_bytes(b"no such thing")
    broken = mlx_flash.convert(source, tmp_path / "broken", dtype="bfloat16")
    assert "left out" in capsys.readouterr().err and not calibration_files(broken)
