"""The seam: a third backend, written in the tests, runs models by its name without a change to any file of the package.

It shares no arithmetic with the numpy backend, whose greedy tokens it must give at every budget.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.backends.base import Backend, FFNPass, Slab
from mlx_flash.engine.backends.decoder_base import DecoderBackend, ExpertBackend
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.models.numpy import decoder
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime import backends
from tests.calibrated import make_calibrated
from tests.engine.backends.third_backend import ThirdBackend, ThirdPass, ThirdSlab
from tests.tiny import make_tiny, three_budgets

PROMPT, STEPS = [1, 2, 3], 16


@pytest.fixture
def third_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_ENTRIES", dict(backends._ENTRIES))
    entry = backends.Entry(ThirdBackend, lambda: decoder, "numpy", lambda: True)
    backends.register("third", entry)


def run(path: Path, backend: str, **fields: Any) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits when these are forced."""
    model, _ = mlx_flash.load(path, backend=backend, **fields)
    try:
        tokens = list(model.flash.steps(model, PROMPT, STEPS, Sampling()))
        logits = np.array([each.copy() for each in model.flash.forced(model, PROMPT, tokens)])
    finally:
        model.flash.close()
    return tokens, logits


@pytest.mark.parametrize(
    ("name", "select"), [("openelm-relu", "gate"), ("llama", "all"), ("opt", "gate"), ("mistral", "prompt:0.5")]
)
def test_it_gives_the_numpy_backends_tokens_at_every_budget(
    name: str, select: str, third_backend: None, tmp_path: Path
) -> None:
    path = mlx_flash.convert(make_tiny(name, tmp_path), tmp_path / "flash", dtype="float32")
    wanted, right = run(path, "numpy", select=select)
    found = [run(path, "third", select=select, memory=memory) for memory in three_budgets(path, "third", select)]
    for tokens, logits in found:
        assert tokens == wanted
        np.testing.assert_allclose(logits, right, rtol=1e-4, atol=1e-4)
        assert (logits == found[0][1]).all()  # its own bits depend on no budget


@pytest.mark.parametrize("select", ["predictor", "threshold:0.5"])
def test_it_runs_with_what_a_calibration_learnt(select: str, third_backend: None, tmp_path: Path) -> None:
    path = make_calibrated("llama-relu", tmp_path, dtype="float32")
    assert run(path, "third", select=select)[0] == run(path, "numpy", select=select)[0]


def methods(protocol: type) -> Iterator[tuple[str, Any]]:
    return ((name, each) for name, each in inspect.getmembers(protocol, inspect.isfunction) if name[0] != "_")


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [
        (DecoderBackend, ThirdBackend),
        (ExpertBackend, NumpyBackend),
        (Backend, "MlxBackend"),
        (FFNPass, ThirdPass),
        (Slab, ThirdSlab),
    ],
)
def test_a_backend_has_every_method_with_the_protocols_parameters(protocol: type, kind: Any) -> None:
    if kind == "MlxBackend":
        kind = pytest.importorskip("mlx_flash.engine.backends.mlx.backend").MlxBackend
    for name, method in methods(protocol):
        wanted = [(each.name, each.default) for each in inspect.signature(method).parameters.values()]
        found = inspect.signature(getattr(kind, name)).parameters.values()
        assert [(each.name, each.default) for each in found] == wanted, name


def test_names_are_taken_once(third_backend: None) -> None:
    with pytest.raises(ValueError, match="exists"):
        backends.register("numpy", backends._ENTRIES["numpy"])


def test_unknown_backends_and_families_are_named(tmp_path: Path) -> None:
    with pytest.raises(mlx_flash.BackendError, match="unknown backend 'cuda'; known: auto, mlx, numpy"):
        backends.choose("cuda", ("numpy",))
    with pytest.raises(mlx_flash.BackendError, match="runs on numpy only, not on mlx"):
        backends.choose("mlx", ("numpy",))
