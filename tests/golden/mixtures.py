"""The golden grid's mixtures of experts; see cells.py."""

from __future__ import annotations

from .cells import (
    BIAS,
    ENDING,
    MAIN,
    MHA,
    MQA,
    ROPES,
    SOME,
    TIED,
    WIDE,
    WINDOW,
    Cell,
    Config,
    F,
    GridFamily,
    S,
    family,
    partial,
)

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
GRANITE = {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
MLA_ROPES = "theta,linear,yarn,yarn mscale,yarn equal"
SPARSE = {"num_hidden_layers": 4}
QWEN_WINDOW = Cell(WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, old=True)

BY_KIND = {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (S, F)}}
OTHER = {
    "rope_parameters": {
        S: {"rope_type": "default", "rope_theta": 300.0},
        F: {"rope_type": "default", "rope_theta": 5e5},
    }
}

MIXTURES: dict[str, GridFamily] = {
    "mixtral": family(
        LOCAL | {"sliding_window": None, "head_dim": 16},
        SOME,
        16,
        {},
        ENDING | {"window": Cell(WINDOW, old=True)},
        head_dim=WIDE,
        mqa=MQA,
        tied=TIED,
        top_1={"num_experts_per_tok": 1},
    ),
    "qwen2_moe": family(
        EXPERTS | SHARED,
        SOME,
        16,
        {"layer_types": None},
        {"window": QWEN_WINDOW},
        normalised=NORMALISED,
        tied=TIED,
        no_bias={"qkv_bias": False},
        step={"decoder_sparse_step": 2},
        dense_layer={"mlp_only_layers": [0]},
        mha=MHA,
    ),
    "qwen3_moe": family(
        EXPERTS | {"head_dim": 16},
        SOME,
        16,
        {"layer_types": None},
        ENDING | {"window": QWEN_WINDOW},
        normalised=NORMALISED,
        tied=TIED,
        attention_bias=BIAS,
        step={"decoder_sparse_step": 2},
        dense_layer={"mlp_only_layers": [0]},
        head_dim=WIDE,
    ),
    "olmoe": family(
        EXPERTS | {"moe_intermediate_size": None, "intermediate_size": 32},
        SOME,
        16,
        {},
        {},
        normalised=NORMALISED,
        clip={"clip_qkv": 0.5},
        attention_bias=BIAS,
        tied=TIED,
        mqa=MQA,
    ),
    "granitemoe": family(LOCAL | GRANITE, SOME, 16, {}, {}, attention_bias=BIAS, tied=TIED),
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
        MAIN,
        16,
        {},
        {},
        attention_bias=BIAS,
        tied=TIED,
        no_rope={"position_embedding_type": "nope"},
        mamba={"layer_types": ["mamba", "attention"]},
    ),
    "phimoe": family(
        LOCAL,
        "theta",
        16,
        {},
        {"window": Cell(WINDOW)},
        attention_bias=BIAS,
        head_bias={"lm_head_bias": True},
        tied=TIED,
        long={
            "rope_parameters": ROPES["longrope long"]
            | {
                "short_factor": [1.0] * 8,
                "long_factor": [1.0, 2, 3, 4, 6, 7, 8, 9],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
            },
            "original_max_position_embeddings": 4,
        },
    ),
    "gpt_oss": family(
        LOCAL | {"head_dim": 16, "sliding_window": 8},
        "theta,yarn,yarn truncate",
        16,
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
        8,
        {},
        {},
        no_q_lora=NO_Q_LORA,
        groups=GROUPS | {"topk_method": "group_limited_greedy"},
        normalised=NORMALISED,
        all_sparse={"first_k_dense_replace": 0},
        attention_bias=BIAS,
    ),
    "deepseek_v3": family(
        MLA | ROUTED,
        MLA_ROPES,
        8,
        {},
        {},
        no_q_lora=NO_Q_LORA,
        groups=GROUPS,
        plain=PLAIN,
        attention_bias=BIAS,
        halves={"rope_interleave": False},
    ),
    "glm4_moe": family(
        ROUTED | {"head_dim": 16} | partial(0.5),
        MAIN,
        8,
        {},
        {},
        qk_norm={"use_qk_norm": True},
        attention_bias=BIAS,
        groups=GROUPS,
        plain=PLAIN,
        whole=partial(1.0),
        head_dim=WIDE,
        tied=TIED,
    ),
    "glm4_moe_lite": family(
        MLA | ROUTED | {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": None},
        MLA_ROPES,
        8,
        {},
        {},
        groups=GROUPS,
        plain=PLAIN,
        no_q_lora=NO_Q_LORA,
    ),
    "dots1": family(
        ROUTED | {"head_dim": 16, "sliding_window": None},
        MAIN,
        16,
        {"layer_types": None},
        {"window": Cell({"sliding_window": 8, "layer_types": [S, F]})},
        groups=GROUPS,
        normalised=NORMALISED,
        attention_bias=BIAS,
        tied=TIED,
    ),
    "ernie4_5_moe": family(
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "head_dim": 16},
        MAIN,
        16,
        {},
        {},
        bias={"use_bias": True},
        interval={"moe_layer_interval": 2, **SPARSE},
        tied=TIED,
        no_shared={"moe_num_shared_experts": 0},
    ),
    "lfm2_moe": family(
        EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "theta,yarn",
        16,
        {},
        {},
        plain=PLAIN,
        no_bias={"use_expert_bias": False},
        conv_bias={"conv_bias": True},
        scaling={"routed_scaling_factor": 2.0},
        untied={"tie_word_embeddings": False},
    ),
    "minimax": family(LOCAL | {"head_dim": 16, "layer_types": [F, F]}, "theta,yarn", 16, {}, {}, tied=TIED),
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
        MLA_ROPES,
        8,
        {},
        {},
        no_route_scale={"routed_scaling_factor": 1.0},
    ),
    "solar_open": family(
        ROUTED | {"head_dim": 16} | {"first_k_dense_replace": None},
        MAIN,
        16,
        {},
        {},
        plain=PLAIN,
        groups=GROUPS,
        attention_bias=BIAS,
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
        "",
        0,
        {},
        {},
        tied=TIED,
    ),
    "afmoe": family(
        EXPERTS
        | {"head_dim": 16, "sliding_window": 8, "num_dense_layers": 1, "layer_types": [S, F], "num_shared_experts": 1},
        MAIN,
        16,
        {},
        {},
        mup={"mup_enabled": True},
        scale={"route_scale": 2.0},
    ),
    "exaone_moe": family(
        EXPERTS
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": [S, F],
            "mlp_layer_types": ["dense", "sparse"],
            "num_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        MAIN,
        16,
        {},
        {},
        plain=PLAIN,
    ),
    "qwen3_next": family(EXPERTS | LINEAR | partial(0.5), MAIN, 8, {}, {}, plain=PLAIN, attention_bias=BIAS),
    "gemma4_text": family(
        {
            "head_dim": 16,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "enable_moe_block": True,
            "sliding_window": 8,
            "layer_types": [S, F],
            "vocab_size_per_layer_input": 160,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "tie_word_embeddings": True,
        }
        | BY_KIND,
        "",
        16,
        {},
        {},
        softcap={"final_logit_softcapping": 2.0},
        theta=OTHER,
    ),
    "mellum": family(
        EXPERTS | {"head_dim": 16, "sliding_window": 8, "layer_types": [S, F]} | BY_KIND,
        "",
        16,
        {},
        {},
        plain=PLAIN,
        attention_bias=BIAS,
        theta=OTHER,
        yarn={"rope_parameters": OTHER["rope_parameters"] | {F: ROPES["yarn"]}},
    ),
    "laguna": family(
        EXPERTS | {"head_dim": 16, "sliding_window": 8, "layer_types": [S, F], **SHARED} | BY_KIND,
        "",
        16,
        {},
        {},
        no_gate={"gating": False},
        theta=OTHER,
    ),
    "deepseek_v32": family(
        MLA
        | ROUTED
        | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64, "mlp_layer_types": ["dense", "sparse"]},
        "theta,yarn",
        8,
        {},
        {},
    ),
    "glm_moe_dsa": family(
        MLA
        | ROUTED
        | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 64, "mlp_layer_types": ["dense", "sparse"]},
        "theta",
        8,
        {},
        {},
    ),
    "mimo_v2_flash": family(
        ROUTED
        | {
            "head_dim": 16,
            "v_head_dim": 8,
            "sliding_window": 8,
            "layer_types": [F, S],
            "mlp_layer_types": ["dense", "sparse"],
        }
        | BY_KIND,
        "",
        8,
        {},
        {},
        theta=OTHER,
    ),
}
