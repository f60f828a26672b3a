"""A config.json of transformers 5 in the spelling of transformers 4."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
# What the keys at the top level were called, where not `rope_theta` and `partial_rotary_factor`.
NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
RENAMED = {
    "internlm3": {"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    "exaone": {
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
}
S, F = "sliding_attention", "full_attention"


def old_spelling(config: Config, others: Config) -> Config:
    """others: keys that transformers 4 wrote for this family besides; None: did not write."""
    found = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    if "text_config" in config:
        inner = old_spelling(config["text_config"], others)
        return found | {"text_config": inner, "torch_dtype": "float32", "transformers_version": "4.51.0"}
    for name, was in RENAMED.get(config["model_type"], {}).items():
        found[was] = found.pop(name)
    found |= {"torch_dtype": "float32", "transformers_version": "4.51.0"}
    rope = config.get("rope_parameters")
    if rope:
        if F in rope:
            if S in rope:
                found["rope_local_base_freq"] = rope[S]["rope_theta"]
            rope = rope[F]
        theta, partial = NAMES.get(config["model_type"], ("rope_theta", "partial_rotary_factor"))
        found[theta] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            found[partial] = rope["partial_rotary_factor"]
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        scaled = rest.get("rope_type", "default") != "default"
        found["rope_scaling"] = rest | {"type": rest["rope_type"]} if scaled else None
        if scaled and "original_max_position_embeddings" in config:  # beside it, not within
            del found["rope_scaling"]["original_max_position_embeddings"]
    for key, value in others.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    return found
