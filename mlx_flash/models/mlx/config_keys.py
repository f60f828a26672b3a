"""Which keys of a config the mlx backend looks at. Needs mlx-lm."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mlx_flash.models.specs.config_key_tables import OWN
from mlx_flash.models.specs.families import FAMILIES
from mlx_flash.models.specs.normal_form import normalise

from .compat import MODEL_REMAPPING, architecture


def keys_read(config: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a config that are looked at: what the spec is made from, or all that mlx-lm's code of it knows."""
    values = normalise(config)
    if values.get("model_type") in FAMILIES:
        return OWN
    text = values.get("text_config")
    kinds = [values.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    found: set[str] = set()
    for kind in kinds:
        try:
            module = architecture(MODEL_REMAPPING.get(str(kind), str(kind)))
        except ImportError:  # the text model has no file of its own
            continue
        used = {
            str(getattr(each, "__module__", None) or getattr(each, "__name__", "")) for each in vars(module).values()
        }
        for name in used | {module.__name__}:
            for each in vars(sys.modules[name]).values() if name.startswith("mlx_lm.models.") else ():
                if isinstance(each, type) and is_dataclass(each):
                    found |= {field.name for field in fields(each)}
    return frozenset(found)
