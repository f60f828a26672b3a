"""Tiny configs of every family, and their random checkpoints: small enough for a test, shaped like the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_flash.config import FlashConfig
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.random_model import make_random

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 299,
}
_OPENELM = {
    "model_type": "openelm",
    "activation_fn_name": "swish",
    "model_dim": 96,
    "num_transformer_layers": 3,
    "head_dim": 16,
    "num_query_heads": [4, 4, 8],
    "num_kv_heads": [1, 1, 2],
    "ffn_multipliers": [0.5, 3.0, 7.0],
    "ffn_dim_divisor": 32,
    "max_context_length": 512,
    "vocab_size": 300,
    "bos_token_id": 256,
    "eos_token_id": 299,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict] = {
    "openelm": _OPENELM,
    "openelm-relu": _OPENELM | {"activation_fn_name": "relu"},
    "llama": _LLAMA,
    "llama-relu": _LLAMA | {"hidden_act": "relu", "tie_word_embeddings": True},
    "llama3-rope": _LLAMA | {"rope_scaling": _LLAMA3_ROPE, "head_dim": 32},
    "linear-rope": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "attention_bias": True},
    "mistral": _LLAMA | {"model_type": "mistral", "num_key_value_heads": 1},
    "qwen2": _LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 24},
    "qwen3-relu": _LLAMA | {"model_type": "qwen3", "head_dim": 16, "hidden_act": "relu"},
    "opt": {
        "model_type": "opt",
        "activation_function": "relu",
        "hidden_size": 64,
        "ffn_dim": 300,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 64,
        "bos_token_id": 2,
        "eos_token_id": 299,
    },
}


def make_tiny(name: str, folder: Path, config: dict | None = None) -> Path:
    """The random fp32 checkpoint of CONFIGS[name], or of another config: a Hugging Face folder under `folder`.

    The matrices are scaled up to a deviation of 2 / sqrt(width): with less, a tiny model says one token for ever.
    """
    card = folder / f"{name}-card"
    card.mkdir(parents=True)
    (card / "config.json").write_text(json.dumps(config or CONFIGS[name]))
    out = make_random(card, folder / name, dtype="float32", seed=7)
    tensors = load_file(out / "model.safetensors")
    scaled = {k: w * np.float32(100 * w.shape[-1] ** -0.5 if w.ndim == 2 else 1) for k, w in tensors.items()}
    save_file(scaled, out / "model.safetensors", metadata={"format": "pt"})
    return out


def three_budgets(path: Path, backend: str, select: str) -> list[int]:
    """The smallest legal budget, one at which some bundles have slots and others do not, everything resident.

    The middle of the two ends would not do: in a tiny model staging outweighs the slots.
    """

    def inspect(memory: int | str) -> dict:
        return inspect_model(path, FlashConfig(backend=backend, select=select, memory=memory))

    report = inspect("auto")
    low, high = report["smallest_budget_bytes"], report["everything_resident_bytes"]
    partly = low + int(0.35 * sum(report["bundles"]) * report["bundle_bytes"])
    assert 0 < sum(inspect(partly)["capacities"]) < sum(report["bundles"])
    return [low, partly, high]
