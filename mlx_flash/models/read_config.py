"""Reads a Hugging Face config into a `ModelSpec`; what is missing, mistyped or unknown becomes a ConfigError."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ConfigError
from .families import FAMILIES, Family, LayerSpec, ModelSpec, Rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu"}
ROPE_TYPES = ("default", "linear", "llama3")


class _Config:
    """A config dict whose missing or mistyped keys become ConfigError."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str, kind: type | tuple[type, ...] = int) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}, which family {self.values.get('model_type')!r} needs")
        return self.check(key, value, kind)

    def check(self, key: str, value: Any, kind: type | tuple[type, ...] = int) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"config.json: {key!r} is {value!r}, which is not of the right type")
        if isinstance(value, (int, float)) and value <= 0:
            raise ConfigError(f"config.json: {key!r} is {value!r}; it must be positive")
        if isinstance(value, int) and value > 1 << 31:
            raise ConfigError(f"config.json: {key!r} is {value!r}, which no model has")
        return value

    def positive(self, key: str, default: int) -> int:
        return self.check(key, self.get(key, default))

    def sequence(self, key: str, length: int) -> list[Any]:
        values = self.need(key, (list, tuple))
        if len(values) != length:
            raise ConfigError(f"config.json: {key!r} has {len(values)} entries for {length} layers")
        return [self.check(key, value, (int, float)) for value in values]


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, never under 90 % of it (OpenELM, section 3.1)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def family_of(config: Mapping[str, Any]) -> str:
    """The family's name; raises ConfigError for one that is not known."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"unknown model family {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return name


def _activation(config: _Config, family: Family) -> str:
    name = config.need(family.activation_key, str)
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r} ({family.activation_key}); known: {', '.join(ACTIVATIONS)}")
    activation = ACTIVATIONS[name]
    if not family.gated and activation != "relu":
        raise ConfigError(f"activation {name!r} is not known for a plain MLP; known: relu")
    return activation


def _rope(config: _Config) -> Rope:
    parameters = config.get("rope_parameters", {})
    scaling = config.get("rope_scaling") or parameters or {}
    if not isinstance(scaling, Mapping) or not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: 'rope_scaling' is {scaling!r}, which is not an object")
    base = float(
        config.check("rope_theta", config.get("rope_theta", parameters.get("rope_theta", 10000.0)), (int, float))
    )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(f"unknown RoPE type {kind!r}; known: {', '.join(ROPE_TYPES)}")
    numbers = _Config(scaling)
    if kind == "default":
        return Rope(base)
    factor = float(numbers.need("factor", (int, float)))
    if kind == "linear":
        return Rope(base, kind, factor)
    return Rope(
        base,
        kind,
        factor,
        float(numbers.get("low_freq_factor", 1.0)),
        float(numbers.get("high_freq_factor", 4.0)),
        int(numbers.get("original_max_position_embeddings", 8192)),
    )


def _eos_ids(config: _Config) -> tuple[int, ...]:
    value = config.get("eos_token_id", [])
    ids = [value] if isinstance(value, int) else value
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise ConfigError(f"config.json: 'eos_token_id' is {value!r}; it must be an id or a list of ids")
    return tuple(ids)


def _openelm(config: _Config) -> dict[str, Any]:
    count, dim = config.need("num_transformer_layers"), config.need("model_dim")
    heads, kv_heads = config.sequence("num_query_heads", count), config.sequence("num_kv_heads", count)
    divisor, multipliers = config.need("ffn_dim_divisor"), config.sequence("ffn_multipliers", count)
    if config.get("ffn_with_glu", True) is not True:
        raise ConfigError("config.json: 'ffn_with_glu' is not true; only OpenELM's gated FFN is known")
    layers = tuple(
        LayerSpec(h, k, make_divisible(m * dim, divisor)) for h, k, m in zip(heads, kv_heads, multipliers, strict=True)
    )
    return {
        "dim": dim,
        "head_dim": config.need("head_dim"),
        "layers": layers,
        "eps": float(config.get("rms_norm_eps", 1e-6)),
        "tied": bool(config.get("share_input_output_layers", True)),
        "max_context": config.positive("max_context_length", 2048),
        "rope": Rope(float(config.get("rope_freq_constant", 10000))),
        "qk_norm": bool(config.get("normalize_qk_projections", True)),
    }


def _llama(config: _Config, family: str, has_head: bool | None) -> dict[str, Any]:
    dim, heads = config.need("hidden_size"), config.need("num_attention_heads")
    if config.get("mlp_bias", False):
        raise ConfigError("config.json: 'mlp_bias' is true; FFN biases are known for OPT only")
    if family == "qwen3" and config.get("attention_bias", False):
        raise ConfigError("config.json: 'attention_bias' is true, which is not known for Qwen3")
    layer = LayerSpec(heads, config.positive("num_key_value_heads", heads), config.need("intermediate_size"))
    context = config.positive("max_position_embeddings", 2048)
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True):
        context = min(context, config.check("sliding_window", window))  # within the window attention is full
    tied = config.get("tie_word_embeddings", None if has_head is None else not has_head)
    return {
        "dim": dim,
        "head_dim": config.positive("head_dim", dim // heads),
        "layers": (layer,) * config.need("num_hidden_layers"),
        "eps": float(config.need("rms_norm_eps", float)),
        "tied": bool(tied),
        "max_context": context,
        "rope": _rope(config),
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2" or bool(config.get("attention_bias", False)),
        "out_bias": family != "qwen2" and bool(config.get("attention_bias", False)),
    }


def _opt(config: _Config) -> dict[str, Any]:
    dim, heads = config.need("hidden_size"), config.need("num_attention_heads")
    for key, wanted in (("do_layer_norm_before", True), ("word_embed_proj_dim", dim), ("enable_bias", True)):
        if config.get(key, wanted) != wanted:
            raise ConfigError(f"config.json: {key!r} is {config.get(key)!r}; only {wanted!r} is known (not OPT-350m)")
    layer = LayerSpec(heads, heads, config.need("ffn_dim"))
    return {
        "dim": dim,
        "head_dim": dim // heads,
        "layers": (layer,) * config.need("num_hidden_layers"),
        "eps": 1e-5,
        "tied": bool(config.get("tie_word_embeddings", True)),
        "max_context": config.need("max_position_embeddings"),
        "rope": None,
        "qk_norm": False,
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
    }


def read_spec(config: Mapping[str, Any], tensor_names: Collection[str] | None = None) -> ModelSpec:
    """The spec of a Hugging Face config. `tensor_names`, where known, decides whether the head is tied if the config
    does not say. Raises ConfigError naming the key, family or activation that is missing or unknown."""
    family, values = family_of(config), _Config(config)
    table = FAMILIES[family]
    activation = _activation(values, table)
    has_head = None if tensor_names is None else table.names["head"] + ".weight" in tensor_names
    read = {"openelm": lambda: _openelm(values), "opt": lambda: _opt(values)}
    fields = read.get(family, lambda: _llama(values, family, has_head))()
    fields = {"qkv_bias": False, "out_bias": False, "ffn_bias": False} | fields
    for layer in fields["layers"]:
        if layer.heads % layer.kv_heads:
            raise ConfigError(f"config.json: {layer.heads} heads cannot share {layer.kv_heads} key/value heads")
    return ModelSpec(
        family=family,
        vocab=values.need("vocab_size"),
        activation=activation,
        eos_ids=_eos_ids(values),
        bos_id=values.get("bos_token_id"),
        table=table,
        **fields,
    )
