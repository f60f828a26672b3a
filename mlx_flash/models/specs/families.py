"""The families of dense models that our own decoder runs: one table, FAMILIES, a row each.

A row says where a family's tensors are and which backends run it. Families that mlx-lm alone runs are in
dense_families.py, mixtures of experts in mixtures.py. Nothing here reads configs or weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One row of the table.

    names: a checkpoint's modules by role; {i} is the layer
    backends: the backends that run the family
    activation_key: the key of config.json that names the activation
    gated: whether an FFN has a gate
    norm: "rms" or "layer"
    config_form: the reader in config_reader.py that reads its config
    biases: of attention: "said", as "attention_bias" says; "qkv", always for queries, keys and values only
    ffn_bias_key: the key of config.json that says whether FFNs have biases; None: they never have
    mlx_module: mlx-lm's file of the model, if its name is not the family's
    attribute: the FFN's name in a layer of mlx-lm's model
    """

    names: Mapping[str, str]
    backends: tuple[str, ...]
    activation_key: str
    gated: bool = True
    norm: str = "rms"
    title: str = ""
    config_form: str = field(default="llama", kw_only=True)
    biases: Literal["said", "qkv"] = field(default="said", kw_only=True)
    ffn_bias_key: str | None = field(default=None, kw_only=True)
    mlx_module: str | None = field(default=None, kw_only=True)
    attribute: str = field(default="mlp", kw_only=True)


def _llama_names(qk_norm: bool = False) -> dict[str, str]:
    layer = "model.layers.{i}."
    names = {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "attn_norm": layer + "input_layernorm",
        "q": layer + "self_attn.q_proj",
        "k": layer + "self_attn.k_proj",
        "v": layer + "self_attn.v_proj",
        "o": layer + "self_attn.o_proj",
        "ffn_norm": layer + "post_attention_layernorm",
        "gate": layer + "mlp.gate_proj",
        "up": layer + "mlp.up_proj",
        "down": layer + "mlp.down_proj",
    }
    if qk_norm:
        names |= {"q_norm": layer + "self_attn.q_norm", "k_norm": layer + "self_attn.k_norm"}
    return names


_OPENELM = "transformer.layers.{i}."
_OPT = "model.decoder.layers.{i}."
BOTH = ("mlx", "numpy")

FAMILIES: dict[str, Family] = {
    "openelm": Family(
        {
            "embed": "transformer.token_embeddings",
            "norm": "transformer.norm",
            "head": "lm_head",
            "attn_norm": _OPENELM + "attn_norm",
            "qkv": _OPENELM + "attn.qkv_proj",
            "o": _OPENELM + "attn.out_proj",
            "q_norm": _OPENELM + "attn.q_norm",
            "k_norm": _OPENELM + "attn.k_norm",
            "ffn_norm": _OPENELM + "ffn_norm",
            "gate+up": _OPENELM + "ffn.proj_1",
            "down": _OPENELM + "ffn.proj_2",
        },
        BOTH,
        "activation_fn_name",
        title="OpenELM",
        config_form="openelm",
        attribute="ffn",
    ),
    "llama": Family(_llama_names(), BOTH, "hidden_act", title="Llama", ffn_bias_key="mlp_bias"),
    "mistral": Family(_llama_names(), BOTH, "hidden_act", title="Mistral", mlx_module="llama"),
    "qwen2": Family(_llama_names(), BOTH, "hidden_act", title="Qwen2", biases="qkv"),
    "qwen3": Family(_llama_names(qk_norm=True), BOTH, "hidden_act", title="Qwen3 (dense)"),
    "opt": Family(
        {
            "embed": "model.decoder.embed_tokens",
            "positions": "model.decoder.embed_positions",
            "project_in": "model.decoder.project_in",
            "project_out": "model.decoder.project_out",
            "norm": "model.decoder.final_layer_norm",
            "head": "lm_head",
            "attn_norm": _OPT + "self_attn_layer_norm",
            "q": _OPT + "self_attn.q_proj",
            "k": _OPT + "self_attn.k_proj",
            "v": _OPT + "self_attn.v_proj",
            "o": _OPT + "self_attn.out_proj",
            "ffn_norm": _OPT + "final_layer_norm",
            "up": _OPT + "fc1",
            "down": _OPT + "fc2",
        },
        ("numpy",),
        "activation_function",
        gated=False,
        norm="layer",
        title="OPT",
        config_form="opt",
    ),
}
