"""Random weights that any library makes alike: each tensor from NumPy's generator, seeded with its name."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Shapes = Mapping[str, Sequence[int]]


def tensor(name: str, shape: Sequence[int]) -> np.ndarray:
    """Matrices with a gain of 1.5, so that attention is far from uniform; norms around 1; biases small."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("e_score_correction_bias"):  # mlx-lm's ERNIE drops it, which is not about positions
        return np.zeros_like(values)
    if len(shape) < 2:
        return np.float32(0.1) * values + np.float32(name.endswith("norm.weight") or "norm" in name.split(".")[-2:][0])
    if "emb" in name or "wte" in name:
        return values
    return values * np.float32(1.5 / np.sqrt(shape[-1]))


def prompt_ids(count: int, vocab: int) -> list[int]:
    """A prompt without repetition of its own."""
    return [int(i) for i in np.random.default_rng(count).integers(3, vocab - 1, count)]


def write_checkpoint(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Path:
    """A Hugging Face folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
