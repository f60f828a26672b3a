"""Quantised checkpoints that are refused: by name, before anything is written, and never with advice that is refused
as well. Mixtures of experts in any of MLX's formats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import BackendError, ConfigError, UsageError
from tests import tiny
from tests.models.conversion.test_quantised import LLAMA
from tests.models.mlx.test_experts import assert_same
from tests.models.mlx.test_experts import load as load_mixture
from tests.models.mlx.test_experts import logits as mixture_logits
from tests.models.specs.test_dense_families import GPTS
from tests.models.specs.test_dense_families import make as make_dense
from tests.tiny import make_tiny
from tests.tiny_experts import config_of, make_model, save

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn  # noqa: E402
from mlx_lm.convert import convert as mlx_lm_convert  # noqa: E402


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits in 32s, down_proj 6 bits."""
    folder = tmp_path_factory.mktemp("mlx-lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.CONFIGS, "llama-640", LLAMA)
        source = make_tiny("llama-640", folder)

    def rule(path: str, module: Any) -> Any:
        return {"group_size": 32, "bits": 6} if path.endswith("down_proj") else hasattr(module, "to_quantized")

    mlx_lm_convert(str(source), str(folder / "q"), True, 32, 4, quant_predicate=rule, dtype="bfloat16")
    return folder / "q"


def changed(folder: Path, out: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy whose tensors and config were edited."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors, config = mx.load(str(out / "model.safetensors")), json.loads((out / "config.json").read_text())
    edit(tensors, config)
    mx.save_safetensors(str(out / "model.safetensors"), tensors, {"format": "mlx"})
    (out / "config.json").write_text(json.dumps(config))
    return out


DOWN = "model.layers.1.mlp.down_proj"


def entry(name: str, value: Any) -> Callable[..., None]:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["quantization"][name] = value

    return edit


def other_method(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    del config["quantization"]
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


REFUSED: list[tuple[Callable[..., None], str]] = [
    (entry(DOWN, {"bits": 5, "group_size": 32}), f"'{DOWN}' has 5 bits in groups of 32 .*codes U32 .*of a matrix"),
    (entry(DOWN, {"bits": 6, "group_size": 64}), f"'{DOWN}' has 6 bits in groups of 64"),
    (entry(DOWN, {"bits": 6}), f"'{DOWN}' has 6 bits in groups of 64"),  # as mlx-lm reads it
    (entry(DOWN, {"bits": 7, "group_size": 32}), "7 bits are not known; MLX has 1, 2, 3"),
    (entry(DOWN, {"bits": 6, "group_size": 48}), "groups of 48 are not known"),
    (entry(DOWN, {"bits": 6, "group_size": "32"}), "groups of 32 are not known"),
    (entry(DOWN, [6, 32]), "neither true, false nor an object"),
    (entry(DOWN, False), f"'{DOWN}' is not quantised, but it has scales"),
    (entry("model.layers.9.mlp.down_proj", {"bits": 6, "group_size": 32}), "layers.9.* has no weights"),
    (entry("model.norm", {"bits": 6, "group_size": 32}), "'model.norm', whose weights are stored as they are"),
    (lambda tensors, _: tensors.pop(f"{DOWN}.biases"), "lacks 1 of the tensors of .*down_proj.biases"),
    (other_method, "quantised by FP8 with block scales, which is not read; use the original"),
]


@pytest.mark.parametrize(("edit", "match"), REFUSED)
def test_refused_before_anything_is_written(
    edit: Callable[..., None], match: str, quantised: Path, tmp_path: Path
) -> None:
    folder = changed(quantised, tmp_path / "in", edit)
    for options in ({}, {"quantize": True, "requantize": True, "q_group_size": 32}):
        with pytest.raises((ConfigError, UsageError)) as error:
            mlx_flash.convert(folder, tmp_path / "out", **options)
        if options == {} or "quantised by" not in match:  # without MLX's object there is nothing to requantise
            assert re.search(match, str(error.value)), error.value
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("tag", ["F8_E4M3", "F8_E5M2"])
def test_an_8_bit_float_hidden_in_a_checkpoint(tag: str, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "model.layers.1.mlp.up_proj.weight"
    begin, end = header[name]["data_offsets"]
    rows, columns = header[name]["shape"]
    header[name] |= {"dtype": tag, "shape": [rows, columns * (end - begin) // (rows * columns)]}
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ConfigError, match=f"1 tensors are floats of 8 bits.*{name}' .{tag}.*original checkpoint"):
        mlx_flash.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_advised_is_not_refused(quantised: Path, tmp_path: Path) -> None:
    """Every command that a refusal names runs."""
    path = mlx_flash.convert(quantised, tmp_path / "mixed")
    with pytest.raises(BackendError) as error:
        mlx_flash.load(path, backend="numpy")
    assert "down_proj is of 6 bits" in str(error.value) and "family" not in str(error.value)
    assert re.findall(r"--\S+ \S+", str(error.value)) == ["--backend mlx,", "--requantize -q"]
    mlx_flash.load(path, backend="mlx")[0].flash.close()
    with pytest.raises(UsageError, match="quantised already, to 4 bits in groups of 32.*--requantize"):
        mlx_flash.convert(quantised, tmp_path / "again", quantize=True)
    again = mlx_flash.convert(quantised, tmp_path / "again", quantize=True, requantize=True)
    mlx_flash.load(again, backend="numpy")[0].flash.close()


def test_numpy_alone_names_what_it_cannot_compute(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_flash.runtime import backends

    def missing() -> Any:
        raise BackendError("the mlx backend needs mlx and mlx-lm (none); pip install it, or use --backend numpy")

    path = mlx_flash.convert(quantised, tmp_path / "mixed")
    mlx = backends._ENTRIES["mlx"]
    monkeypatch.setitem(backends._ENTRIES, "mlx", replace(mlx, make=missing, preferred=lambda: False))
    with pytest.raises(BackendError) as error:
        mlx_flash.load(path)
    assert "needs mlx and mlx-lm" in str(error.value) and "use --backend numpy" not in str(error.value)
    assert "down_proj is of 6 bits" in str(error.value)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "starcoder2", "gpt_neox", "internlm2", "exaone4", "nemotron"])
def test_families_of_mlx_alone(name: str, tmp_path: Path) -> None:
    """Fused, plain and biased FFNs."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    assert name not in GPTS
    width = 128 if name == "gpt_neox" else 320  # mlx-lm's GPT-NeoX has four times the model's, whatever the config says
    mlx_lm_convert(str(make_dense(name, tmp_path, intermediate_size=width)), str(tmp_path / "q"), True, 32, 6)
    plain, _ = load_model(tmp_path / "q")
    cache, ids = make_prompt_cache(plain), [3, 5, 7, 9, 11]
    plain(mx.array([ids[:3]]), cache=cache)
    wanted = [np.array(plain(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)) for token in ids[3:]]
    path = mlx_flash.convert(tmp_path / "q", tmp_path / "flash")
    for share in (0, 0.5, 1):
        model, _ = mlx_flash.load(path, backend="mlx", slots=share)
        assert np.array_equal(list(model.flash.forced(model, ids[:4], ids[4:])), wanted)
        model.flash.close()


FORMATS = [
    (3, 32, "affine"),
    (5, 32, "affine"),
    (6, 32, "affine"),
    (4, 16, "nvfp4"),
    (4, 32, "mxfp4"),
    (8, 32, "mxfp8"),
]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_mixtures_of_any_format(name: str, form: tuple[int, int, str], tmp_path: Path) -> None:
    bits, size, mode = form
    config, resident = config_of(name), make_model(config_of(name))
    nn.quantize(resident, size, bits, mode=mode, class_predicate=lambda _, module: hasattr(module, "to_quantized")
                and module.weight.shape[-1] % size == 0)  # fmt: skip
    settings = {"quantization": {"group_size": size, "bits": bits, "mode": mode}}
    path = save(resident, config | settings, tmp_path / "mixture")
    for share in (0.0, 0.5, 1.0):
        model = load_mixture(path, share)
        assert_same(mixture_logits(model, 20), mixture_logits(resident, 20), f"{name} {form} {share}")
        model.flash.close()
