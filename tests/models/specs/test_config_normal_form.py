"""One form of config.json: rules by name, idempotence, contradictions."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.errors import ConfigError, FlashError
from mlx_flash.models.specs.config_normal_form import normalise, rope_type
from mlx_flash.models.specs.key_checks import check_fixed, unknown_keys, unknown_keys_text
from mlx_flash.models.specs.key_spellings import DEFAULTS, PERIODS, RENAMES, WRAPPERS
from mlx_flash.models.specs.known_keys import FIXED, HARMLESS, READ_HERE, UNUSED
from mlx_flash.models.specs.wrappers import text_name, text_names, unwrap

PLAIN = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"


def of(kind: str, **keys: Any) -> dict[str, Any]:
    return normalise({"model_type": kind, **keys})


def test_rope_comes_to_the_top() -> None:
    config = of("llama", rope_parameters=PLAIN | {"partial_rotary_factor": 0.5})
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] is None and config["partial_rotary_factor"] == 0.5
    assert config["rope_parameters"] == PLAIN | {"partial_rotary_factor": 0.5}
    config = of("llama", rope_parameters=YARN, max_position_embeddings=64)
    wanted = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config["rope_scaling"] == wanted
    assert of("llama", rope_scaling={"type": "linear", "factor": 2.0})["rope_scaling"]["rope_type"] == "linear"
    assert of("llama", rope_scaling={"rope_type": "linear", "factor": 2.0})["rope_scaling"]["type"] == "linear"
    assert of("llama", rope_scaling={"type": "mrope", "mrope_section": [1, 2, 3]})["rope_scaling"] is None
    assert of("llama", rope_scaling={"type": "su", "short_factor": []})["rope_scaling"]["type"] == "longrope"
    assert of("llama", rope_scaling={"rope_theta": 3e4, "rope_type": "default"})["rope_theta"] == 3e4
    assert "rope_scaling" not in of("llama") and "rope_theta" not in of("llama")


def test_rope_by_layer_type() -> None:
    nested = {FULL: YARN | {"original_max_position_embeddings": 8}, SLIDING: {"rope_theta": 1e4}}
    config = of("gemma3_text", rope_parameters=nested)
    assert config["rope_theta"] == 5e5 and config["rope_local_base_freq"] == 1e4
    assert config["rope_scaling"]["factor"] == 4.0 and config["rope_parameters"] == nested
    config = of("olmo3", rope_parameters={FULL: YARN, SLIDING: PLAIN})
    assert config["rope_theta"] == 5e5 and config["rope_scaling"]["type"] == "yarn"
    both = {FULL: PLAIN, SLIDING: {"rope_theta": 10000.0}}
    config = of("olmo3", rope_parameters=both)
    assert config["rope_theta"] == 5e5 and config["rope_parameters"] == both
    with pytest.raises(ConfigError, match="sliding_attention.rope_type is 'yarn'"):
        of("gemma3_text", rope_parameters={FULL: PLAIN, SLIDING: YARN})
    with pytest.raises(ConfigError, match="rope_local_base_freq"):
        of("gemma3_text", rope_local_base_freq=2e4, rope_parameters=nested)
    assert of("llama", rope_parameters={FULL: PLAIN, SLIDING: dict(PLAIN)})["rope_theta"] == 5e5
    with pytest.raises(ConfigError, match="one RoPE for all layers"):
        of("llama", rope_parameters={FULL: PLAIN, SLIDING: PLAIN | {"rope_theta": 1e4}})
    mellum = {FULL: YARN, SLIDING: PLAIN}
    assert of("mellum", rope_parameters=mellum)["rope_parameters"] == mellum


def test_what_reads_rope_parameters_only_gets_them() -> None:
    config = of("mistral4", rope_theta=3e4, rope_scaling={"type": "yarn", "factor": 2.0})
    assert config["rope_parameters"]["rope_theta"] == 3e4 and config["rope_parameters"]["factor"] == 2.0


@pytest.mark.parametrize(
    ("kind", "given_keys", "wanted"),
    [
        ("exaone", {"num_hidden_layers": 2, "rms_norm_eps": 1e-5}, {"num_layers": 2, "layer_norm_epsilon": 1e-5}),
        ("gpt2", {"n_positions": 64}, {"n_ctx": 64}),
        (
            "gpt_neox",
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
        ),
        ("gpt_neox", {"rotary_emb_base": 2e4, "rotary_pct": 1.0}, {"rope_theta": 2e4, "partial_rotary_factor": 1.0}),
        ("gpt_neox", {}, {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
        ("internlm3", {"attention_bias": True, "mlp_bias": False}, {"qkv_bias": True, "bias": False}),
        ("qwen3_moe", {"num_local_experts": 8}, {"num_experts": 8}),
        ("mellum", {"num_local_experts": 8}, {"num_experts": 8}),
        ("qwen3_moe", {"hidden_size": 64, "num_attention_heads": 4}, {"head_dim": 16}),
        ("minimax_m2", {"head_dim": 32, "partial_rotary_factor": 0.5}, {"rotary_dim": 16}),
        ("phi", {}, {"partial_rotary_factor": 0.5}),
        ("mixtral", {}, {"rope_theta": 1e6}),
        ("granite", {}, {"tie_word_embeddings": False}),
        ("granite", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("cohere2", {"layer_types": [SLIDING, FULL] * 2}, {"sliding_window_pattern": 2}),
        ("gemma3_text", {"_sliding_window_pattern": 3}, {"sliding_window_pattern": 3}),
        (
            "gemma3_text",
            {"_sliding_window_pattern": 6, "layer_types": [SLIDING] * 3},
            {"sliding_window_pattern": 6},
        ),
        ("qwen3_next", {"layer_types": ["linear_attention", FULL]}, {"full_attention_interval": 2}),
        ("exaone4", {"layer_types": [SLIDING, FULL] * 2}, {"sliding_window_pattern": "LGLG"}),
        (
            "exaone4",
            {"layer_types": [SLIDING, FULL] * 2, "sliding_window_pattern": 2},
            {"sliding_window_pattern": "LG"},
        ),
        ("qwen3_vl_moe_text", {"num_local_experts": 8}, {"num_experts": 8, "norm_topk_prob": True}),
        (
            "gemma4_text",
            {"layer_types": [SLIDING, FULL], "per_layer_config": {"01": {"head_dim": 64}}},
            {"global_head_dim": 64},
        ),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse"]}, {"first_k_dense_replace": 1}),
        (
            "deepseek_v32",
            {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 3},
            {"first_k_dense_replace": 1},
        ),
        (
            "granitemoehybrid",
            {"layer_types": ["linear_attention", FULL], "time_step_limit": [0.0, {"__float__": "Infinity"}]},
            {"layer_types": ["mamba", "attention"], "time_step_limit": [0.0, float("inf")]},
        ),
        ("exaone_moe", {"mlp_layer_types": ["dense", "sparse"]}, {"is_moe_layer": [False, True]}),
    ],
)
def test_names_and_defaults(kind: str, given_keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = of(kind, **given_keys)
    assert {key: config.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_theta": 1e4, "rope_parameters": PLAIN}, "'rope_theta' is 10000.0, but 'rope_parameters.rope_theta'"),
        ({"rope_theta": 1e4, "rope_scaling": PLAIN}, "'rope_theta' is 10000.0, but 'rope_scaling.rope_theta'"),
        ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": PLAIN}, "'rope_scaling.rope_type'"),
        (
            {"rope_scaling": YARN | {"factor": 2.0}, "rope_parameters": YARN},
            "'rope_scaling.factor' is 2.0, but 'rope_parameters.factor' is 4.0",
        ),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "'rope_type' is 'linear', but 'type' is 'yarn'"),
        ({"rope_scaling": {"type": 3}}, "RoPE type is 3"),
        ({"rope_scaling": "linear"}, "'rope_scaling' is 'linear', which is not an object"),
        ({"rope_parameters": [1]}, "'rope_parameters' is .1., which is not an object"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8}, "'num_local_experts' is 8"),
        ({"model_type": "gpt_neox", "rotary_emb_base": 2e4, "rope_theta": 1e4}, "'rotary_emb_base' is 20000.0"),
        (
            {"model_type": "qwen3_next", "full_attention_interval": 3, "layer_types": ["linear_attention", FULL]},
            "'full_attention_interval' is 3",
        ),
        ({"model_type": "qwen3_next", "layer_types": [FULL, "linear_attention", FULL, FULL]}, "does not repeat"),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense"]}, "dense layers after sparse"),
        (
            {"model_type": "gemma4_text", "layer_types": [SLIDING, FULL], "per_layer_config": {"0": {"head_dim": 64}}},
            "'per_layer_config' .* all layers of full attention",
        ),
    ],
)
def test_contradictions_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        normalise({"model_type": "llama"} | config)


def test_a_text_model_is_lifted_out() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 64, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    quantisation = {"bits": 4, "group_size": 32, "language_model.model.layers.0.mlp.up_proj": {"bits": 8}}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 3}, "eos_token_id": [1, 106]}
    config = normalise(whole | {"quantization": quantisation | {"vision_tower.x.y": False}, "flash": {"layers": []}})
    assert config["model_type"] == "gemma3_text" and config["hidden_size"] == 64 and config["eos_token_id"] == [1, 106]
    assert config["num_attention_heads"] == 8 and config["rope_scaling"]["factor"] == 8.0 and "flash" in config
    assert config["quantization"] == {"bits": 4, "group_size": 32, "model.layers.0.mlp.up_proj": {"bits": 8}}
    assert "vision_config" not in config and "text_config" not in config
    assert normalise({"model_type": "qwen2_vl", "hidden_size": 8, "vision_config": {}})["model_type"] == "qwen2"
    mixture = {"model_type": "llama4", "text_config": {"rope_parameters": PLAIN}}
    assert normalise(mixture)["text_config"]["rope_theta"] == 5e5
    nested = {"model_type": "llama4", "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    assert normalise(nested)["text_config"]["tie_word_embeddings"] is False
    # The whole model's word about its head is the one that counts.
    tied = {"model_type": "mistral3", "text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}
    assert normalise(tied)["tie_word_embeddings"] is True
    for unknown in ({"model_type": "mamba"}, None, {"model_type": 3}):
        assert unwrap({"model_type": "gemma3", "text_config": unknown})["model_type"] == "gemma3"


def test_names_of_a_text_model() -> None:
    for name in ("language_model.model.norm.weight", "model.language_model.norm.weight", "model.norm.weight"):
        assert text_name(name) == "model.norm.weight"
    assert text_name("language_model.lm_head.weight") == "lm_head.weight"
    for name in ("vision_tower.x", "model.vision_tower.x", "visual.x", "model.visual.x", "multi_modal_projector.x"):
        assert text_name(name) is None
    with pytest.raises(FlashError, match=r"are both the text model's 'model.norm.weight'"):
        text_names(
            {"model_type": "llava", "text_config": {}}, ["model.norm.weight", "language_model.model.norm.weight"]
        )
    assert text_names({"model_type": "gpt2"}, ["transformer.h.0.x", "wte.x"]) == {
        "h.0.x": "transformer.h.0.x",
        "wte.x": "wte.x",
    }


KINDS = sorted(
    {"gemma4_text", *DEFAULTS, *RENAMES, *PERIODS, *WRAPPERS, "llama", "qwen3_5_moe_text", "ministral3", "x"}
)
ROPES = st.sampled_from([None, PLAIN, YARN, {"type": "linear", "factor": 2.0}, {FULL: PLAIN, SLIDING: PLAIN}, {}])


@given(
    st.sampled_from(KINDS),
    ROPES,
    ROPES,
    st.sampled_from([None, 5e5, 1e4]),
    st.sampled_from([None, [SLIDING, FULL], [FULL], [SLIDING] * 3]),
    st.sampled_from([None, {"model_type": "llama", "rope_parameters": PLAIN}, {"hidden_size": 8}]),
)
def test_twice_is_once(kind: str, one: Any, other: Any, base: Any, types: Any, text: Any) -> None:
    values = {"rope_parameters": one, "rope_scaling": other, "rope_theta": base, "layer_types": types}
    config = {"model_type": kind, **{key: value for key, value in values.items() if value is not None}}
    if text is not None:
        config["text_config"] = text
    before = deepcopy(config)
    try:
        once = normalise(config)
    except ConfigError:
        return
    assert config == before
    assert normalise(once) == once


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4), st.data())
def test_odd_values_are_config_errors_or_nothing(value: Any, data: Any) -> None:
    keys = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "mlp_layer_types", "text_config")
    key = data.draw(st.sampled_from([*keys, "num_hidden_layers", "hidden_size", "num_attention_heads", "model_type"]))
    with suppress(ConfigError):
        normalise({"model_type": data.draw(st.sampled_from(KINDS)), "layer_types": [FULL]} | {key: value})


def test_rope_type() -> None:
    assert rope_type({}) == "default" and rope_type({"type": "su"}) == "longrope"


def test_unknown_keys() -> None:
    config = {"model_type": "llama", "hidden_size": 8, "mup": 2, "no": None, "use_cache": True, "rope_theta": 1.0}
    assert unknown_keys(config, {"hidden_size"}) == ["mup"]
    assert unknown_keys(config, ()) == ["hidden_size", "mup"]
    wrapped = {"model_type": "mistral3", "text_config": {"model_type": "mistral", "odd": 1}, "vision_config": {"a": 1}}
    assert unknown_keys(wrapped, ()) == ["text_config.odd"]
    text = unknown_keys_text([f"k{i}" for i in range(20)])
    assert text.startswith("config.json: not understood and not used: k0, k1") and text.endswith("and 8 more")


def test_fixed_values() -> None:
    check_fixed({"model_type": "minimax", "full_attn_alpha_factor": None})
    for kind, key, value in (
        ("minimax", "full_attn_alpha_factor", 1),
        ("gemma2", "use_bidirectional_attention", True),
    ):
        with pytest.raises(ConfigError, match=f"'{key}' is '{value}'; {kind} runs with"):
            check_fixed({"model_type": kind, key: value})
    with pytest.raises(ConfigError, match="'hidden_act' is 'relu'; qwen2_moe runs with 'silu' or 'swish' only"):
        check_fixed({"model_type": "qwen2_moe", "hidden_act": "relu"}, mixture=True)


def test_tables_agree() -> None:
    """A key is of one kind only."""
    harmless: set[str] = set().union(*HARMLESS.values())
    for kind, keys in FIXED.items():
        others = harmless | UNUSED.get(kind, frozenset()) | READ_HERE.get(kind, frozenset())
        assert not keys.keys() & others, kind
    for kind, fitted in READ_HERE.items():
        assert not fitted & (harmless | UNUSED.get(kind, frozenset())), kind
