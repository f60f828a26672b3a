"""Reads a Hugging Face config into a `ModelSpec`. A missing, mistyped or unknown key raises ConfigError.

Each form of config has a reader here; the row of a family says which form its config has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_flash.errors import ConfigError

from .attention_windows import read_limit, read_windows, text_config
from .config_normal_form import normalise
from .config_values import MAX_SIZE, NUMBER, ConfigValues, short
from .dense_families import DENSE, read_dense
from .families import FAMILIES, Family
from .key_checks import check_fixed
from .model_spec import ContextLimit, LayerSpec, ModelSpec, Rope
from .rotary import UNTOUCHED, check_size, context_limit, read_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "fatrelu": "fatrelu"}


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, never under 90 % of it (OpenELM, section 3.1)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def family_of(config: Mapping[str, Any]) -> str:
    """The family's name; raises ConfigError for one that is not known."""
    name = normalise(config).get("model_type")
    if not isinstance(name, str) or name not in FAMILIES.keys() | DENSE.keys():
        text = config.get("text_config")
        inside = f" with a text model of type {short(text.get('model_type'))}" if isinstance(text, Mapping) else ""
        raise ConfigError(
            f"unknown model family {short(name)}{inside}; known: {', '.join(sorted(FAMILIES))}, and on mlx only "
            f"{', '.join(sorted(DENSE))}"
        )
    return name


def _activation(config: ConfigValues, family: Family) -> str:
    name = config.need(family.activation_key, str)
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"unknown activation {short(name)} ({family.activation_key}); known: {', '.join(ACTIVATIONS)}"
        )
    activation = ACTIVATIONS[name]
    if not family.gated and activation != "relu":
        raise ConfigError(f"activation {name!r} is not known for a plain MLP; known: relu")
    return activation


def _cutoffs(config: ConfigValues, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """The layers with FATReLU's thresholds, one per layer under "fatrelu_thresholds" (arXiv 2402.13516)."""
    values = config.get("fatrelu_thresholds")
    if not isinstance(values, list) or len(values) != len(layers):
        raise ConfigError(f"config.json: 'fatrelu_thresholds' is {short(values)}; it must list {len(layers)} numbers")
    for value in values:
        if not isinstance(value, NUMBER) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ConfigError(f"config.json: 'fatrelu_thresholds' has {short(value)}; it must be 0 or more")
    return tuple(replace(layer, cutoff=float(value)) for layer, value in zip(layers, values, strict=True))


def _eos_ids(config: ConfigValues) -> tuple[int, ...]:
    value = config.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(_is_id(i) for i in ids):
        raise ConfigError(f"config.json: 'eos_token_id' is {short(value)}; it must be an id or a list of ids")
    return tuple(ids)


def _bos_id(config: ConfigValues) -> int | None:
    value = config.get("bos_token_id")
    if value is not None and not _is_id(value):
        raise ConfigError(f"config.json: 'bos_token_id' is {short(value)}; it must be an id")
    return value


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE  # `type`, because True is an int too


def _openelm(config: ConfigValues, table: Family, has_head: bool | None) -> dict[str, Any]:
    count, dim = config.layers("num_transformer_layers"), config.need("model_dim")
    heads, kv_heads = config.sequence("num_query_heads", count), config.sequence("num_kv_heads", count)
    divisor, multipliers = config.need("ffn_dim_divisor"), config.sequence("ffn_multipliers", count, NUMBER)
    if not config.flag("ffn_with_glu", True):
        raise ConfigError("config.json: 'ffn_with_glu' is not true; only OpenELM's gated FFN is known")
    for multiplier in multipliers:
        if multiplier * dim > MAX_SIZE - divisor:
            raise ConfigError(f"config.json: 'ffn_multipliers' has {multiplier!r}, which no model has")
    layers = tuple(
        LayerSpec(h, k, make_divisible(m * dim, divisor)) for h, k, m in zip(heads, kv_heads, multipliers, strict=True)
    )
    return {
        "dim": dim,
        "head_dim": config.need("head_dim"),
        "layers": layers,
        "eps": config.number("rms_norm_eps", 1e-6),
        "tied": config.flag("share_input_output_layers", True),
        "max_context": config.positive("max_context_length", 2048),
        "rope": Rope(config.number("rope_freq_constant", 10000.0)),
        "qk_norm": config.flag("normalize_qk_projections", True),
    }


def _llama(config: ConfigValues, table: Family, has_head: bool | None) -> dict[str, Any]:
    dim, heads = config.need("hidden_size"), config.need("num_attention_heads")
    attention_bias = config.flag("attention_bias", False)
    layer = LayerSpec(heads, config.positive("num_key_value_heads", heads), config.need("intermediate_size"))
    context = config.positive("max_position_embeddings", 2048)
    windows, rope = read_windows(config, config.layers("num_hidden_layers")), read_rope(config)
    return {
        "dim": dim,
        "head_dim": config.positive("head_dim", dim // heads),
        "layers": tuple(replace(layer, window=window) for window in windows),
        "eps": config.number("rms_norm_eps"),
        "tied": config.flag("tie_word_embeddings", has_head is False),
        "max_context": context,
        "limit": context_limit(rope, context),
        "rope": rope,
        "qk_norm": "q_norm" in table.names,
        "qkv_bias": table.biases == "qkv" or attention_bias,
        "out_bias": table.biases != "qkv" and attention_bias,
        "ffn_bias": table.ffn_bias_key is not None and config.flag(table.ffn_bias_key, False),
    }


def _opt(config: ConfigValues, table: Family, has_head: bool | None) -> dict[str, Any]:
    dim, heads = config.need("hidden_size"), config.need("num_attention_heads")
    biased = config.flag("enable_bias", True)
    embed_dim = config.positive("word_embed_proj_dim", dim)
    if dim % heads:
        raise ConfigError(f"config.json: {heads} heads cannot share a 'hidden_size' of {dim}")
    layer = LayerSpec(heads, heads, config.need("ffn_dim"))
    return {
        "dim": dim,
        "head_dim": dim // heads,
        "layers": (layer,) * config.layers("num_hidden_layers"),
        "eps": 1e-5,
        "tied": config.flag("tie_word_embeddings", True),
        "max_context": config.need("max_position_embeddings"),
        "rope": None,
        "qk_norm": False,
        "qkv_bias": biased,
        "out_bias": biased,
        "ffn_bias": biased,
        "norm_after": not config.flag("do_layer_norm_before", True),
        "embed_dim": None if embed_dim == dim else embed_dim,
    }


READERS = {"llama": _llama, "openelm": _openelm, "opt": _opt}  # by the form of a family's config


def read_limits(config: Mapping[str, Any], most: int) -> ContextLimit | None:
    """How long a context may be to run as the config says, for a model of `most` tokens of any family; None: as long as
    the model's. Raises ConfigError."""
    if config.get("model_type") in UNTOUCHED:
        return None
    values = ConfigValues(text_config(config))
    parameters = values.get("rope_parameters", {})
    kinds = [key for key, each in parameters.items() if isinstance(each, Mapping)] if type(parameters) is dict else []
    found = [read_limit(values), *(context_limit(read_rope(values, kind), most) for kind in kinds or [None])]
    limits = sorted((limit for limit in found if limit is not None), key=lambda limit: (not limit.hard, limit.tokens))
    return limits[0] if limits else None


def read_spec(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelSpec:
    """The spec of a Hugging Face config.

    shapes: of the checkpoint's tensors; they decide whether the head is tied if the config does not say it. Families
    that mlx-lm alone runs have no spec without them. Raises ConfigError naming the key, family or activation that is
    missing or unknown.
    """
    config = normalise(config)
    family, values = family_of(config), ConfigValues(config)
    check_fixed(config)
    if family in DENSE:
        dense = read_dense(config, values, shapes, _eos_ids(values), _bos_id(values))
        return replace(dense, limit=read_limits(config, dense.max_context))
    return spec_of(values, family, FAMILIES[family], shapes)


def spec_of(
    values: ConfigValues, family: str, table: Family, shapes: Mapping[str, tuple[int, ...]] | None
) -> ModelSpec:
    """The spec of a family with this table; see `read_spec`."""
    activation = _activation(values, table)
    has_head = None if shapes is None else table.names["head"] + ".weight" in shapes
    fields = READERS[table.config_form](values, table, has_head)
    fields = {"qkv_bias": False, "out_bias": False, "ffn_bias": False} | fields
    if activation == "fatrelu":
        fields["layers"] = _cutoffs(values, fields["layers"])
    for layer in fields["layers"]:
        if layer.heads % layer.kv_heads:
            raise ConfigError(f"config.json: {layer.heads} heads cannot share {layer.kv_heads} key/value heads")
    if fields["rope"] is not None:
        check_size(fields["rope"], fields["head_dim"])
    return ModelSpec(
        family=family,
        vocab=values.need("vocab_size"),
        activation=activation,
        eos_ids=_eos_ids(values),
        bos_id=_bos_id(values),
        table=table,
        **fields,
    )
