"""Tiny configs of the mixtures of experts that mlx-lm knows, and their random checkpoints in mlx-lm's own format."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

_ALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 299,
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_MLA |= {"num_key_value_heads": 4, "moe_layer_freq": 1}
_QWEN = {"num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
_BAILING = {"num_experts": 8, "layer_group_size": 2, "group_norm_size": 2, "use_qk_norm": True, "num_hidden_layers": 3}
_MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32}
_LINEAR |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5}
_LINEAR |= {"full_attention_interval": 2}
_QWEN35_ROPE = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_SLIDING = ["sliding_attention", "full_attention"]
_INDEX = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
_GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
_LONGCAT = {
    **{"attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 96, "moe_topk": 2},
    **{"expert_ffn_hidden_size": 32, "n_routed_experts": 8, "zero_expert_num": 2, "num_layers": 2},
    **{"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
}

_YARN = {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 256}

# Every architecture whose experts are mlx-lm's switch layers: what it needs beyond _ALL.
CONFIGS: dict[str, dict[str, Any]] = {
    "Klear": _QWEN,
    "afmoe": {"num_experts": 8, "layer_types": _SLIDING, "num_dense_layers": 1, "sliding_window": 16},
    "bailing_hybrid": _MLA | _BAILING,
    "bailing_moe": {"num_experts": 8},
    "bailing_moe_linear": _BAILING,
    "bailing_moe_v3": _MLA | _BAILING,
    "deepseek": {"n_routed_experts": 8},
    "deepseek_v2": _MLA | {"n_routed_experts": 8, "rope_scaling": _YARN},
    "deepseek_v3": _MLA | {"n_routed_experts": 8},
    "deepseek_v32": _MLA | _INDEX | {"n_routed_experts": 8},
    "dots1": {"n_routed_experts": 8},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "use_bias": False, "moe_layer_start_index": 1},
    "exaone_moe": {
        **{"num_experts": 8, "sliding_window": 16, "layer_types": _SLIDING},
        "is_moe_layer": [False, True],
    },
    "gemma4_text": {
        "num_experts": 8,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": 300,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe": {"n_routed_experts": 8, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "glm4_moe_lite": _MLA | {"n_routed_experts": 8},
    "glm_moe_dsa": _MLA
    | _INDEX
    | {"n_routed_experts": 8, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    | {"rope_parameters": {"rope_theta": 10000.0}},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 32, "sliding_window": 16},
    "granitemoe": _GRANITE | {"num_local_experts": 8, "intermediate_size": 32},
    "granitemoehybrid": _GRANITE
    | {"num_local_experts": 8, "intermediate_size": 32, "layer_types": ["attention"] * 2}
    | {"shared_intermediate_size": 32},
    "hunyuan": {"num_experts": 8, "moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_cla": False}
    | {"use_qk_norm": True, "cla_share_factor": 2, "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": _MAMBA
    | {"num_experts": 8, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1}
    | {"expert_layer_period": 2},
    "kimi_linear": _MLA
    | {"num_experts": 8, "num_experts_per_token": 2, "model_max_length": 512}
    | {"linear_attn_config": {"num_heads": 2, "head_dim": 32, "kda_layers": [1]}},
    "laguna": {"num_experts": 8, "layer_types": _SLIDING, "sliding_window": 16},
    "lfm2_moe": {"num_experts": 8, "use_expert_bias": True, "num_dense_layers": 1, "norm_eps": 1e-5}
    | {"conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": [1]},
    "llama4": {
        "text_config": _ALL
        | {
            "model_type": "llama4_text",
            "attention_chunk_size": 64,
            "interleave_moe_layer_step": 1,
            "rope_scaling": None,
        }
        | {"intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 8, "use_qk_norm": True}
        | {"num_experts_per_tok": 1, "num_hidden_layers": 4},
    },
    "longcat_flash": _MLA | _LONGCAT,
    "longcat_flash_ngram": _MLA | _LONGCAT,
    "mellum": {"num_experts": 8, "sliding_window": 16, "layer_types": _SLIDING}
    | {"rope_parameters": {kind: {"rope_theta": 10000.0} for kind in _SLIDING}},
    "mimo_v2_flash": {
        **{"n_routed_experts": 8, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]},
        "sliding_window_size": 64,  # beyond the prompts: mlx-lm's window is one token shorter than transformers'
        **{"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "topk_method": "noaux_tc"},
        **{"scoring_func": "sigmoid", "layernorm_epsilon": 1e-5, "swa_rope_theta": 10000.0, "v_head_dim": 16},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16},
        **{"partial_rotary_factor": 0.5},
    },
    "minimax": {"num_local_experts": 8, "intermediate_size": 32, "shared_intermediate_size": 0, "rotary_dim": 8},
    "minimax_m3_vl": {
        "text_config": _ALL
        | {"intermediate_size": 32, "dense_intermediate_size": 96, "shared_intermediate_size": 32}
        | {"num_local_experts": 8, "moe_layer_freq": [0, 1]},
    },
    "mistral4": _MLA
    | {"n_routed_experts": 8, "rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1, "rope_theta": 10000.0}},
    "mixtral": {"num_local_experts": 8},
    "nemotron_h": {
        **{"n_routed_experts": 8, "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4},
        **{"mamba_head_dim": 16, "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2},
        **{"mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True},
        **{"moe_shared_expert_intermediate_size": 32, "time_step_limit": [0.0, 100.0]},
    },
    "olmoe": {"num_experts": 8},
    "phimoe": {"num_local_experts": 8},
    "phixtral": {
        "num_local_experts": 8,
        "num_vocab": 300,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 8,
    },
    "qwen2_moe": _QWEN | {"norm_topk_prob": False},
    "qwen3_5_moe": {
        "text_config": _ALL | _QWEN | _LINEAR | {"model_type": "qwen3_5_moe_text", "rope_parameters": _QWEN35_ROPE}
    },
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN | _LINEAR,
    "qwen3_vl_moe": {"text_config": _ALL | _QWEN | {"model_type": "qwen3_moe"}},
    "solar_open": {"n_routed_experts": 8, "partial_rotary_factor": 0.5},
    "step3p5": {"moe_num_experts": 8, "moe_top_k": 2, "num_attention_groups": 2, "share_expert_dim": 32}
    | {"swiglu_limits": [0.0, 0.5]},
}

# Those whose experts are no switch layers, or cannot be built this small, and why.
UNSUPPORTED = {
    "dbrx": "its experts are modules of their own, whose rows mlx-lm calls one by one",
    "deepseek_v41": "not built here: its sparse attention needs layers that share indices",
    "kimi_k3": "not built here: its residual blocks need a linear attention config of full size",
    "muse_spark": "not built here: needs a vision part",
}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model."""
    return {"model_type": name} | _ALL | CONFIGS[name] | changes


def make_model(config: dict[str, Any], group_size: int | None = None, seed: int = 0) -> Any:
    """mlx-lm's model of a config with random weights, 4-bit where a group size is given."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map_with_path

    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))

    def louder(path: str, array: mx.array) -> mx.array:
        # With less, a tiny model's experts change no token.
        return 2 * array if array.ndim > 1 and "norm" not in path else array

    model.update(tree_map_with_path(louder, model.parameters()))
    if group_size is not None:

        def fits(path: str, module: Any) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

        nn.quantize(model, group_size, 4, class_predicate=fits)
    model.eval()
    return model


def save(model: Any, config: dict[str, Any], folder: Path, group_size: int | None = None) -> Path:
    """A folder in mlx-lm's own format."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    quantised = {} if group_size is None else {"quantization": {"group_size": group_size, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    return folder


def per_expert(weights: dict[str, Any], names: dict[str, str], switch: str, experts: str) -> dict[str, Any]:
    """The same weights with a tensor per expert, as Hugging Face's checkpoints have them: `switch` in a name becomes
    `experts.{e}`, names: what mlx-lm calls a projection -> what they call it."""
    found = {}
    for name, array in weights.items():
        if f".{switch}." not in name:
            found[name] = array
            continue
        before, after = name.split(f".{switch}.")
        projection, kind = after.split(".")
        for expert in range(array.shape[0]):
            found[f"{before}.{experts}.{expert}.{names.get(projection, projection)}.{kind}"] = array[expert]
    return found


def save_shards(weights: dict[str, Any], config: dict[str, Any], folder: Path, shards: int = 2) -> Path:
    """A folder with an index, the tensors dealt out to so many files."""
    import mlx.core as mx

    folder.mkdir(parents=True)
    files = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    weight_map = {name: files[k % shards] for k, name in enumerate(weights)}
    for file in files:
        mx.save_safetensors(str(folder / file), {n: a for n, a in weights.items() if weight_map[n] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
