"""How each architecture spells a key of config.json, and the default of a key that is not there. Data only.

Used by config_normal_form.py. Names and defaults are those of transformers 5.24's configuration classes, spellings
those of mlx-lm 0.32's ModelArgs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Other model types that are run as these.
SAME_AS = {
    "iquestcoder": "llama",
    "xverse": "llama",
    "kimi_k2": "deepseek_v3",
    "joyai_llm_flash": "deepseek_v3",
}

# The model type of a nested "text_config" that does not say it.
NESTED_TYPES = {
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_text",
    "kimi_vl": "deepseek_v3",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}

# model type -> (transformers' name, the name that is read). Pairs are copied from left to right, in this order.
RENAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "bailing_hybrid": (
        ("model_max_length", "max_position_embeddings"),
        ("moe_renormalize", "norm_topk_prob"),
        ("num_expert_group", "n_group"),
        ("num_experts_per_token", "num_experts_per_tok"),
    ),
    "exaone": (("num_hidden_layers", "num_layers"), ("rms_norm_eps", "layer_norm_epsilon")),
    "gpt2": (("n_positions", "n_ctx"),),
    "gpt_neox": (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")),
    "internlm3": (("attention_bias", "qkv_bias"), ("mlp_bias", "bias")),
    "mellum": (("num_local_experts", "num_experts"),),
    "mimo_v2_flash": (("rms_norm_eps", "layernorm_epsilon"),),
    "qwen3_moe": (("num_local_experts", "num_experts"),),
    "qwen3_vl_moe_text": (("num_local_experts", "num_experts"),),
}

# Where layers of two kinds have RoPE of their own, of which mlx-lm scales that of full attention only: the key that
# holds the base of the sliding layers, None where both must have one base.
SLIDING_BASE: Mapping[str, str | None] = {
    "gemma3_text": "rope_local_base_freq",
    "mimo_v2_flash": "swa_rope_theta",
    "olmo3": None,
}

# mlx-lm reads "rope_parameters" itself, one object per layer type.
READ_PER_LAYER_TYPE = frozenset(("gemma4_text", "laguna", "mellum", "spark2_5"))

# mlx-lm reads the base from "rope_parameters" only.
READ_PARAMETERS = frozenset(("glm_moe_dsa", "ministral3", "mistral4", "qwen3_5_text", "qwen3_5_moe_text"))

# Every n-th layer is of another type, and mlx-lm reads n: its key, that type, n where nothing is said.
PERIODS: Mapping[str, tuple[str, str, int]] = {
    "cohere2": ("sliding_window_pattern", "full_attention", 4),
    "gemma3_text": ("sliding_window_pattern", "full_attention", 6),
    "qwen3_next": ("full_attention_interval", "full_attention", 4),
    "qwen3_5_text": ("full_attention_interval", "full_attention", 4),
    "qwen3_5_moe_text": ("full_attention_interval", "full_attention", 4),
}

# mlx-lm asks for "head_dim", which transformers takes from the width where it is missing.
NEED_HEAD_DIM = frozenset(("exaone4", "exaone_moe", "glm4_moe", "qwen3_moe", "qwen3_vl_moe_text"))

# What transformers says per layer of full attention, and mlx-lm reads once for all of them.
FULL_ATTENTION_KEYS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}

# Layers before the first of experts: read as a number, written as a list.
NEED_FIRST_SPARSE = frozenset(("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"))

_BASE = {"rope_theta": 10000.0}
_HALF = _BASE | {"partial_rotary_factor": 0.5}
_UNTIED = {"tie_word_embeddings": False}

# What a key that is not there means, where mlx-lm (or the family's reader here) takes something else or nothing.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cohere": {"rope_theta": 500000.0},
    "cohere2": _BASE,
    "deepseek_v2": {"topk_method": "greedy"},
    "dots1": _BASE,
    "ernie4_5": {"rope_theta": 500000.0},
    "ernie4_5_moe": {"rope_theta": 500000.0},
    "exaone": {"rope_theta": 500000.0} | _UNTIED,
    "exaone4": _BASE | {"rope_scaling": None},
    "exaone_moe": _BASE,
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "glm": _HALF | _UNTIED | {"attention_bias": True},
    "glm4": _HALF,
    "glm4_moe": _HALF | {"rope_scaling": None},
    "glm4_moe_lite": _BASE,
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "gpt_bigcode": {"activation_function": "gelu_pytorch_tanh"},
    "gpt_neox": _BASE | {"partial_rotary_factor": 0.25, "hidden_act": "gelu"},
    "granite": _BASE | _UNTIED,
    "granitemoe": _BASE | _UNTIED,
    "granitemoehybrid": _UNTIED | {"time_step_limit": [0.0, math.inf]},
    "helium": {"rope_theta": 100000.0},
    "jamba": _UNTIED,
    "longcat_flash": {
        "rope_theta": 1e7,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "ministral3": _UNTIED,
    "minimax_m2": {"rope_theta": 5e6, "shared_intermediate_size": 0},
    "mixtral": {"rope_theta": 1e6},
    "nemotron": _HALF,
    "olmo2": _BASE | _UNTIED,
    "olmo3": _BASE,
    "olmoe": _BASE | _UNTIED,
    "phi": _HALF,
    "phimoe": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen2_moe": _BASE,
    "qwen3_moe": _BASE,
    "qwen3_next": _BASE | {"partial_rotary_factor": 0.25, "norm_topk_prob": True},
    "qwen3_vl_moe_text": _BASE | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "seed_oss": _BASE | _UNTIED | {"attention_bias": True},
    "smollm3": {"rope_theta": 2e6},
    "solar_open": {
        "rope_theta": 1e6,
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": 0,
        "intermediate_size": 10240,
    },
    "stablelm": _BASE | {"partial_rotary_factor": 0.25},
    "starcoder2": _BASE | {"hidden_act": "gelu_pytorch_tanh"},
}

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}

# Text models inside a wrapper leave out even their sizes where those are the class's defaults.
WRAPPED_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"rms_norm_eps": 1e-6},
    "llama": _LLAMA | {"max_position_embeddings": 2048},
    "mistral": _LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "ministral3": _LLAMA,
    "qwen2": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "qwen3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}

# A vision-language model's type -> the model types that its text part may be; of two names for one, the second.
WRAPPERS: Mapping[str, Mapping[str, str]] = {
    "gemma3": {"gemma3_text": "gemma3_text", "": "gemma3_text"},
    "llava": {name: name for name in ("llama", "mistral", "qwen2", "qwen3")} | {"": "llama"},
    "mistral3": {name: name for name in ("mistral", "ministral3")} | {"": "mistral"},
    "pixtral": {name: name for name in ("llama", "mistral")} | {"": "mistral"},
    "qwen2_5_vl": {name: "qwen2" for name in ("qwen2_5_vl", "qwen2_5_vl_text", "qwen2", "")},
    "qwen2_vl": {name: "qwen2" for name in ("qwen2_vl", "qwen2_vl_text", "qwen2", "")},
    "qwen3_vl": {name: "qwen3" for name in ("qwen3_vl", "qwen3_vl_text", "qwen3", "")},
}
