"""Makes config_forms.json: tokens and logits of transformers with the config.json that it writes itself.

Holds what the golden grid (tests/golden) has not: vision-language models that run as text, of which it has one only,
and small checkpoints of a few families for tests of keys, end ids and contradictions. Features of a family's config
belong into the grid, long prompts into tests/positions.

Needs transformers and PyTorch, which the tests do not: `python tests/models/specs/config_forms.py` from the root of the
clone, with transformers 5.24 and torch 2.13 on a CPU. `weights` makes the tensors, there and in the tests.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PROMPT = [1, *((7 * i * i + 13 * i + 3) % 120 + 5 for i in range(40))]
TOKENS = 8
OUT = Path(__file__).with_suffix(".json")
BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 127,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
SLIDING = ["sliding_attention", "full_attention"] * 2
LAYERS = {"num_hidden_layers": 4, "layer_types": SLIDING, "sliding_window": 64, "head_dim": 16}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
GEMMA3 = {
    **LAYERS,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    },
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"patch_size": 14, "image_size": 28, "num_channels": 3}
QWEN_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
AXES = {"rope_parameters": PLAIN | {"mrope_section": [2, 3, 3]}, "head_dim": 16}


def part(share: float) -> dict[str, Any]:
    return {"rope_parameters": PLAIN | {"partial_rotary_factor": share}}


# name -> (model type, keys, keys of the whole where it is a vision-language model)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 0.5}, None),
    "llama": ("llama", {}, None),
    "llama3-scaling": (
        "llama",
        {
            "rope_parameters": PLAIN
            | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 32}
        },
        None,
    ),
    "minimax_m2": ("minimax_m2", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2} | part(0.5), None),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, None),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}, None),
    "qwen3_moe": ("qwen3_moe", MOE | {"num_experts": 4}, None),
    "gemma3": ("gemma3", GEMMA3 | {"model_type": "gemma3_text"}, {"vision_config": VISION}),
    "llava": ("llava", {"model_type": "llama"}, {"vision_config": VISION, "tie_word_embeddings": False}),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 16, "rope_parameters": PLAIN},
        {"vision_config": VISION, "tie_word_embeddings": False},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {**AXES, "tie_word_embeddings": None},
        {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {**AXES, "tie_word_embeddings": None},
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}},
    ),
}


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random fp32 tensors by name: matrices around 0, norms around 1, biases around 0."""
    found = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        noise = rng.standard_normal(shape, dtype=np.float32)
        plain = len(shape) > 1 or name.endswith("bias")
        found[name] = noise * np.float32(0.15 if len(shape) > 1 else 0.05) + np.float32(0 if plain else 1)
    return found


def write(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    """The checkpoint of a case, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make(name: str) -> dict[str, Any]:
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, keys, whole = CASES[name]
    values = {key: value for key, value in (BASE | keys).items() if value is not None}
    values.setdefault("rope_parameters", dict(PLAIN))
    if whole is None:
        architecture, config = AutoModelForCausalLM, AutoConfig.for_model(kind, **values)
    else:
        architecture, config = AutoModelForImageTextToText, AutoConfig.for_model(kind, text_config=values, **whole)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        architecture.from_config(config).save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "np") as file:
            shapes = {each: list(file.get_slice(each).get_shape()) for each in file.keys()}  # noqa: SIM118
        vision = sorted(each for each in shapes if whole is not None and ("vis" in each or "multi_modal" in each))
        for each in vision[1:]:  # one of them is enough to see that it is left out; text does not need any
            del shapes[each]
        write(folder, saved, shapes)
        model = architecture.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ids, first = list(PROMPT), None
        with torch.no_grad():
            for _ in range(TOKENS):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                first = logits if first is None else first
                ids.append(int(logits.argmax()))
    return {
        "config": saved,
        "shapes": shapes,
        "tokens": ids[len(PROMPT) :],
        "logits": [round(float(value), 5) for value in first[:16]],
    }


if __name__ == "__main__":
    cases = {name: make(name) for name in CASES}
    lines = [f"{json.dumps(name)}: {json.dumps(case, separators=(',', ':'))}" for name, case in cases.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
