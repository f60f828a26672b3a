"""Gated FFNs with biases, which stay in memory: the same numbers wherever neurons are, quantised or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlx_flash
from mlx_flash.errors import ConfigError, UsageError
from mlx_flash.tools.calibration.calibrator import calibrate
from tests import tiny
from tests.models.conversion.test_quantised import by_mlx_lm, logits, mlx_lm_logits

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

LLAMA = tiny.CONFIGS["llama"] | {"intermediate_size": 640, "mlp_bias": True}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A llama of random weights and biases."""
    folder = tiny.make_tiny("llama-biases", tmp_path, LLAMA)
    rng, tensors = np.random.default_rng(6), load_file(folder / "model.safetensors")
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == 3 * LLAMA["num_hidden_layers"]
    tensors |= {name: rng.standard_normal(tensors[name].shape).astype(np.float32) for name in biases}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() <= 2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", ["mlx", "numpy"])
def test_plain(backend: str, source: Path, tmp_path: Path) -> None:
    path = mlx_flash.convert(source, tmp_path / "flash")
    found = [logits(path, backend, "all", slots=slots) for slots in (0.0, 0.4, 1.0)]
    assert all(np.array_equal(found[0], each) for each in found[1:])
    assert close(found[0], mlx_lm_logits(source))


@pytest.mark.parametrize("backend", ["mlx", "numpy"])
def test_quantised_by_mlx_lm(backend: str, source: Path, tmp_path: Path) -> None:
    quantised = by_mlx_lm(source, tmp_path / "quantised", 8, 64, "float32")
    path = mlx_flash.convert(quantised, tmp_path / "flash")
    found = [logits(path, backend, "all", slots=slots) for slots in (0.0, 0.4, 1.0)]
    assert all(np.array_equal(found[0], each) for each in found[1:])
    assert close(found[0], mlx_lm_logits(quantised))


def test_quantised_by_neuron(source: Path, tmp_path: Path) -> None:
    path = mlx_flash.convert(source, tmp_path / "flash", quantize=True, q_bits=8)
    found = {b: [logits(path, b, "all", slots=slots) for slots in (0.0, 0.4, 1.0)] for b in ("mlx", "numpy")}
    for some in found.values():
        assert all(np.array_equal(some[0], each) for each in some[1:])
    assert close(found["numpy"][0], found["mlx"][0])


@pytest.mark.parametrize("backend", ["mlx", "numpy"])
def test_a_lossy_selector_that_takes_everything(backend: str, source: Path, tmp_path: Path) -> None:
    path = mlx_flash.convert(source, tmp_path / "flash")
    assert close(logits(path, backend, "prompt:1.0"), mlx_lm_logits(source))


def test_no_calibration(source: Path, tmp_path: Path) -> None:
    path, text = mlx_flash.convert(source, tmp_path / "flash"), tmp_path / "text"
    text.write_text("one two three " * 400)
    with pytest.raises(UsageError, match="gated FFNs without biases"):
        calibrate(path, [str(text)], backend="numpy")


def test_a_config_that_says_otherwise(tmp_path: Path) -> None:
    from tests.models.specs.test_dense_families import make

    source = make("granite", tmp_path, mlp_bias=True)
    config = source / "config.json"
    config.write_text(config.read_text().replace('"mlp_bias": true', '"mlp_bias": false'))
    with pytest.raises(ConfigError, match="'mlp_bias' is false, but .*have gate_proj, up_proj, down_proj biases"):
        mlx_flash.convert(source, tmp_path / "flash")
