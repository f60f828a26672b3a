"""Corrections of mlx-lm's dense models: what a config or its tensors ask for and mlx-lm's code does not look at.

Biases, the size of a head, the scale of attention, caps of logits. Positions and windows are in positions.py, the
output head in output_head.py. Needs mlx-lm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.models.specs.head_tensors import FIELDS

from .compat import architecture, own_copy

BIAS_KEYS = ("attention_bias", "use_bias", "qkv_bias")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
OWN_HEAD_SIZE = ("cohere2", "internlm3")  # whose attention takes its head's size from the width
SCALED = ("gpt2", "gpt_bigcode")
HEAD_NORMS = {".q_proj.": ".q_proj.linear.", ".k_proj.": ".k_proj.linear."}
HEAD_NORMS |= {".q_layernorm.": ".q_proj.norm.", ".k_layernorm.": ".k_proj.norm."}
USUAL_CAP = {"gemma2": 30.0, "gemma3_text": None, "nanochat": 15.0}  # of the logits, where mlx-lm's code has it


def fit_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys to give mlx-lm in place of the config's, so that it builds a model that can then be corrected."""
    family = config.get("model_type")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if family in OWN_HEAD_SIZE and config.get("head_dim") is not None and type(width) is type(heads) is int:
        return {"head_dim": width // heads}
    if family == "gemma2":  # no cap: the code that reads these is not run
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        return {key: 1.0 for key in caps if key in config and config[key] is None}
    return {}


def fit_architecture(name: str, config: Mapping[str, Any]) -> Any:
    """mlx-lm's module of an architecture: `Model`, `ModelArgs`. Raises ImportError."""
    eps = config.get("rms_norm_eps")
    if name != "nanochat" or eps is None:
        return architecture(name)
    code = own_copy(name)  # whose norms are a function with a number in it
    code.rms_norm = lambda x: mx.fast.rms_norm(x, None, eps)
    return code


def fit_class(model_class: type, config: Mapping[str, Any]) -> type:
    """The architecture's class, with the cap of the logits that the config says."""
    family = str(config.get("model_type"))
    if family not in USUAL_CAP:
        return model_class
    usual = USUAL_CAP[family]
    cap = config.get("final_logit_softcapping", usual)
    if cap == usual:
        return model_class

    def without_cap(model: Any, inputs: mx.array, cache: Any, options: Mapping[str, Any]) -> mx.array:
        if family == "gemma2":
            return model.model.embed_tokens.as_linear(model.model(inputs, cache))
        if family == "nanochat":
            return model.lm_head(model.transformer(inputs, cache))
        return model_class.__call__(model, inputs, cache=cache, **options)

    class Capped(model_class):
        def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> mx.array:
            logits = without_cap(self, inputs, cache, options)
            return logits if cap is None else cap * mx.tanh(logits / cap)

    return Capped


def fit_dense_modules(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Change a model that mlx-lm has just built, before any weights are given to it."""
    family = config.get("model_type")
    for index, layer in enumerate(model.layers):
        if family in OWN_HEAD_SIZE and config.get("head_dim") is not None:
            _set_head_size(layer.self_attn, config["head_dim"])
        if family == "gemma2" and config.get("attn_logit_softcapping", 50.0) is None:
            # The first Gemma's attention is Gemma 2's without its cap, and has the same names.
            layer.self_attn.__class__ = architecture("gemma").Attention
        if family == "phi" and config.get("qk_layernorm"):
            attention, eps = layer.self_attn, config.get("layer_norm_eps", 1e-5)
            for name in ("q_proj", "k_proj"):
                attention[name] = HeadNorm(attention[name], nn.LayerNorm(attention.head_dim, eps), attention.head_dim)
        if family in SCALED and config.get("scale_attn_weights") is False:
            layer.attn.scale = 1.0
        if family == "gpt2" and config.get("scale_attn_by_inverse_layer_idx"):
            layer.attn.scale /= index + 1


class HeadNorm(nn.Module):
    """A linear layer whose output is normalised head by head, each of so many items."""

    def __init__(self, linear: nn.Module, norm: nn.Module, size: int):
        super().__init__()
        self.linear, self.norm, self.size = linear, norm, size

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return self.norm(y.reshape(*y.shape[:-1], -1, self.size)).reshape(y.shape)


def _set_head_size(attention: Any, size: int) -> None:
    if size == attention.head_dim:
        return
    dim = attention.q_proj.weight.shape[1]
    for name in PROJECTIONS:
        heads = attention.n_heads if name in ("q_proj", "o_proj") else attention.n_kv_heads
        shape = (heads * size, dim) if name == "o_proj" else (dim, heads * size)
        attention[name] = nn.Linear(*shape, bias="bias" in attention[name])
    attention.head_dim, attention.scale = size, size**-0.5
    attention.rope = nn.RoPE(size, traditional=getattr(attention.rope, "traditional", False))


def fit_dense_weights(
    model: nn.Module, weights: Mapping[str, mx.array], config: Mapping[str, Any]
) -> dict[str, mx.array]:
    """The weights, named and ordered as the model takes them. The model gets the biases that the weights have, and
    loses those that they lack where the config says so."""
    found = dict(weights)
    if config.get("model_type") == "gpt_bigcode" and config.get("multi_query") is False:
        found = {name: _by_kind(name, array, config["n_head"]) for name, array in found.items()}
    if config.get("model_type") == "phi" and config.get("qk_layernorm"):
        found = {_replaced(name, HEAD_NORMS): array for name, array in found.items()}
    said = [config.get(key) for key in BIAS_KEYS]
    _fit_biases(model, found, any(each is True for each in said), any(each is False for each in said))
    return found


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    part = next((part for part in parts if part in name), None)
    return name if part is None else name.replace(part, parts[part])


def _by_kind(name: str, array: mx.array, heads: int) -> mx.array:
    """Rows of a matrix that gives query, key and value head by head, all queries first."""
    if not name.endswith(tuple(f".c_attn.{field}" for field in (*FIELDS, "bias"))):
        return array
    apart = array.reshape(heads, 3, -1, *array.shape[1:])
    return apart.swapaxes(0, 1).reshape(array.shape)


def _fit_biases(model: nn.Module, names: Mapping[str, Any], may_have: bool, may_lack: bool) -> None:
    """Only what the config speaks of, and where all layers are alike: else a bias is missing, or one too many, and
    loading says so."""
    alike: dict[str, list[tuple[str, nn.Linear]]] = {}
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            alike.setdefault(re.sub(r"\.\d+(?=\.)", ".*", path), []).append((path, module))
    for linears in alike.values():
        there = [f"{path}.bias" in names for path, _ in linears]
        for _, module in linears:
            if may_have and all(there) and "bias" not in module:
                module.bias = mx.zeros((module.weight.shape[0],))
            elif may_lack and not any(there) and "bias" in module:
                del module.bias
