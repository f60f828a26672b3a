"""Checks of config.json's keys: one that nobody knows is named to the user, and one whose value asks for something that
is not computed is refused.

Knows keys only, and no files. The lists of keys are in known_keys.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mlx_flash.errors import ConfigError

from .config_normal_form import normalise
from .key_spellings import RENAMES, SAME_AS
from .known_keys import ALWAYS, EXPERT_ACTIVATIONS, FIXED, HARMLESS, NORMALISED, READ_HERE, SILU, UNUSED
from .wrappers import wrapped_type

_HARMLESS_NAMES = frozenset().union(*HARMLESS.values())


def _kind(values: Mapping[str, Any]) -> str:
    kind = str(values.get("model_type"))
    return SAME_AS.get(kind, kind)


def check_fixed(config: Mapping[str, Any], mixture: bool = False) -> None:
    """Raise ConfigError for a key whose value asks for something that is not computed, although nothing reads it."""
    values = normalise(config)
    places = [values, values["text_config"]] if isinstance(values.get("text_config"), Mapping) else [values]
    for place in places:
        kind = _kind(place)
        allowed = dict(FIXED.get(kind, {}))
        if mixture:
            allowed["hidden_act"] = EXPERT_ACTIVATIONS.get(kind, SILU)
        for key, known in allowed.items():
            value = place.get(key)
            if value is not None and value not in known:
                only = " or ".join(map(repr, known)) or "null"
                raise ConfigError(f"config.json: {key!r} is {str(value)[:40]!r}; {kind[:40]} runs with {only} only")


def unknown_keys(config: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """The keys of a config that are neither read nor known to change nothing, those of its text model with a prefix.

    read: what the code that builds the model looks at."""
    places = {"": config}
    text = config.get("text_config")
    if isinstance(text, Mapping):
        places["text_config."] = text
    found = []
    for prefix, place in places.items():
        kind = wrapped_type(config) or _kind(place)
        known = ALWAYS | NORMALISED | UNUSED.get(kind, frozenset()) | FIXED.get(kind, {}).keys() | set(read)
        known |= READ_HERE.get(kind, frozenset())
        known |= {name for pair in RENAMES.get(kind, ()) for name in pair} | _HARMLESS_NAMES
        known |= {
            "hidden_act",
            "hidden_activation",
            "activation_function",
        }  # checked, see `check_fixed` and dense_families.py
        found += [prefix + str(key) for key, value in place.items() if key not in known and value is not None]
    return sorted(found)


def unknown_keys_text(keys: Collection[str]) -> str:
    """The message to the user about such keys."""
    named = ", ".join(key[:60] for key in list(keys)[:12])
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return f"config.json: not understood and not used: {named}{more}"
