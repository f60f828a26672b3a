"""Casting weights between float32, float16 and bfloat16: rounds to nearest even, and refuses to make infinities.

NumPy has no bfloat16, so items are unsigned integers of the dtype's width. Knows arrays only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.errors import ConfigError, UsageError

RAW: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<u4"),
    "float16": np.dtype("<u2"),
    "bfloat16": np.dtype("<u2"),
}


def check_dtype(name: str) -> str:
    """Return `name`; raises UsageError if it is not a dtype that weights are stored in."""
    if name not in RAW:
        raise UsageError(f"unknown dtype {name!r}; known: {', '.join(RAW)}")
    return name


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw items of `dtype` as float32, exactly."""
    if dtype == "float32":
        return raw.view("<f4")
    if dtype == "float16":
        return raw.view("<f2").astype("<f4")
    return (raw.astype("<u4") << 16).view("<f4")


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as raw items of `dtype`, rounded to nearest, ties to even; too large values become infinite."""
    if dtype == "float32":
        return values.view("<u4")
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").view("<u2")
    bits = values.view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = np.isnan(values)
    if nan.any():  # rounding could carry a NaN into the sign bit
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype("<u2")


def cast(raw: np.ndarray, source: str, target: str, name: str) -> np.ndarray:
    """Raw items of `source` as raw items of `target`, any shape.

    Raises ConfigError, naming tensor `name`, if a finite value would become infinite.
    """
    if source == target:
        return raw
    values = to_float32(raw, source)
    result = from_float32(values, target)
    lost = np.isinf(to_float32(result, target)) & np.isfinite(values)
    if lost.any():
        largest = float(np.abs(values[lost]).max())
        raise ConfigError(
            f"tensor {name!r} has {largest:.4g}, more than {target} can hold; use dtype bfloat16 or float32"
        )
    return result
