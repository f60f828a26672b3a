"""Sliding windows of attention, layer by layer: a table of rules by family, as transformers defines them.

A window of w tokens lets a token see itself and the w - 1 before it. Families that transformers does not have run with
full attention, and only as long as the context is within their window (`read_limit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_flash.errors import ConfigError

from .model_spec import ContextLimit

SLIDING, FULL = "sliding_attention", "full_attention"
Slides = Callable[[Any, int], bool]  # config's values, layer -> whether it has the window


def _late(usual: int) -> Slides:
    """From the layer "max_window_layers" on."""
    return lambda values, layer: layer >= _count(values, "max_window_layers", usual)


def _all_but_every(key: str, usual: int) -> Slides:
    """Layers key - 1, 2 * key - 1, ... see everything. EXAONE spells it as letters, L for local."""

    def slides(values: Any, layer: int) -> bool:
        pattern = values.get(key, usual)
        if isinstance(pattern, str) and pattern and not set(pattern) - set("LG"):
            return pattern[layer % len(pattern)] == "L"
        return (layer + 1) % int(values.check(key, pattern)) != 0

    return slides


def _always(values: Any, layer: int) -> bool:
    return True


def _without_rope(values: Any, layer: int) -> bool:
    """SmolLM3's: the layers without positions."""
    layers = values.get("no_rope_layers")
    if layers is not None:
        return not layers[layer]
    return (layer + 1) % int(values.positive("no_rope_layer_interval", 4)) == 0


def _by_pattern(values: Any, layer: int) -> bool:
    """MiMo's "hybrid_layer_pattern"."""
    return bool(values.need("hybrid_layer_pattern", list)[layer])


def _even_until(values: Any, layer: int) -> bool:
    """Qwen2-MoE's: every other layer before "max_window_layers"."""
    return (layer + 1) % 2 == 1 and layer < _count(values, "max_window_layers", 28)


def _count(values: Any, key: str, usual: int) -> int:
    value = values.get(key, usual)
    if type(value) is not int or value < 0:  # `type`, because True is an int too
        raise ConfigError(f"config.json: {key!r} is {str(value)[:80]!r}; it must be a number of layers")
    return value


# Family -> which layers have the window where "layer_types" does not say so; the window where the config has no such
# key (None: no window); and whether windows must be switched on with "use_sliding_window".
RULES: dict[str, tuple[Slides, int | None, bool]] = {
    "mistral": (_always, None, False),
    "mixtral": (_always, None, False),
    "phi3": (_always, None, False),
    "phimoe": (_always, None, False),
    "starcoder2": (_always, None, False),
    "qwen2": (_late(28), 4096, True),
    "qwen3": (_late(28), 4096, True),
    "qwen3_moe": (_always, 4096, True),
    "qwen2_moe": (_even_until, 4096, True),
    "dots1": (_late(62), 4096, False),
    "smollm3": (_without_rope, None, True),
    "cohere2": (_all_but_every("sliding_window_pattern", 4), 4096, False),
    "exaone4": (_all_but_every("sliding_window_pattern", 4), 4096, False),
    "gemma2": (_all_but_every("", 2), 4096, False),
    "gemma3_text": (_all_but_every("sliding_window_pattern", 6), 4096, False),
    "olmo3": (_all_but_every("", 4), 4096, False),
    "mimo_v2_flash": (_by_pattern, 129, False),
}
IGNORES_LAYER_TYPES = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "qwen3_moe")
# What mlx-lm itself gives the windows that its config names, and families that have none in transformers.
NATIVE = ("afmoe", "exaone_moe", "gemma4_text", "gpt_oss", "laguna", "llama4", "mellum", "step3p5")
WITHOUT = ("cohere", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5", "ernie4_5_moe", "exaone", "gemma", "glm",
           "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
           "granitemoe", "granitemoehybrid", "helium", "hunyuan", "hunyuan_v1_dense", "jamba", "lfm2_moe", "llama",
           "longcat_flash", "mistral4", "nanochat", "nemotron", "nemotron_h", "olmo2", "olmoe", "openelm", "opt", "phi",
           "qwen3_5_moe", "qwen3_next", "qwen3_vl_moe", "seed_oss", "solar_open", "stablelm")  # fmt: skip


def is_known(family: str) -> bool:
    """Whether transformers has the family, so that what its config leaves out is known."""
    return family in RULES or family in NATIVE or family in WITHOUT


def read_layer_types(values: Any, layers: int) -> list[str] | None:
    """The config's "layer_types", one per layer; None where it has none. Further ones are those of layers that are not
    run, which predict several tokens at once. Raises ConfigError."""
    if values.get("layer_types") is None:
        return None
    found = values.need("layer_types", list)
    return [str(each) for each in values.sequence("layer_types", max(layers, len(found)), str)[:layers]]


def read_windows(values: Any, layers: int) -> list[int | None]:
    """The window of each layer of a config (a `ConfigValues`), None where a layer sees everything. Raises ConfigError
    for numbers that are missing, mistyped or out of range."""
    family = str(values.get("model_type"))
    types = read_layer_types(values, layers)
    if family not in RULES:
        return [None] * layers
    slides, usual, switched = RULES[family]
    window = values.values.get("sliding_window", usual)
    if family == "mimo_v2_flash" and values.get("sliding_window_size") is not None:
        window = values.need("sliding_window_size") + 1  # which does not count the token itself
    if window is None or (switched and not values.flag("use_sliding_window", False)):
        return [None] * layers
    values.check("sliding_window", window)
    if types is not None and family not in IGNORES_LAYER_TYPES:
        return [window if each == SLIDING else None for each in types]
    return [window if slides(values, layer) else None for layer in range(layers)]


def read_limit(values: Any) -> ContextLimit | None:
    """The context within which attention is what the config asks for, where its window cannot be had."""
    family = str(values.get("model_type"))
    if family == "qwen" and (values.flag("use_dynamic_ntk", False) or values.flag("use_logn_attn", False)):
        return ContextLimit(values.positive("seq_length", 2048), "'use_dynamic_ntk' and 'use_logn_attn' begin there")
    if is_known(family):
        return None
    window = values.get("sliding_window")
    if window is None or not values.flag("use_sliding_window", True):
        return None
    return ContextLimit(values.check("sliding_window", window), "attention window")


def layer_type(values: Any, layer: int, layers: int, windows: list[int | None]) -> str:
    """What rotary positions depend on in some families: "sliding_attention" or "full_attention"."""
    types = read_layer_types(values, layers)
    if types is not None:
        return types[layer]
    return SLIDING if windows[layer] is not None else FULL


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about the language model."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config
