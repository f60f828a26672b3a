"""The golden grid's mixtures of experts; see cells.py."""

from __future__ import annotations

from .cells import (
    BIAS,
    ENDING,
    MAIN,
    MHA,
    NO_BIAS,
    ROPES,
    SOFTCAP,
    SOME,
    TIED,
    UNTIED,
    WIDE,
    WINDOW,
    Cell,
    Config,
    F,
    GridFamily,
    S,
    by_kind,
    family,
)
from .dense import GRANITE, SLIDING_LATE

EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: Config = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
ROUTED: Config = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1},
}
MLA: Config = {
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"num_key_value_heads": 4},
}
LINEAR: Config = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 16},
    **{"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", F], "head_dim": 16},
    **{"shared_expert_intermediate_size": 32},
}
SHARED = {"shared_expert_intermediate_size": 32}
NORMALISED, PLAIN = {"norm_topk_prob": True}, {"norm_topk_prob": False}
GROUPS = {"n_group": 4, "topk_group": 2}
NO_Q_LORA = {"q_lora_rank": None}
MLA_ROPES = "yarn,yarn mscale*,yarn equal"
STEP, DENSE_LAYER = {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}
SPARSE_LAYERS: Config = {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": None}
INDEX: Config = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64}
LAYERS: Config = WINDOW | {"head_dim": 16, "layer_types": [S, F]}

MIXTURES: dict[str, GridFamily] = {
    "mixtral": family(
        LOCAL | {"sliding_window": None, "head_dim": 16},
        SOME,
        None,
        {},
        ENDING | {"window": Cell(WINDOW, old=True)},
        head_dim=WIDE,
        tied=TIED,
        top_1={"num_experts_per_tok": 1},
    ),
    "qwen2_moe": family(
        EXPERTS | SHARED,
        MAIN,
        None,
        {"layer_types": None},
        {},
        window=SLIDING_LATE,
        normalised=NORMALISED,
        tied=TIED,
        no_bias={"qkv_bias": False},
        step=STEP,
        dense_layer=DENSE_LAYER,
        mha=MHA,
    ),
    "qwen3_moe": family(
        EXPERTS | {"head_dim": 16},
        "linear,yarn",
        None,
        {"layer_types": None},
        ENDING | {"window": Cell(SLIDING_LATE, old=True)},
        normalised=NORMALISED,
        tied=TIED,
        attention_bias=BIAS,
        step=STEP,
        dense_layer=DENSE_LAYER,
        head_dim=WIDE,
    ),
    "olmoe": family(
        EXPERTS | {"moe_intermediate_size": None, "intermediate_size": 32},
        "linear,yarn,longrope crossing",
        None,
        {},
        {},
        normalised=NORMALISED,
        clip={"clip_qkv": 0.5},
        attention_bias=BIAS,
        tied=TIED,
    ),
    "granitemoe": family(LOCAL | GRANITE, MAIN, None, {}, {}, attention_bias=BIAS, tied=TIED),
    "granitemoehybrid": family(
        LOCAL
        | GRANITE
        | {
            "layer_types": ["attention"] * 2,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_d_head": 32,
        },
        "yarn",
        None,
        {"layer_types": ["attention"] * 2},
        {},
        tied=TIED,
        no_rope={"position_embedding_type": "nope"},
        mamba={"layer_types": ["mamba", "attention"]},
    ),
    "phimoe": family(
        LOCAL | BIAS | {"lm_head_bias": True},
        "",
        None,
        {},
        {"window": Cell(WINDOW)},
        no_bias=NO_BIAS,
        no_head_bias={"lm_head_bias": False},
        tied=TIED,
        # Short factors only: beyond the original length transformers keeps these, the authors take the long ones.
        longrope={
            "rope_parameters": ROPES["longrope short"]
            | {
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [1.0, 2, 3, 4, 6, 7, 8, 9],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "gpt_oss": family(
        LOCAL | LAYERS,
        "linear,yarn,yarn truncate",
        None,
        {},
        {},
        layer_types={"layer_types": [F, S]},
        limit={"swiglu_limit": 1.0},
        head_dim=WIDE,
        tied=TIED,
    ),
    "deepseek_v2": family(
        MLA | ROUTED | {"topk_method": "greedy"},
        MLA_ROPES,
        None,
        {},
        {},
        no_q_lora=NO_Q_LORA,
        groups=GROUPS | {"topk_method": "group_limited_greedy"},
        all_sparse={"first_k_dense_replace": 0},
        attention_bias=BIAS,
    ),
    "deepseek_v3": family(
        MLA | ROUTED,
        MLA_ROPES,
        None,
        {},
        {},
        no_q_lora=NO_Q_LORA,
        groups=GROUPS,
        plain=PLAIN,
        attention_bias=BIAS,
        halves={"rope_interleave": False},
    ),
    "glm4_moe": family(
        ROUTED | {"head_dim": 16},
        MAIN,
        0.5,
        {},
        {},
        qk_norm={"use_qk_norm": True},
        attention_bias=BIAS,
        groups=GROUPS,
        plain=PLAIN,
        head_dim=WIDE,
        tied=TIED,
    ),
    "glm4_moe_lite": family(
        MLA | ROUTED | SPARSE_LAYERS, "yarn", None, {}, {}, groups=GROUPS, plain=PLAIN, no_q_lora=NO_Q_LORA
    ),
    "dots1": family(
        ROUTED | {"head_dim": 16, "sliding_window": None},
        "yarn",
        None,
        {"layer_types": None},
        {},
        window=LAYERS,
        plain=PLAIN,
        normalised=NORMALISED,
        attention_bias=BIAS,
        tied=TIED,
    ),
    "ernie4_5_moe": family(
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "head_dim": 16},
        "linear",
        None,
        {},
        {},
        bias={"use_bias": True},
        interval={"moe_layer_interval": 2, "num_hidden_layers": 4},
        tied=TIED,
        no_shared={"moe_num_shared_experts": 0},
    ),
    "lfm2_moe": family(
        EXPERTS | TIED | {"num_dense_layers": 1, "layer_types": ["conv", F]},
        "",
        None,
        {},
        {},
        plain=PLAIN,
        no_bias={"use_expert_bias": False},
        conv_bias={"conv_bias": True},
        scaling={"routed_scaling_factor": 2.0},
        untied=UNTIED,
    ),
    "minimax": family(LOCAL | {"head_dim": 16, "layer_types": [F, F]}, "", None, {}, {}),
    "longcat_flash": family(
        MLA
        | {
            "num_layers": 2,
            "num_hidden_layers": None,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "n_routed_experts": 8,
            "zero_expert_num": 2,
            "head_dim": 8,
            "intermediate_size": None,
            "routed_scaling_factor": 1.5,
        },
        "yarn mscale",
        None,
        {},
        {},
    ),
    "solar_open": family(
        ROUTED | {"head_dim": 16, "first_k_dense_replace": None}, "yarn", None, {}, {}, plain=PLAIN, groups=GROUPS
    ),
    "jamba": family(
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        None,
        None,
        {},
        {},
        tied=TIED,
    ),
    "afmoe": family(
        EXPERTS | LAYERS | {"num_dense_layers": 1, "num_shared_experts": 1},
        "yarn",
        None,
        {},
        {},
        mup={"mup_enabled": True},
        scale={"route_scale": 2.0},
    ),
    "exaone_moe": family(
        EXPERTS
        | LAYERS
        | {"mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
        "yarn",
        None,
        {},
        {},
        plain=PLAIN,
    ),
    "qwen3_next": family(EXPERTS | LINEAR, "yarn", 0.5, {}, {}, plain=PLAIN, attention_bias=BIAS),
    "mellum": family(
        EXPERTS | LAYERS | by_kind(None), None, None, {}, {}, plain=PLAIN, attention_bias=BIAS, yarn=by_kind("yarn")
    ),
    "laguna": family(EXPERTS | LAYERS | SHARED | by_kind(None), None, None, {}, {}, no_gate={"gating": False}),
    "deepseek_v32": family(MLA | ROUTED | INDEX | SPARSE_LAYERS, "yarn", None, {}, {}),
    "glm_moe_dsa": family(MLA | ROUTED | INDEX | SPARSE_LAYERS, "", None, {}, {}),
    "gemma4_text": family(
        {
            "head_dim": 16,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 160,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
        }
        | LAYERS
        | TIED
        | by_kind(None),
        None,
        None,
        {},
        {},
        softcap=SOFTCAP,
    ),
    "mimo_v2_flash": family(
        ROUTED
        | LAYERS
        # An even number of its 24 items is turned, 0.334 of them.
        | {"head_dim": 24, "v_head_dim": 8, "layer_types": [F, S], "mlp_layer_types": ["dense", "sparse"]}
        | by_kind(None),
        None,
        None,
        {},
        {},
    ),
}
