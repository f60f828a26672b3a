"""Rotary positions (RoPE): what a config says of them, and their frequencies and factors as transformers defines them.

Does not know what computes with them, nor whether a head's items turn in halves or in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_flash.errors import ConfigError

from .config_values import NUMBER, short
from .model_spec import ContextLimit, Rope

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "ntk_alpha")
SPELLINGS = {"su": "longrope", "mrope": "default", "deepseek_yarn": "yarn", "telechat3-yarn": "yarn"}
# Of families whose config may leave the base out: what transformers takes. Elsewhere 10000.
BASES = {
    **{"cohere": 5e5, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "exaone": 5e5, "gpt_oss": 1.5e5, "helium": 1e5},
    **{"lfm2_moe": 1e6, "llama4": 5e5, "llama4_text": 5e5, "longcat_flash": 1e7, "minimax": 1e6, "mixtral": 1e6},
    **{"olmo3": 5e5, "phimoe": 1e6, "smollm3": 2e6, "solar_open": 1e6, "minimax_m3_vl": 5e6},
}
# Architectures of mlx-lm that read the positions of every layer in a way of their own, which transformers shares or
# lacks.
UNTOUCHED = ("gemma4_text", "minimax_m3_vl", "qwen3_5_moe", "step3p5")
BASE_KEYS = ("rope_theta", "rotary_emb_base", "rope_freq_constant")
# Families whose sliding layers are not scaled, and the key of those layers' own base.
PLAIN_WHERE_SLIDING = {"gemma3_text": ("rope_local_base_freq", 1e4), "olmo3": (None, 5e5)}
PLAIN_WHERE_SLIDING |= {"mimo_v2_flash": ("swa_rope_theta", 1e4)}


def read_rope(values: Any, layer_type: str | None = None) -> Rope:
    """The rotary positions of a config (a `ConfigValues`) in layers of a type, such as "sliding_attention". Raises
    ConfigError for a kind that is not known and numbers that are missing, mistyped or out of range."""
    parameters, scaling = (_mapping(values, key) for key in ("rope_parameters", "rope_scaling"))
    family = str(values.get("model_type"))
    if layer_type is not None and isinstance(parameters.get(layer_type), Mapping):
        parameters = scaling = parameters[layer_type]
        base: Any = parameters.get("rope_theta")
    else:
        base = next((values.get(key) for key in BASE_KEYS if values.get(key) is not None), None)
        if layer_type == "sliding_attention" and family in PLAIN_WHERE_SLIDING:
            scaling, (key, usual) = {}, PLAIN_WHERE_SLIDING[family]
            base = values.get(key, usual) if key else base
            parameters = {}
    scaling = scaling or parameters
    base = base or parameters.get("rope_theta") or BASES.get(family, 10000.0)
    base = float(values.check("rope_theta", base, NUMBER))
    return _scaled(base, type(values)(scaling), values, family)


def _mapping(values: Any, key: str) -> Mapping[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: {key!r} is {short(found)}, which is not an object")
    return found


def kind_of(scaling: Mapping[str, Any], family: str) -> str:
    """The kind of scaling under its usual name; raises ConfigError for one that is not known."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if isinstance(kind, str):
        kind = SPELLINGS.get(kind, kind)
    if family.startswith("phi3") and kind == "yarn":
        kind = "longrope"  # its first configs called it so
    if kind == "dynamic" and scaling.get("alpha"):
        kind = "ntk_alpha"
    if kind not in KINDS:
        raise ConfigError(f"unknown RoPE type {short(kind)} ('rope_scaling'); known: {', '.join(KINDS)}")
    return str(kind)


def _scaled(base: float, numbers: Any, values: Any, family: str) -> Rope:
    """numbers: the scaling's; values: the config's."""
    kind = kind_of(numbers.values, family)
    if kind == "default":
        return Rope(base)
    if kind == "proportional":
        rotated = numbers.number("partial_rotary_factor", 1.0)
        return Rope(base, kind, numbers.number("factor", 1.0), rotated=rotated)
    if kind == "ntk_alpha":
        return Rope(base, kind, alpha=numbers.number("alpha"))
    most = values.positive("max_position_embeddings", 2048)
    known = values.get("original_max_position_embeddings", numbers.get("original_max_position_embeddings", most))
    original = numbers.check("original_max_position_embeddings", known)
    if kind == "longrope":
        return _longrope(base, numbers, original, most)
    stretched = most / original if kind == "yarn" else None  # what yarn takes where no factor is given
    factor = numbers.check("factor", numbers.get("factor", stretched), NUMBER)
    if factor < 1:
        raise ConfigError(f"config.json: the RoPE 'factor' is {factor!r}; it must be at least 1")
    if kind == "yarn":
        return _yarn(base, float(factor), numbers, original)
    if kind == "llama3":
        low, high = numbers.number("low_freq_factor", 1.0), numbers.number("high_freq_factor", 4.0)
        if low >= high:
            raise ConfigError(f"config.json: 'high_freq_factor' is {high}; it must be above 'low_freq_factor', {low}")
        return Rope(base, kind, float(factor), low, high, original)
    return Rope(base, kind, float(factor), original_context=most)


def _yarn(base: float, factor: float, numbers: Any, original: int) -> Rope:
    def mscale(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    def optional(key: str) -> float:
        return float(numbers.check(key, numbers.get(key), NUMBER)) if numbers.get(key) else 0.0

    attention, one, other = (optional(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if not attention:
        attention = mscale(one) / mscale(other) if one and other else mscale(1)
    fast, slow = optional("beta_fast") or 32.0, optional("beta_slow") or 1.0
    truncate = numbers.flag("truncate", True)
    return Rope(base, "yarn", factor, original_context=original, beta_fast=fast, beta_slow=slow, truncate=truncate,
                attention_factor=attention, long_attention_factor=attention)  # fmt: skip


def _longrope(base: float, numbers: Any, original: int, most: int) -> Rope:
    tables = []
    for key in ("short_factor", "long_factor"):
        table = numbers.need(key, list)
        tables.append(tuple(float(numbers.check(key, value, NUMBER)) for value in table))
    factor = float(numbers.check("factor", numbers.get("factor", most / original), NUMBER))
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    usual = numbers.number("attention_factor", usual)
    # PhiMoE's config names the factors themselves.
    short, long = numbers.number("short_mscale", usual), numbers.number("long_mscale", usual)
    return Rope(base, "longrope", factor, original_context=original, attention_factor=short,
                long_attention_factor=long, short_factors=tables[0], long_factors=tables[1])  # fmt: skip


def check_size(rope: Rope, dims: int) -> None:
    """Raise ConfigError where heads of which `dims` items turn do not fit what the config says."""
    if dims < 2 or dims % 2:
        raise ConfigError(f"config.json: heads of {dims} items cannot be rotated; it must be even")
    for key, table in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if table and len(table) not in (1, dims // 2):
            raise ConfigError(f"config.json: {key!r} has {len(table)} numbers; {dims} rotated items need {dims // 2}")
    if dims == 2 and rope.kind == "ntk_alpha" or rope.kind == "yarn" and rope.base == 1:
        raise ConfigError(f"config.json: 'rope_scaling' of type {rope.kind} does not go with {dims} rotated items "
                          f"and 'rope_theta' {rope.base}")  # fmt: skip


def uses_long(rope: Rope, context: int) -> bool:
    """Whether a run of so many tokens takes the long factors. It takes one table from beginning to end: keys that were
    turned by the other one cannot be turned back."""
    return rope.kind == "longrope" and context > rope.original_context


def attention_factor(rope: Rope, context: int) -> float:
    """The factor of cosines and sines in a run of `context` tokens."""
    return rope.long_attention_factor if uses_long(rope, context) else rope.attention_factor


def inverse_frequencies(rope: Rope, dims: int, context: int = 0) -> np.ndarray:
    """(dims/2,) float64 angles per position, after the config's scaling, in a run of `context` tokens. Raises
    ConfigError where `dims` does not fit the config."""
    check_size(rope, dims)
    exponents = np.arange(0, dims, 2, dtype=np.float64) / dims
    base = np.float64(rope.base)
    if rope.kind == "ntk_alpha":
        base = base * np.float64(rope.alpha) ** (dims / (dims - 2))
    inverse = base**-exponents
    if rope.kind in ("linear", "proportional"):
        inverse = inverse / rope.factor
    if rope.kind == "proportional":
        inverse[int(rope.rotated * dims // 2) :] = 0.0
    if rope.kind == "llama3":
        turns = rope.original_context * inverse / (2 * np.pi)  # full turns within the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return inverse * (keep + (1 - keep) / rope.factor)
    if rope.kind == "yarn":
        keep = 1 - _ramp(rope, dims)
        return inverse * (keep + (1 - keep) / rope.factor)
    if rope.kind == "longrope":
        return inverse / np.array(rope.long_factors if uses_long(rope, context) else rope.short_factors)
    return inverse  # default; dynamic, which is that up to the context that is allowed


def _ramp(rope: Rope, dims: int) -> np.ndarray:
    """(dims/2,): 0 for frequencies that yarn keeps, 1 for those that it divides (arXiv 2309.00071, section 3.2)."""

    def frequency(turns: float) -> float:
        """The place of the one that makes so many full turns within the original context."""
        return dims * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = frequency(rope.beta_fast), frequency(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0)


def context_limit(rope: Rope, most: int) -> ContextLimit | None:
    """The length up to which a model of `most` tokens has the positions that its config asks for."""
    if rope.kind == "dynamic":
        reason = "'rope_scaling' of type dynamic turns all keys anew as the text grows beyond it"
        return ContextLimit(min(most, rope.original_context), reason)
    if rope.kind == "longrope" and rope.original_context < most and rope.long_factors != rope.short_factors:
        long = f"long RoPE factors for all of it (the original takes short ones up to {rope.original_context} tokens)"
        reason = "short RoPE factors ('original_max_position_embeddings'); a longer --max-context takes the long ones"
        return ContextLimit(rope.original_context, reason, hard=False, beyond=long)
    return None
