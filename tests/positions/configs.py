"""The configs whose positions are checked: per family a tiny base, and what its config can say of positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHORT, LONG = 20, 100  # prompts: within and beyond the windows and the lengths that models were first trained with
ORIGINAL, WINDOW = 64, 24

_ALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}
_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_QWEN_EXPERTS = _EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
_QWEN_EXPERTS |= {"mlp_only_layers": []}
_SIGMOID = _EXPERTS | {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_SIGMOID |= {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
_GRANITE = {"attention_multiplier": 0.25, "embedding_multiplier": 2.0, "logits_scaling": 2.0}
_GRANITE |= {"residual_multiplier": 0.5}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_MLA |= {"num_key_value_heads": 4, "head_dim": 8}
_NESTED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        **{"beta_fast": 8.0, "attention_factor": 1.2},
    },
}
_MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

_MORE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu"},
    "mistral": {"hidden_act": "silu", "sliding_window": None},
    "qwen2": {"hidden_act": "silu"},
    "qwen3": {"hidden_act": "silu"},
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.5},
    "cohere2": {"tie_word_embeddings": True, "logit_scale": 0.5, "sliding_window": WINDOW, "layer_norm_eps": 1e-5},
    "ernie4_5": {"use_bias": False},
    "exaone4": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"sliding_window": WINDOW, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {"sliding_window": WINDOW, "layer_types": _MIXED, "rope_local_base_freq": 1000.0, "sliding_window_pattern": 3},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    | {"intermediate_size": 256, "attention_bias": True, "num_key_value_heads": 4},
    "gptj": {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 256,
        "rotary_dim": 8,
        "n_inner": 256,
        "num_key_value_heads": 4,
    },
    "granite": _GRANITE,
    "helium": {},
    "hunyuan_v1_dense": {},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _MIXED, "rope_theta": 500000.0},
    "phi": {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "num_key_value_heads": 4},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": ORIGINAL},
    "seed_oss": {"attention_bias": False, "attention_out_bias": False},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    "starcoder2": _GELU | {"norm_epsilon": 1e-5, "sliding_window": None},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": _QWEN_EXPERTS | {"norm_topk_prob": False},
    "qwen3_moe": _QWEN_EXPERTS,
    "olmoe": _QWEN_EXPERTS,
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "lm_head_bias": True, "attention_bias": True}
    | {"original_max_position_embeddings": ORIGINAL, "sliding_window": None},
    "dots1": _SIGMOID | {"sliding_window": None},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "use_bias": False, "moe_layer_start_index": 1}
    | {"moe_intermediate_size": 32, "moe_num_shared_experts": 1, "moe_layer_interval": 1},
    "glm4_moe": _SIGMOID | {"use_qk_norm": True, "partial_rotary_factor": 0.5},
    "deepseek_v2": _SIGMOID | _MLA | {"topk_method": "greedy", "moe_layer_freq": 1, "norm_topk_prob": False},
    "deepseek_v3": _SIGMOID | _MLA,
    "mellum": _QWEN_EXPERTS | {"rope_parameters": _NESTED} | {"sliding_window": WINDOW, "layer_types": _MIXED},
    "laguna": _QWEN_EXPERTS
    | {"rope_parameters": _NESTED}
    | {"sliding_window": WINDOW, "layer_types": _MIXED, "num_attention_heads_per_layer": [4] * 4},
    "exaone_moe": _EXPERTS
    | {"num_experts": 8, "sliding_window": WINDOW, "layer_types": _MIXED, "n_group": 1}
    | {"num_shared_experts": 1, "topk_group": 1, "is_moe_layer": [False, True, True, True]}
    | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "first_k_dense_replace": 1},
    "lfm2_moe": _EXPERTS
    | {"num_experts": 8, "num_dense_layers": 1, "norm_eps": 1e-5, "use_expert_bias": True}
    | {
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "qwen3_next": _QWEN_EXPERTS
    | {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32}
    | {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5}
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "full_attention_interval": 2},
}
BASES: dict[str, dict[str, Any]] = {name: {"model_type": name} | _ALL | more for name, more in _MORE.items()}
for _name, _keys in (
    ("mellum", ("rope_theta", "rope_scaling")),
    ("laguna", ("rope_theta", "rope_scaling")),
):
    for _key in _keys:  # which their configs never had
        del BASES[_name][_key]

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 8.0}
YARN_FINE = YARN | {"attention_factor": 1.2, "truncate": False, "beta_slow": 2.0}
YARN_SCALES = YARN | {"mscale": 1.0, "mscale_all_dim": 0.6}
SCALINGS = {
    "default": None,
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-fine": YARN_FINE,
    "yarn-scales": YARN_SCALES,
}


def longrope(half: int) -> dict[str, Any]:
    """A long context's tables for `half` frequencies."""
    return {
        "rope_type": "longrope",
        "short_factor": [round(1 + 0.05 * i, 3) for i in range(half)],
        "long_factor": [round(1.0 + 1.5 * i * i, 3) for i in range(half)],
        "original_max_position_embeddings": ORIGINAL,
    }


SCALED = ("llama", "mistral", "qwen2", "qwen3", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2",
          "gemma3_text", "glm", "glm4", "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "nemotron",
          "olmo2", "olmo3", "phi", "seed_oss", "smollm3", "stablelm", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe",
          "olmoe", "dots1", "ernie4_5_moe", "glm4_moe")  # fmt: skip
FEW = {
    **dict.fromkeys(("exaone_moe", "lfm2_moe", "qwen3_next"), ("linear", "yarn-fine")),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("linear", "yarn", "yarn-scales")),
}
HALF = {"glm": 4, "glm4": 4, "gpt_neox": 2, "nemotron": 4, "phi": 4, "stablelm": 2, "glm4_moe": 4}
LATE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
WINDOWS: dict[str, dict[str, dict[str, Any]]] = {
    "mistral": {"window": {"sliding_window": WINDOW}},
    "qwen2": {"late-window": LATE, "unused-window": LATE | {"use_sliding_window": False}},
    "qwen3": {"late-window": LATE},
    "cohere2": {"pattern": {"sliding_window_pattern": 2}, "layer-types": {"layer_types": _MIXED}},
    "exaone4": {
        "pattern": {"layer_types": None, "sliding_window_pattern": 2},
        "no-window": {"layer_types": ["full_attention"] * 4, "sliding_window": None, "sliding_window_pattern": None},
    },
    "gemma2": {"layer-types": {"layer_types": _MIXED}},
    "olmo3": {"no-layer-types": {"layer_types": None}},
    "phi3": {"window": {"sliding_window": WINDOW}, "partial": {"partial_rotary_factor": 0.5}},
    "smollm3": {"window": {"use_sliding_window": True, "sliding_window": WINDOW}},
    "starcoder2": {"window": {"sliding_window": WINDOW}},
    "mixtral": {"window": {"sliding_window": WINDOW}},
    "qwen2_moe": {"window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}},
    "qwen3_moe": {"window": {"use_sliding_window": True, "sliding_window": WINDOW}},
    "phimoe": {"window": {"sliding_window": WINDOW}},
    "dots1": {"late-window": {"sliding_window": WINDOW, "max_window_layers": 2}},
    "glm": {"whole": {"partial_rotary_factor": 1.0}},
    "gemma3_text": {
        "pattern": {"layer_types": None, "sliding_window_pattern": 2},
        "irregular": {"layer_types": ["full_attention", *_MIXED[:2], "sliding_attention"]},
        "nested": {"rope_theta": None, "rope_scaling": None, "rope_parameters": _NESTED},
    },
    "mellum": {"linear": {"rope_parameters": _NESTED | {"full_attention": LINEAR | {"rope_theta": 10000.0}}}},
    "hunyuan_v1_dense": {"alpha": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 50.0}}},
}


# Of these what transformers computes is stored, with prompts that are longer than in the golden grid (tests/golden),
# which has cells of every family: windows, patterns of layers, parts of heads, and each kind of scaling.
STORED = (
    *("cohere2", "exaone4", "gemma2", "gemma3_text", "glm4", "gpt_neox", "llama", "mistral", "mixtral", "olmo3"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3_next", "smollm3"),
)


def families() -> list[str]:
    return list(STORED)


def cases_of(family: str) -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """A family's cases: their names, what they change in the base, and their prompts' lengths."""
    scalings: dict[str, Any] = {"default": None}
    if family in SCALED:
        scalings = SCALINGS | {"longrope": longrope(HALF.get(family, 8))}
    for name in FEW.get(family, ()):
        scalings[name] = SCALINGS[name]
    if family in ("phi3", "phimoe"):
        scalings["longrope"] = longrope(8)
    if family == "phimoe":  # beyond the original length transformers 5.24 takes the short factors with the long scale
        scalings["longrope"] |= {"short_mscale": 1.2, "long_mscale": 1.3}
    if family in ("gemma3_text", "olmo3"):  # transformers 5.24 looks for it where such a config does not have it
        scalings["yarn-fine"] = {key: value for key, value in YARN_FINE.items() if key != "truncate"}
    for name, scaling in scalings.items():
        lengths = (SHORT, LONG) if name in ("default", "longrope") else (LONG,)
        lengths = lengths[:1] if (family, name) == ("phimoe", "longrope") else lengths
        yield name, {} if scaling is None else {"rope_scaling": scaling}, lengths
    for name, changes in WINDOWS.get(family, {}).items():
        yield name, changes, (LONG,)
