"""Calibrating tiny models: texts for it, settings that make it quick, and what it left in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.storage.calibration import Calibration, load_calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint, verify
from mlx_flash.tools.calibration import calibrator, predictor_fit

TOKENS = 600


def make_text(path: Path, characters: int, seed: int = 0) -> Path:
    """Words over a few letters: every one a byte, so a token of the tiny models."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(1, 8))) for _ in range(60)]
    text = " ".join(words[int(i)] for i in rng.zipf(1.3, characters) % 60)
    path.write_text(text[:characters])
    return path


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """What a real model needs takes too long here."""
    patch.setattr(calibrator, "MIN_TOKENS", 400)
    patch.setattr(calibrator, "SCORED_TOKENS", 6)
    patch.setattr(predictor_fit, "LEAST_TOKENS", 200)
    patch.setattr(predictor_fit, "LEAST_STEPS", 8)


def run(path: Path, text: Path, **options: Any) -> dict[str, Any]:
    options = {"tokens": TOKENS, "loss_windows": 1, "backend": "numpy"} | options
    return calibrator.calibrate(path, [text], **options)


def stored(path: Path) -> Calibration:
    found = load_calibration(Checkpoint.open(path))
    assert found is not None
    return found


def calibration_files(path: Path) -> list[Path]:
    return sorted(p for p in (path / "flash").iterdir() if "calibra" in p.name)


def logits(path: Path, select: str, **fields: Any) -> np.ndarray:
    model, _ = mlx_flash.load(path, backend="numpy", select=select, **fields)
    try:
        return np.array(list(model.flash.forced(model, list(b"some words"), list(b"more"))))
    finally:
        model.flash.close()


def same(path: Path, wanted: Path) -> None:
    got, right = calibration_files(path), calibration_files(wanted)
    assert [p.name for p in got] == [p.name for p in right], "something is left behind, or other bytes were written"
    assert got[0].read_bytes() == right[0].read_bytes()
    verify(path)
