"""What the golden grid consists of: tiny configs by family, and the features that each family's config can have.

Plain dicts, in the spelling of transformers 5: `make_grid.py` gives them to transformers, whose `save_pretrained`
writes the config.json that the tests read. A cell named `X old` is cell X in the spelling of transformers 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
PROMPT_TOKENS, NEW_TOKENS, EARLY = 24, 30, 8
ENDS = "ends"  # the cell whose reply ends at one of several ids of generation_config.json

BASE: Config = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 1.7, 2.0, 2.2], "long_factor": [1.0, 2, 3, 4, 6, 7, 8, 9]}
ROPES: dict[str, Config] = {
    "theta": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 32, "rope_theta": 10000.0},
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "yarn attention_factor": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 0.5},
    },
    "yarn mscale": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"mscale": 1.5, "mscale_all_dim": 0.5},
    },
    "yarn equal": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "yarn truncate": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"truncate": False},
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope short": {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "longrope crossing": {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "longrope long": {"rope_type": "longrope", "original_max_position_embeddings": 4, "rope_theta": 10000.0},
}
MAIN = "theta linear llama3 yarn"
LONG = "longrope short,longrope crossing,longrope long"


@dataclass(frozen=True)
class Cell:
    """One config. changes: over the family's; extra: tensors beside those that save_pretrained writes, name -> the
    tensor that they are copies of, or a shape; expect: per backend, what the test wants other than the tokens, with
    its reason; old: whether it is tried in transformers 4's spelling too."""

    changes: Config = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    expect: dict[str, Any] = field(default_factory=dict)
    old: bool = False


@dataclass(frozen=True)
class GridFamily:
    """base: config over BASE; old: keys that transformers 4 wrote for this family besides, None: did not write."""

    base: Config
    cells: dict[str, Cell]
    old: Config = field(default_factory=dict)


def family(
    base: Config | None = None,
    ropes: str = MAIN,
    rotary: int = 16,
    old: Config | None = None,
    extra_cells: dict[str, Cell] | None = None,
    /,
    **cells: Config,
) -> GridFamily:
    """ropes: names in ROPES, those with a blank in a list with commas; rotary: items of a head that are rotated; cells:
    changes by feature."""
    base = base or {}
    found = {"default": Cell()}
    own = base.get("rope_parameters", {})
    for kind in [each.strip() for each in ropes.split("," if "," in ropes else " ") if each]:
        rope = own | ROPES[kind]
        phi3 = "original_max_position_embeddings" in base and "original_max_position_embeddings" in rope
        if "longrope" in kind:
            rope |= {name: list(values[: rotary // 2]) for name, values in FACTORS.items()}
        beside = {"original_max_position_embeddings": rope["original_max_position_embeddings"]} if phi3 else {}
        found[kind] = Cell({"rope_parameters": rope} | beside, old=True)
    found |= {name.replace("_", " "): Cell(changes) for name, changes in cells.items()}
    return GridFamily(base, found | (extra_cells or {}), old or {})


ALL = "theta,linear,llama3,yarn,yarn attention_factor,yarn mscale,yarn truncate,dynamic," + LONG
SOME = "theta,linear,llama3,yarn,dynamic," + LONG
ENDING = {ENDS: Cell()}
HEADS = {
    "tied head equal": Cell({"tie_word_embeddings": True}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "tied head other": Cell({"tie_word_embeddings": True}, {"lm_head.weight": [160, 64]}),
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
WIDE = {"head_dim": 24}
WINDOW = {"sliding_window": 8}
S, F = "sliding_attention", "full_attention"
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
GPT: Config = {
    **{"hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None},
    **{"num_key_value_heads": None, "max_position_embeddings": None},
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
BIAS = {"attention_bias": True}


def layered(kind: str, theta: float) -> Cell:
    """RoPE of its own for layers without a window."""
    rope = ROPES[kind] | {"rope_theta": theta}
    return Cell({"rope_parameters": {S: {"rope_type": "default", "rope_theta": theta}, F: rope}}, old=True)


def partial(share: float) -> Config:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}}


DENSE: dict[str, GridFamily] = {
    "llama": family(
        {},
        ALL,
        16,
        {},
        ENDING | HEADS,
        tied=TIED,
        mha=MHA,
        mqa=MQA,
        head_dim=WIDE,
        attention_bias=BIAS,
        mlp_bias={"mlp_bias": True},
        relu={"hidden_act": "relu"},
    ),
    "mistral": family(
        {"sliding_window": None}, SOME, 16, {}, {"window": Cell(WINDOW, old=True)}, mqa=MQA, head_dim=WIDE, tied=TIED
    ),
    "qwen2": family(
        {},
        SOME,
        16,
        {"layer_types": None},
        ENDING | HEADS | {"window": Cell(WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, old=True)},
        tied=TIED,
        mha=MHA,
        window_all={**WINDOW, "use_sliding_window": True, "max_window_layers": 0},
        window_unused={**WINDOW, "use_sliding_window": False},
        layer_types={**WINDOW, "use_sliding_window": True, "layer_types": [S, F]},
    ),
    "qwen3": family(
        {"head_dim": 16},
        SOME,
        16,
        {"layer_types": None},
        {"window": Cell(WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, old=True)},
        tied=TIED,
        mqa=MQA,
        head_dim=WIDE,
        attention_bias=BIAS,
    ),
    "opt": family(
        {
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "tie_word_embeddings": True,
        },
        "",
        0,
        {},
        ENDING
        | {
            "projected": Cell({"word_embed_proj_dim": 32}),
            "norm after": Cell({"do_layer_norm_before": False}),
            "no bias": Cell({"enable_bias": False}),
            "tied head equal": Cell({}, {"lm_head.weight": "model.decoder.embed_tokens.weight"}),
        },
        untied=UNTIED,
    ),
    "cohere": family(
        {"tie_word_embeddings": True},
        MAIN,
        qk_norm={"use_qk_norm": True},
        logit_scale={"logit_scale": 0.5},
        attention_bias=BIAS,
        mha=MHA,
        untied=UNTIED,
    ),
    "cohere2": family(
        {"tie_word_embeddings": True, "sliding_window": 8, "num_hidden_layers": 4, "head_dim": 16},
        MAIN,
        16,
        {"layer_types": None, "sliding_window_pattern": 4},
        logit_scale={"logit_scale": 0.5},
        attention_bias=BIAS,
        head_dim=WIDE,
        wide_window={"sliding_window": 100},
        layer_types={"layer_types": [S, F, F, S]},
    ),
    "ernie4_5": family({"head_dim": 16}, MAIN, tied=TIED, bias={"use_bias": True}, head_dim=WIDE, mqa=MQA),
    "exaone4": family(
        {"sliding_window": 8, "head_dim": 16, "num_hidden_layers": 4},
        SOME,
        16,
        {},
        {},
        tied=TIED,
        layer_types={"layer_types": [S, F, F, F]},
        no_window={"sliding_window": None, "layer_types": [F] * 4, "sliding_window_pattern": None},
    ),
    "gemma": family(
        GEMMA, MAIN, head_dim=WIDE, mqa=MQA, attention_bias=BIAS, untied=UNTIED, gelu={"hidden_act": "gelu"}
    ),
    "gemma2": family(
        GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 16},
        MAIN,
        16,
        {"layer_types": None},
        ENDING,
        head_dim=WIDE,
        scalar={"query_pre_attn_scalar": 64},
        softcaps={"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
        no_final_softcap={"final_logit_softcapping": None},
        no_softcaps={"final_logit_softcapping": None, "attn_logit_softcapping": None},
        layer_types={"layer_types": [F, S]},
        wide_window={"sliding_window": 100},
        attention_bias=BIAS,
    ),
    "gemma3_text": family(
        GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
        "",
        16,
        {"layer_types": None, "sliding_window_pattern": 6},
        {
            "theta": Cell(
                {"rope_parameters": {S: ROPES["theta"], F: ROPES["theta"] | {"rope_theta": 50000.0}}}, old=True
            ),
            "linear": Cell(
                {"rope_parameters": {S: ROPES["theta"], F: ROPES["linear"] | {"rope_theta": 1e6}}}, old=True
            ),
            "yarn": Cell({"rope_parameters": {S: ROPES["theta"], F: ROPES["yarn"] | {"rope_theta": 1e6}}}),
        },
        head_dim=WIDE,
        scalar={"query_pre_attn_scalar": 64},
        layer_types={"layer_types": [S, F, S, F, S, S]},
        softcap={"final_logit_softcapping": 2.0},
        attn_softcap={"attn_logit_softcapping": 1.0},
        wide_window={"sliding_window": 100},
        untied=UNTIED,
    ),
    "glm": family(
        {"head_dim": 16},
        MAIN,
        no_bias={"attention_bias": False},
        partial=partial(0.25),
        whole=partial(1.0),
        head_dim=WIDE,
        mqa=MQA,
        tied=TIED,
    ),
    "glm4": family(
        {"head_dim": 16},
        MAIN,
        no_bias={"attention_bias": False},
        partial=partial(0.25),
        head_dim=WIDE,
        mqa=MQA,
        tied=TIED,
    ),
    "gpt2": family(
        GPT | {"n_embd": 48, "tie_word_embeddings": True},
        "",
        0,
        {},
        ENDING,
        n_inner={"n_inner": 96},
        inverse_layer={"scale_attn_by_inverse_layer_idx": True},
        unscaled={"scale_attn_weights": False},
        gelu={"activation_function": "gelu"},
        untied=UNTIED,
    ),
    "gpt_bigcode": family(
        GPT | {"tie_word_embeddings": True},
        "",
        0,
        {},
        multi_head={"multi_query": False},
        unscaled={"scale_attn_weights": False},
        gelu={"activation_function": "gelu"},
        n_inner={"n_inner": 96},
        untied=UNTIED,
    ),
    "gpt_neox": family(
        {"num_key_value_heads": None},
        MAIN,
        4,
        {},
        ENDING,
        serial={"use_parallel_residual": False},
        partial=partial(0.5),
        whole=partial(1.0),
        no_bias={"attention_bias": False},
        gelu_new={"hidden_act": "gelu_new"},
        relu={"hidden_act": "relu"},
        tied=TIED,
    ),
    "gptj": family(
        GPT | {"rotary_dim": 8},
        "",
        0,
        {},
        n_inner={"n_inner": 96},
        rotary_dim={"rotary_dim": 16},
        rotary_dim_4={"rotary_dim": 4},
        tied=TIED,
    ),
    "granite": family(
        {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
        SOME,
        attention_bias=BIAS,
        mlp_bias={"mlp_bias": True},
        tied=TIED,
        plain={
            "logits_scaling": 1.0,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
        },
    ),
    "helium": family({"head_dim": 16}, MAIN, attention_bias=BIAS, mlp_bias={"mlp_bias": True}, tied=TIED, mqa=MQA),
    "hunyuan_v1_dense": family(
        {"head_dim": 16},
        "theta,linear,yarn,dynamic",
        16,
        {},
        {
            "alpha": Cell(
                {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}},
                old=True,
            )
        },
        attention_bias=BIAS,
        tied=TIED,
        head_dim=WIDE,
    ),
    "internlm3": family(
        {"head_dim": 16}, SOME, bias={"attention_bias": True, "mlp_bias": True}, tied=TIED, head_dim=WIDE
    ),
    "exaone": family({}, SOME, tied=TIED, mqa=MQA),
    "nanochat": family(
        {},
        MAIN,
        softcap={"final_logit_softcapping": 2.0},
        no_softcap={"final_logit_softcapping": None},
        attention_bias=BIAS,
        mha=MHA,
        tied=TIED,
    ),
    "nemotron": family(
        {}, MAIN, 8, {}, whole=partial(1.0), attention_bias=BIAS, mlp_bias={"mlp_bias": True}, tied=TIED, head_dim=WIDE
    ),
    "olmo2": family({}, SOME, attention_bias=BIAS, tied=TIED, mqa=MQA),
    "olmo3": family(
        {"sliding_window": 8, "num_hidden_layers": 4},
        "",
        16,
        {},
        {"theta": layered("theta", 300.0)} | {kind: layered(kind, 5e5) for kind in ("linear", "llama3", "yarn")},
        layer_types={"layer_types": [F, S, F, S]},
        attention_bias=BIAS,
        tied=TIED,
        wide_window={"sliding_window": 100},
    ),
    "phi": family(
        {"rope_parameters": PARTIAL["rope_parameters"]},
        MAIN,
        8,
        {},
        ENDING,
        qk_layernorm={"qk_layernorm": True},
        whole=partial(1.0),
        mha=MHA,
        tied=TIED,
    ),
    "phi3": family(
        {"original_max_position_embeddings": 128},
        "theta," + LONG,
        16,
        {},
        ENDING | {"window": Cell(WINDOW, old=True)},
        partial=partial(0.5),
        mha=MHA,
        tied=TIED,
        partial_longrope={
            "rope_parameters": ROPES["longrope long"]
            | {"partial_rotary_factor": 0.5, **{name: values[:4] for name, values in FACTORS.items()}},
            "original_max_position_embeddings": 4,
        },
    ),
    "seed_oss": family(
        {"head_dim": 16},
        SOME,
        no_bias={"attention_bias": False},
        out_bias={"attention_out_bias": True},
        mlp_bias={"mlp_bias": True},
        tied=TIED,
        head_dim=WIDE,
    ),
    "smollm3": family(
        {"num_hidden_layers": 4},
        SOME,
        16,
        {},
        tied=TIED,
        no_rope_layers={"no_rope_layers": [1, 0, 0, 1]},
        interval={"no_rope_layer_interval": 2},
        attention_bias=BIAS,
        mlp_bias={"mlp_bias": True},
        window={"sliding_window": 8, "use_sliding_window": True},
    ),
    "stablelm": family(
        {},
        MAIN,
        4,
        {},
        ENDING,
        qkv_bias={"use_qkv_bias": True},
        qk_layernorm={"qk_layernorm": True},
        parallel={"use_parallel_residual": True},
        partial=partial(0.5),
        whole=partial(1.0),
        tied=TIED,
    ),
    "starcoder2": family(
        {},
        MAIN,
        16,
        {},
        {"window": Cell(WINDOW, old=True)},
        no_bias={"use_bias": False},
        tied=TIED,
        gelu={"hidden_act": "gelu"},
        mqa=MQA,
    ),
}
