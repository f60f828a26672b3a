"""Small checkpoints of every family, and what a conversion of them must hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.numerics.casting import RAW, cast
from mlx_flash.engine.storage.bundle import DATA_START, Layout, check_layer_file, layer_file
from mlx_flash.engine.storage.checkpoint import Checkpoint, verify
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.source import DTYPE_OF, read_tensors
from mlx_flash.tools.random_model import make_random

module = sys.modules["mlx_flash.models.conversion.converter"]
convert = module.convert
UP = "model.layers.1.mlp.up_proj.weight"

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
}


CONFIGS: dict[str, dict[str, Any]] = {
    "openelm": {
        "model_type": "openelm",
        "activation_fn_name": "relu",
        "model_dim": 64,
        "num_transformer_layers": 3,
        "head_dim": 16,
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [1, 1, 2],
        "ffn_multipliers": [0.5, 2.0, 4.0],
        "ffn_dim_divisor": 16,
        "vocab_size": 300,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "mistral": LLAMA | {"model_type": "mistral", "num_key_value_heads": 1},
    "qwen2": LLAMA | {"model_type": "qwen2", "hidden_act": "silu"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 32},
    "opt": {
        "model_type": "opt",
        "activation_function": "relu",
        "hidden_size": 48,
        "ffn_dim": 90,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "vocab_size": 280,
    },
}


def raw_tensors(folder: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Every tensor of a safetensors folder as raw items, read in the plainest way."""
    found = {}
    for name, tensor in read_tensors(folder).items():
        data = tensor.path.read_bytes()[tensor.info.offset : tensor.info.offset + tensor.info.nbytes]
        dtype = DTYPE_OF[tensor.info.dtype]
        found[name] = (np.frombuffer(data, RAW[dtype]).reshape(tensor.info.shape), dtype)
    return found


def bundle_parts(folder: Path, layer: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts (count, d) of a layer, and the padding behind them."""
    entry = json.loads((folder / "config.json").read_text())["flash"]["layers"][layer]
    layout = Layout.from_json(entry)
    check_layer_file(folder / layer_file(layer), layout)
    rows = np.fromfile(folder / layer_file(layer), np.uint8)[DATA_START:].reshape(layout.count, layout.stride)
    parts = {}
    for part in layout.parts:
        at = layout.offset(part.name)
        parts[part.name] = np.ascontiguousarray(rows[:, at : at + part.nbytes]).view(RAW[part.dtype])
    return parts, rows[:, layout.bundle_bytes :]


def expected_parts(config: dict[str, Any], tensors: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Written out by hand for each family, not taken from the table under test."""
    if config["model_type"] == "openelm":
        prefix = f"transformer.layers.{layer}.ffn."
        gate, up = np.split(tensors[prefix + "proj_1.weight"], 2)
        return {"gate": gate, "up": up, "down": tensors[prefix + "proj_2.weight"].T}
    if config["model_type"] == "opt":
        prefix = f"model.decoder.layers.{layer}."
        return {"up": tensors[prefix + "fc1.weight"], "down": tensors[prefix + "fc2.weight"].T}
    prefix = f"model.layers.{layer}.mlp."
    return {
        "gate": tensors[prefix + "gate_proj.weight"],
        "up": tensors[prefix + "up_proj.weight"],
        "down": tensors[prefix + "down_proj.weight"].T,
    }


def make_source(folder: Path, config: dict[str, Any], dtype: str = "bfloat16") -> Path:
    card = folder / "card"
    card.mkdir(parents=True)
    (card / "config.json").write_text(json.dumps(config))
    return make_random(card, folder / "hf", dtype=dtype)


def check_same(source: Path, flash: Path, dtype: str) -> None:
    config = json.loads((source / "config.json").read_text())
    tensors = {name: cast(raw, kind, dtype, name) for name, (raw, kind) in raw_tensors(source).items()}
    spec = read_spec(config, tensors)
    for layer in range(len(spec.layers)):
        parts, padding = bundle_parts(flash, layer)
        expected = expected_parts(config, tensors, layer)
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(parts[name], value, err_msg=f"layer {layer} {name}")
        assert not padding.any()
    resident = raw_tensors(flash)
    assert resident.keys() == tensors.keys() - spec.ffn_shapes().keys()
    for name, (raw, kind) in resident.items():
        assert kind == dtype
        np.testing.assert_array_equal(raw, tensors[name], err_msg=name)
    Checkpoint.open(flash)
    verify(flash)


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the dict of a checkpoint's tensors (raw items, dtype) and write it back."""
    tensors = raw_tensors(folder)
    change(tensors)
    header: dict[str, Any] = {}
    data = b""
    tags = {value: key for key, value in DTYPE_OF.items()}
    for name, (raw, dtype) in tensors.items():
        piece = np.ascontiguousarray(raw).tobytes()
        header[name] = {
            "dtype": tags[dtype],
            "shape": list(raw.shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
