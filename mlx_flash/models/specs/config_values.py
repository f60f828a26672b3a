"""Values of config.json, checked when they are read. Knows no keys and no families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_flash.errors import ConfigError

NUMBER = (int, float)
MAX_SIZE = (1 << 31) - 1  # of one dimension: ids and rows are int32
MAX_LAYERS = 10_000


def short(value: Any) -> str:
    """A value as a message shows it, 80 characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigValues:
    """A config whose keys are checked when they are read: ConfigError for one that is missing or mistyped."""

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
            raise ConfigError(f"config.json: {key!r} is {short(value)}, which is not of the right type")
        if isinstance(value, int) and value > MAX_SIZE:
            raise ConfigError(f"config.json: {key!r} is {short(value)}, which no model has")
        if isinstance(value, NUMBER) and not 0 < value < math.inf:  # false for NaN too
            raise ConfigError(f"config.json: {key!r} is {value!r}; it must be positive and finite")
        return value

    def positive(self, key: str, default: int) -> int:
        return self.check(key, self.get(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.need(key, NUMBER) if default is None else self.check(key, self.get(key, default), NUMBER))

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):  # a "false" in quotes must not count as true
            raise ConfigError(f"config.json: {key!r} is {short(value)}; it must be true or false")
        return value

    def layers(self, key: str) -> int:
        count = self.need(key)
        if count > MAX_LAYERS:
            raise ConfigError(f"config.json: {key!r} is {count}; at most {MAX_LAYERS} layers are known")
        return count

    def sequence(self, key: str, length: int, kind: type | tuple[type, ...] = int) -> list[Any]:
        values = self.need(key, (list, tuple))
        if len(values) != length:
            raise ConfigError(f"config.json: {key!r} has {len(values)} entries for {length} layers")
        return [self.check(key, value, kind) for value in values]
