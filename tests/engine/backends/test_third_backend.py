"""The seam: a third backend, written here, runs a model without a change to any file of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime import backends
from tests.tiny import make_tiny


class CountingBackend(NumpyBackend):
    """Arithmetic in float64 over whole rows, nothing clever, and a count of the passes that it began."""

    name = "counting"
    passes = 0

    def linear(self, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        y = x.astype(np.float64) @ self.to_float32(w).T.astype(np.float64)
        return (y if bias is None else y + self.to_float32(bias)).astype(np.float32)

    def ffn(self, spec, x):
        CountingBackend.passes += 1
        return super().ffn(spec, x)


@pytest.fixture
def third_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_ENTRIES", dict(backends._ENTRIES))
    entry = backends.Entry(CountingBackend, "mlx_flash.models.numpy.decoder", "numpy", lambda: True)
    backends.register("counting", entry)


def test_it_runs_by_its_name(third_backend: None, tmp_path: Path) -> None:
    path = mlx_flash.convert(make_tiny("openelm-relu", tmp_path), tmp_path / "flash")
    tokens = {}
    for name in ("numpy", "counting"):
        model, _ = mlx_flash.load(path, backend=name, memory="40MB")
        tokens[name] = list(model.flash.steps(model, [1, 2, 3], 20, Sampling()))
        model.flash.close()
    assert tokens["counting"] == tokens["numpy"]
    assert CountingBackend.passes > 0


def test_names_are_taken_once(third_backend: None) -> None:
    with pytest.raises(ValueError, match="exists"):
        backends.register("numpy", backends._ENTRIES["numpy"])


def test_unknown_backends_and_families_are_named(tmp_path: Path) -> None:
    with pytest.raises(mlx_flash.BackendError, match="unknown backend 'cuda'; known: auto, mlx, numpy"):
        backends.choose("cuda", ("numpy",))
    with pytest.raises(mlx_flash.BackendError, match="runs on numpy only, not on mlx"):
        backends.choose("mlx", ("numpy",))
