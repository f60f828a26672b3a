"""MLX's quantisation modes without biases, in NumPy: an item is a small float times its group's scale.

    mode    code                      scale of a group
    mxfp4   4-bit float (E2M1)        power of two (E8M0), of 32 items
    mxfp8   8-bit float (E4M3)        power of two (E8M0), of 32 items
    nvfp4   4-bit float (E2M1)        8-bit float (E4M3), of 16 items

Codes are packed as in `affine`. Knows arrays only.
"""

from __future__ import annotations

import numpy as np

from .affine import unpack

E8M0_BIAS = 127
BITS = {"mxfp4": 4, "mxfp8": 8, "nvfp4": 4}


def _small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Every value of a float format without infinities, by its code, fp32."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    return np.where(codes >> (exponent_bits + mantissa_bits), -values, values).astype(np.float32)


E2M1 = _small_floats(2, 1, 1)
E4M3 = _small_floats(4, 3, 7)
E4M3[[0x7F, 0xFF]] = np.nan
with np.errstate(over="ignore"):  # MLX takes the last code, which the format has for no number, as the next power
    E8M0 = np.ldexp(np.float32(1), np.arange(256) - E8M0_BIAS)


def widen(codes: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """The exact numbers. codes (rows, words) uint32, scales (rows, groups) uint8 -> (rows, n) fp32."""
    items = unpack(codes, BITS[mode])
    values = (E4M3 if mode == "mxfp8" else E2M1)[items].reshape(*scales.shape, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # scales that are no numbers
        values *= (E4M3 if mode == "nvfp4" else E8M0)[scales][..., None]
    return values.reshape(items.shape)
