"""Which configs are mixtures of experts. Reads configs only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import FAMILIES

# Where the architectures that mlx-lm knows say how many experts there are; a list has a number per layer.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NESTED = ("text_config", "ffn_config")


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face config is that of a mixture of experts."""
    if config.get("model_type") in FAMILIES:
        return False
    places = [config, *(config[key] for key in NESTED if isinstance(config.get(key), Mapping))]
    return any(_several(place.get(key)) for place in places for key in COUNTS)


def _several(value: Any) -> bool:
    return any(map(_several, value)) if isinstance(value, list) else type(value) is int and value > 1
