"""Makes config_forms.json: what transformers says with the config.json that it writes itself, per model type.

Needs transformers and PyTorch (the tests do not): `python tests/models/specs/config_forms.py` from the root of
the clone, with
transformers 5.24 and torch 2.13 on a CPU. The weights come from `weights`, so that a test can make them again.
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
MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MLA |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32}
GEMMA3 = {
    **LAYERS,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    },
}
TIED = {"tie_word_embeddings": True}
BOTH_SLIDING = {"rope_parameters": {kind: PLAIN for kind in SLIDING[:2]}}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"patch_size": 14, "image_size": 28, "num_channels": 3}
QWEN_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
AXES = {"rope_parameters": PLAIN | {"mrope_section": [2, 3, 3]}, "head_dim": 16}


def part(share: float) -> dict[str, Any]:
    return {"rope_parameters": PLAIN | {"partial_rotary_factor": share}}


# name -> (model type, keys, keys of the whole where it is a vision-language model)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "cohere": ("cohere", TIED, None),
    "cohere2": ("cohere2", LAYERS | TIED, None),
    "deepseek_v2": ("deepseek_v2", MOE | MLA | {"first_k_dense_replace": 1}, None),
    "dots1": ("dots1", MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}, None),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}, None),
    "exaone4": ("exaone4", LAYERS, None),
    "gemma3_text": ("gemma3_text", GEMMA3, None),
    "gemma": ("gemma", {"head_dim": 16} | TIED, None),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64} | TIED, None),
    "glm": ("glm", {"head_dim": 16} | part(0.5), None),
    "glm4": ("glm4", {"head_dim": 16} | part(0.25), None),
    "glm4_moe": ("glm4_moe", MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1} | part(0.5), None),
    "glm4_moe_lite": ("glm4_moe_lite", MOE | MLA | {"mlp_layer_types": ["sparse", "sparse"]}, None),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "num_key_value_heads": None,
            "intermediate_size": None,
        }
        | TIED,
        None,
    ),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4, "intermediate_size": 256} | part(0.5), None),
    "granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 0.5}, None),
    "helium": ("helium", {"head_dim": 16}, None),
    "internlm3": ("internlm3", {"head_dim": 16}, None),
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
    "nemotron": ("nemotron", {"head_dim": 16} | part(0.25), None),
    "olmo2": ("olmo2", {}, None),
    "olmo3": ("olmo3", LAYERS | BOTH_SLIDING, None),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}, None),
    "phi": ("phi", {"num_key_value_heads": 4} | part(0.25), None),
    "phi3": ("phi3", part(0.5), None),
    "qwen2": ("qwen2", {}, None),
    "qwen2_moe": ("qwen2_moe", MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32}, None),
    "qwen3": ("qwen3", {"head_dim": 16}, None),
    "qwen3_moe": ("qwen3_moe", MOE | {"num_experts": 4}, None),
    "qwen3_next": (
        "qwen3_next",
        MOE
        | LINEAR
        | {"num_experts": 4, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32}
        | {"layer_types": ["linear_attention", "full_attention"]}
        | part(0.5),
        None,
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16}, None),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, None),
    "stablelm": ("stablelm", part(0.5), None),
    "starcoder2": ("starcoder2", {}, None),
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
NO_ROPE = ("gpt2",)


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
    if kind not in NO_ROPE:
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
