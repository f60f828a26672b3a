"""Tiny models and texts to calibrate, and one model that is calibrated without an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import mlx_flash
from tests.tiny import make_tiny
from tests.tools.calibration.small_calibration import (
    make_quick,
    make_text,
    run,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="session")
def text(folder: Path) -> Path:
    return make_text(folder / "text.txt", 1500)


@pytest.fixture(scope="session")
def relu(folder: Path) -> Path:
    return mlx_flash.convert(make_tiny("llama-relu", folder), folder / "relu", dtype="bfloat16")


@pytest.fixture(scope="session")
def silu(folder: Path) -> Path:
    return mlx_flash.convert(make_tiny("openelm", folder), folder / "silu", dtype="bfloat16")


@pytest.fixture(scope="session")
def uninterrupted(relu: Path, text: Path, folder: Path) -> Path:
    """The ReLU model, calibrated in one go."""
    path = shutil.copytree(relu, folder / "uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        run(path, text)
    return path
