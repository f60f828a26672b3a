"""A cell of the golden grid as a folder: config.json, weights made from the tensors' names, and a tokenizer.

Used by the program that records the grid and by the test that reads it, so that both have the same files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GRID = Path(__file__).parent / "grid"
EXCEPTIONS = Path(__file__).parent / "exceptions.json"
# By seed: a tied model whose embeddings are large says its last token for ever.
EMBEDDING_SCALES = (0.6, 0.2, 0.06)
EMBEDDINGS = ("embed", "wte", "wpe", "word_embeddings")


def weight(name: str, shape: list[int], seed: int) -> np.ndarray:
    """A tensor's random values, fp32. RandomState, because NumPy promises that its numbers never change."""
    noise = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
    if len(shape) < 2:
        values = 0.2 * noise if name.endswith(("bias", "sinks")) else 1 + 0.2 * noise
    elif any(part in name for part in EMBEDDINGS):
        values = EMBEDDING_SCALES[seed % 3] * noise
    else:
        values = noise * 1.5 / np.sqrt(shape[-1])
    return np.ascontiguousarray(values, np.float32)


def make_tensors(shapes: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """shapes: by tensor; a name instead of a shape: a copy of that tensor."""
    made = {name: weight(name, shape, seed) for name, shape in shapes.items() if not isinstance(shape, str)}
    return made | {name: made[of].copy() for name, of in shapes.items() if isinstance(of, str)}


def write_folder(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any], seed: int, ends: list[int] | None = None
) -> Path:
    """A Hugging Face folder. ends: ids at which generation_config.json ends a reply."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    save_file(make_tensors(shapes, seed), folder / "model.safetensors", metadata={"format": "pt"})
    words = {f"w{i}": i for i in range(int((config.get("text_config") or config)["vocab_size"]))}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
            }
        )
    )
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "bos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def changed(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """base with what `change` sets and without what it drops."""
    kept = {key: value for key, value in base.items() if key not in change.get("drop", ())}
    return kept | change.get("set", {})


def difference(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What makes `other` of `base`; see `changed`."""
    fresh = {key: value for key, value in other.items() if key not in base or base[key] != value}
    gone = sorted(base.keys() - other.keys())
    return ({"set": fresh} if fresh else {}) | ({"drop": gone} if gone else {})


@lru_cache
def read_family(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GRID / f"{name}.json").read_text())
    return found


def read_cell(family: str, name: str) -> dict[str, Any]:
    """A cell with its whole config and all its tensors' shapes; what it shares with another one is filled in."""
    file = read_family(family)
    cell = file["cells"][name]
    whole = {"prompt": file["prompt"]} | file["cells"].get(cell.get("like"), {}) | cell
    return whole | {
        "config": changed(file["config"], whole["config"]),
        "tensors": changed(file["tensors"], whole["tensors"]),
    }
