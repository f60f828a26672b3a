"""Corrections of positions and attention windows in mlx-lm's models: they become those of transformers.

Many architectures of mlx-lm read "rope_scaling" or "sliding_window" and compute without them, or cannot be built with
them. So mlx-lm gets a config without them (`mlx_keys`). Then each layer's rotary module is tried on a few positions and
replaced if it does not do what the config says, and attention gets the window's mask where mlx-lm gives none. Needs
mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import ConfigError
from mlx_flash.models.specs.attention_windows import FULL, RULES, is_known, layer_type, read_windows, text_config
from mlx_flash.models.specs.config_values import ConfigValues
from mlx_flash.models.specs.model_spec import Rope
from mlx_flash.models.specs.rotary import (
    BASE_KEYS,
    UNTOUCHED,
    attention_factor,
    inverse_frequencies,
    kind_of,
    read_rope,
)

from .compat import KVCache, RotatingKVCache, create_attention_mask, make_prompt_cache

PARTS = {"glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "nemotron": 0.5, "phi": 0.5, "qwen3_next": 0.25, "stablelm": 0.25}
PART_KEYS = {"gpt_neox": ("rotary_pct", 0.25)} | {name: ("partial_rotary_factor", part) for name, part in PARTS.items()}
ROTARY = ("rope", "rotary_emb", "index_rope")  # what attention modules call theirs
SIZED_BY_HEADS = ("glm",)  # whose module turns whole heads, whatever the config says
TOLERANCE = 2e-3  # of cosines and sines at the positions that are tried: angles there are right to some 1e-4 in fp32
TRIED = (0, 1, 7, 61, 509)


class Rotary(nn.Module):
    """Turns the first `dims` items of every head, pairs of neighbours or of both halves, and scales them."""

    def __init__(self, dims: int, inverse: np.ndarray, factor: float, pairs: bool):
        super().__init__()
        self.dims, self.factor, self.pairs = dims, factor, pairs
        with np.errstate(divide="ignore"):
            self._freqs = mx.array((1 / inverse).astype(np.float32))  # infinite: not turned

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:  # (B, H, T, D)
        if self.factor != 1:
            x = x.at[..., : self.dims].multiply(self.factor) if self.dims < x.shape[-1] else x * self.factor
        turned: mx.array = mx.fast.rope(
            x, self.dims, traditional=self.pairs, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )
        return turned


def mlx_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys to give mlx-lm in place of the config's, so that it builds a model whose positions can be set.

    Raises ConfigError for keys of a wrong type or kind.
    """
    family = str(config.get("model_type"))
    if text_config(config) is not config or family in UNTOUCHED:
        return {}
    values = ConfigValues(config)
    found = _rotary_keys(values, family)
    if family in PART_KEYS and config.get(PART_KEYS[family][0]) is None:
        found[PART_KEYS[family][0]] = PART_KEYS[family][1]
    count = values.get("num_hidden_layers")
    if family in RULES and type(count) is int and count > 0:
        found |= _window_keys(values, family, values.layers("num_hidden_layers"))
    return found


def _rotary_keys(values: ConfigValues, family: str) -> dict[str, Any]:
    scaling = values.get("rope_scaling", {})
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: 'rope_scaling' is {str(scaling)[:80]!r}, which is not an object")
    kind = kind_of(scaling, family)
    found: dict[str, Any] = {"rope_scaling": None}
    # What also scales attention, or the base, is for mlx-lm's own code.
    if kind == "ntk_alpha" or kind == "yarn" and "qk_rope_head_dim" in values.values:
        found["rope_scaling"] = dict(scaling) | {"type": scaling.get("type", kind), "rope_type": kind}
        if kind == "ntk_alpha":
            found["rope_scaling"] |= {"type": "dynamic", "factor": scaling.get("factor", 1.0)}
    elif family == "deepseek_v2":
        found["rope_scaling"] = {"type": "yarn", "factor": 1.0}  # which is none
    elif family == "hunyuan":
        found["rope_scaling"] = {"type": "dynamic", "alpha": 1.0, "factor": 1.0}
    if is_known(family) and not any(values.get(key) is not None for key in BASE_KEYS):
        found["rope_theta"] = read_rope(values, FULL).base
    return found


def _window_keys(values: ConfigValues, family: str, layers: int) -> dict[str, Any]:
    """For those architectures that have windows themselves: by a number or by letters instead of a list."""
    windows = read_windows(values, layers)
    slides = [window is not None for window in windows]
    if family in ("cohere2", "gemma3_text"):
        period = slides.index(False) + 1 if False in slides else 1
        regular = [(layer + 1) % period != 0 for layer in range(layers)]
        size = next((window for window in windows if window is not None), None)
        return {"sliding_window_pattern": period if regular == slides else 1} | (
            {"sliding_window": size} if size else {}
        )
    if family == "exaone4":
        letters = "".join("L" if each else "G" for each in slides)
        own = {"sliding_window_pattern": letters if len(set(slides)) == 2 else None}
        return own | {"sliding_window": values.get("sliding_window")}
    if family == "mimo_v2_flash":  # whose number does not count the token itself, which mlx-lm overlooks
        return {"sliding_window_size": next((window for window in windows if window is not None), None)}
    return {"layer_types": None, "sliding_window": None} if family == "mistral" else {}


def set_windows(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give each layer's attention the window that the config says. Raises ConfigError where that is not possible."""
    values, layers = ConfigValues(config), list(model.layers)
    family = str(values.get("model_type"))
    if family not in RULES:
        return
    wanted = read_windows(values, len(layers))
    native = [_window_of(cache) for cache in make_prompt_cache(model)]
    if family == "exaone4":  # its layers that see everything have no positions, where windows are known at all
        for layer, window in zip(layers, wanted, strict=True):
            layer.self_attn.use_rope = window is not None or values.get("sliding_window") is None
    if family == "cohere2":
        for layer, window in zip(layers, wanted, strict=True):
            layer.self_attn.use_sliding_window = window is not None  # and with it positions
    if wanted == native:
        return
    for layer, window in zip(layers, wanted, strict=True):
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            raise ConfigError(f"'sliding_window' is {window} in a layer of {family} whose attention is not known here")
        if window is not None or any(native):
            attention.__class__ = _windowed(type(attention), window)
    if any(native):
        model.make_cache = lambda: [KVCache() for _ in layers]


def _window_of(cache: Any) -> int | None:
    return int(cache.max_size) if isinstance(cache, RotatingKVCache) else None


def _windowed(attention: type, window: int | None) -> type:
    """The attention module's class, which makes its own mask; weights and names stay as they are."""

    class Windowed(attention):
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
            offset = getattr(cache, "offset", 0)
            if not isinstance(offset, int) or window is None or offset + x.shape[1] > window:
                as_array = isinstance(mask, mx.array) or window is not None
                mask = create_attention_mask(x, cache, window_size=window, return_array=as_array)
            return super().__call__(x, mask, cache)

    Windowed.__name__ = Windowed.__qualname__ = attention.__name__
    return Windowed


def set_positions(model: nn.Module, config: Mapping[str, Any], context: int) -> None:
    """Give each layer the rotary positions that the config says, in a run of `context` tokens. Raises ConfigError."""
    family = str(config.get("model_type"))
    if family in UNTOUCHED:
        return
    values = ConfigValues(text_config(config))
    layers = list(model.layers)
    windows = read_windows(values, len(layers))
    made: dict[Any, Rotary] = {}
    for index, layer in enumerate(layers):
        kind = None if layer is None else layer_type(values, index, len(layers), windows)
        for attention, name in _rotary_modules(layer):
            _set(attention, name, values, read_rope(values, kind), context, made)
        _set_frequencies(layer, values, context)


def _rotary_modules(layer: Any) -> Iterator[tuple[nn.Module, str]]:
    if not isinstance(layer, nn.Module):
        return
    for _, module in layer.named_modules():
        for name in ROTARY:
            if isinstance(getattr(module, name, None), nn.Module):
                yield module, name


def _set(attention: Any, name: str, values: ConfigValues, rope: Rope, context: int, made: dict[Any, Rotary]) -> None:
    """Replace one layer's rotary module unless it does what `rope` says."""
    module, family = getattr(attention, name), str(values.get("model_type"))
    dims = getattr(module, "dims", getattr(module, "dim", None))
    if type(dims) is not int:  # DeepSeek-V2's; SmolLM3's layers without positions have no frequencies either
        if not isinstance(getattr(module, "_freqs", None), mx.array):
            return
        dims = 2 * module._freqs.size
    size, pairs = max(dims, int(getattr(attention, "head_dim", dims))), _turns_pairs(module, dims)
    if family in SIZED_BY_HEADS:
        dims = int(size * values.number("partial_rotary_factor", PARTS[family]))
    if not _names_base(values, rope) and type(getattr(module, "base", None)) in (int, float):
        rope = replace(rope, base=float(module.base))
    inverse, factor = inverse_frequencies(rope, dims, context), attention_factor(rope, context)
    right = Rotary(dims, inverse, factor, pairs)
    if not _alike(module, right, size):
        key = (dims, pairs, factor, inverse.tobytes())
        setattr(attention, name, made.setdefault(key, right))


def _names_base(values: ConfigValues, rope: Rope) -> bool:
    """Whether the config, or transformers' default for its family, says what the base is."""
    family = str(values.get("model_type"))
    return is_known(family) or any(values.get(key) is not None for key in (*BASE_KEYS, "rope_parameters"))


def _turns_pairs(module: Any, dims: int) -> bool:
    """Whether a module turns neighbours, (0, 1), (2, 3), and not (0, dims/2), (1, dims/2 + 1)."""
    one = mx.zeros((1, 1, 1, dims))
    one[..., 0] = 1.0
    turned = np.abs(np.array(module(one, 1), np.float32)[0, 0, 0])
    return dims > 2 and bool(turned[1] > turned[dims // 2])


def _alike(module: Callable[..., mx.array], right: Rotary, size: int) -> bool:
    x = mx.array(np.random.default_rng(size).standard_normal((1, 1, 2, size)).astype(np.float32))
    for offset in TRIED:
        try:
            found = np.array(module(x, offset))
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError):
            return False  # a module that cannot be run cannot stay
        wanted = np.array(right(x, offset))
        if found.shape != wanted.shape or np.abs(found - wanted).max() > TOLERANCE * np.abs(wanted).max():
            return False
    return True


def _set_frequencies(layer: Any, values: ConfigValues, context: int) -> None:
    """nanochat has no rotary module but frequencies, turned backwards."""
    attention: Any = getattr(layer, "self_attn", getattr(layer, "attn", None))
    if not hasattr(attention, "_rope_freqs"):
        return
    rope = read_rope(values)
    if rope.kind == "default":
        return
    if attention_factor(rope, context) != 1:
        raise ConfigError(
            f"config.json: 'rope_scaling' is {str(dict(values.get('rope_scaling')))[:80]}; mlx-lm's nanochat has no "
            "place for its factor of attention"
        )
    attention._rope_freqs = mx.array(-1 / inverse_frequencies(rope, 2 * attention._rope_freqs.size, context))
