"""The golden grid's families for which transformers has no code, with configs as published; see cells.py."""

from __future__ import annotations

from .cells import BASE, ENDING, MQA, THETA, TIED, Config, GridFamily, family

OPENELM: Config = {  # as published, but for sizes
    **{"model_type": "openelm", "vocab_size": 160, "model_dim": 64, "num_transformer_layers": 3, "head_dim": 16},
    **{
        "num_query_heads": [4, 4, 8],
        "num_kv_heads": [1, 2, 2],
        "num_gqa_groups": 4,
        "ffn_multipliers": [0.5, 1.2, 2.0],
    },
    **{"qkv_multipliers": [0.5, 1.0], "ffn_dim_divisor": 16, "ffn_with_glu": True, "activation_fn_name": "swish"},
    **{"normalize_qk_projections": True, "normalization_layer_name": "rms_norm", "share_input_output_layers": True},
    **{"rope_freq_constant": 300.0, "rope_max_length": 256, "max_context_length": 128, "initializer_range": 0.02},
    **{"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "use_cache": True},
}
_LLAMA: Config = BASE | {"rms_norm_eps": 1e-5, "rope_theta": THETA, "hidden_act": "silu", "torch_dtype": "float32"}
_SCALES: Config = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 16}
_LINEAR: Config = {"rope_scaling": {"type": "linear", "factor": 3.0}}

FAMILIES: dict[str, GridFamily] = {
    "openelm": family(
        OPENELM,
        None,
        None,
        {},
        ENDING,
        rope_freq_constant={"rope_freq_constant": 10000.0},
        untied={"share_input_output_layers": False},
        no_qk_norm={"normalize_qk_projections": False},
        relu={"activation_fn_name": "relu"},
        mha={"num_kv_heads": [4, 4, 8]},
    ),
    "minicpm": family(
        _LLAMA | _SCALES | {"model_type": "minicpm"},
        None,
        theta={"rope_theta": 10000.0},
        linear=_LINEAR,
        tied=TIED,
        mqa=MQA,
        embeddings={"scale_emb": 12.0},
        depth={"scale_depth": 0.7},
        width={"dim_model_base": 32},
    ),
    "mimo": family(
        _LLAMA | {"model_type": "mimo", "num_nextn_predict_layers": 1, "attention_bias": True},
        None,
        theta={"rope_theta": 10000.0},
        linear=_LINEAR,
        tied=TIED,
        mqa=MQA,
    ),
    "internlm2": family(
        _LLAMA | {"model_type": "internlm2", "bias": False},
        None,
        theta={"rope_theta": 10000.0},
        linear=_LINEAR,
        bias={"bias": True},
        mqa=MQA,
    ),
}
