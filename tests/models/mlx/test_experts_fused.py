"""Mixtures of experts whose gate and up projections are one tensor in the files, read in place on mlx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.mlx.test_experts import assert_same, load, logits
from tests.tiny_experts import config_of, make_model, save_shards

mx = pytest.importorskip("mlx.core", reason="this is about the mlx backend")
pytest.importorskip("mlx_lm", reason="this is about the mlx backend")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

GRANITE = (".block_sparse_moe.switch_mlp", ".block_sparse_moe.input_linear.weight", ".output_linear.weight")
QWEN = (".mlp.switch_mlp", ".mlp.experts.gate_up_proj", ".experts.down_proj")
GEMMA = (".experts.switch_glu", ".experts.gate_up_proj", ".down_proj")
CASES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "gemma4": ({"model_type": "gemma4", "text_config": config_of("gemma4_text"), "vocab_size": 300}, GEMMA),
    "gemma4_text": (config_of("gemma4_text"), GEMMA),
    "granitemoe": (config_of("granitemoe"), GRANITE),
    "granitemoehybrid": (config_of("granitemoehybrid"), GRANITE),
    "mistral4": (config_of("mistral4"), QWEN),
    "qwen3_5_moe": (config_of("qwen3_5_moe"), QWEN),
}


def fused(weights: dict[str, Any], switch: str, gate_up: str, down: str) -> dict[str, Any]:
    """mlx-lm's weights as Hugging Face's checkpoints have them."""
    found = dict(weights)
    for name in weights:
        before, _, after = name.partition(f"{switch}.")
        if after == "gate_proj.weight":
            both = [found.pop(f"{before}{switch}.{part}_proj.weight") for part in ("gate", "up")]
            found[before + gate_up] = mx.concatenate(both, axis=1)
            block = before + switch.rpartition(".")[0]
            found[block + down] = found.pop(f"{before}{switch}.down_proj.weight")
    assert len(found) < len(weights)
    return found


@pytest.mark.parametrize("name", CASES)
def test_halves_of_a_stack(name: str, tmp_path: Path) -> None:
    config, names = CASES[name]
    resident = make_model(config)
    path = save_shards(fused(dict(tree_flatten(resident.parameters())), *names), config, tmp_path / "model")
    for share in (0.0, 0.3, 1.0):
        model = load(path, share)
        assert_same(logits(model, 30), logits(resident, 30), f"{name} {share}")
        assert model.flash.stats.bytes_read > 0
        model.flash.close()


@pytest.mark.parametrize("name", ["llama4", "qwen3_vl_moe"])
def test_matrices_stored_input_by_input(name: str, tmp_path: Path) -> None:
    """As published; mlx-lm turns them in memory, here they are multiplied as they are."""
    config = config_of(name)
    resident = make_model(config)
    weights, place = dict(tree_flatten(resident.parameters())), (".experts." if name == "llama4" else ".switch_mlp.")
    for gate in [each for each in weights if f"{place}gate_proj" in each]:
        before = gate.partition(place)[0]
        parts = [weights.pop(f"{before}{place}{part}_proj.weight").swapaxes(1, 2) for part in ("gate", "up", "down")]
        weights[f"{before}.experts.gate_up_proj"] = mx.concatenate(parts[:2], axis=2)
        weights[f"{before}.experts.down_proj"] = parts[2]
    if name == "qwen3_vl_moe":
        weights = {k.removeprefix("language_model.").replace("model.", "model.language_model.", 1): v
                   for k, v in weights.items()}  # fmt: skip
    path = save_shards(weights, config, tmp_path / "model")
    for share in (0.0, 0.3, 1.0):
        model = load(path, share)
        for found, wanted in zip(logits(model, 40), logits(resident, 40), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert model.flash.stats.bytes_read > 0
        model.flash.close()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gpt_oss_in_mxfp4_as_published(tokens: int, share: float, tmp_path: Path) -> None:
    """Gate and up rows alternate, which mlx-lm undoes in memory; here they are read as they are."""
    config = config_of("gpt_oss")
    weights = {k: v for k, v in tree_flatten(make_model(config).parameters()) if ".experts." not in k}
    rng = np.random.default_rng(0)
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts."
        for name, columns in (("gate_up_proj", 2), ("down_proj", 1)):
            weights[f"{place}{name}_blocks"] = mx.array(rng.integers(0, 256, (8, 64, columns, 16), np.uint8))
            weights[f"{place}{name}_scales"] = mx.array(rng.integers(120, 128, (8, 64, columns), np.uint8))
            weights[f"{place}{name}_bias"] = mx.array(rng.standard_normal((8, 64)).astype(np.float32))
    path = save_shards(weights, config | {"quantization_config": {"quant_method": "mxfp4"}}, tmp_path / "published")
    resident, ids = load_model(path)[0], mx.array(rng.integers(0, 300, (1, tokens)))
    model = load(path, share)
    np.testing.assert_allclose(np.array(model(ids)), np.array(resident(ids)), rtol=1e-5, atol=1e-5)
    assert model.flash.stats.bytes_read > 0
    model.flash.close()
