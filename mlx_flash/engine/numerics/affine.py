"""MLX's affine quantisation in NumPy: from rows of numbers to codes with a scale and a bias per group, and back.

Bit for bit the results of `mx.quantize` on a CPU. Knows arrays only; items are raw, as in `casting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .casting import from_float32, to_float32

LEAST_SCALE = np.float32(1e-7)  # of a group whose items are all alike
BYTE_BITS = 8
RUN = 8  # items: of any width they fill whole bytes


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes (rows, words) uint32 -> (rows, n) uint8, n = words * 32 / bits: each item's code, of 1 to 8 bits. Item i of
    a row begins at its bit i * bits, bit 0 of word 0 being the first."""
    raw = np.ascontiguousarray(codes).view(np.uint8)
    if BYTE_BITS % bits == 0:
        items = raw[..., None] >> np.arange(0, BYTE_BITS, bits, dtype=np.uint8)
        if bits < BYTE_BITS:
            items &= np.uint8((1 << bits) - 1)
        return items.reshape(len(codes), -1)
    runs = raw.reshape(-1, bits)  # RUN items in as many bytes as an item has bits
    whole = np.zeros(len(runs), np.uint64)
    for k in range(bits):
        whole |= runs[:, k].astype(np.uint64) << np.uint64(BYTE_BITS * k)
    found = whole[:, None] >> (np.arange(RUN, dtype=np.uint64) * np.uint64(bits))
    return (found & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(len(codes), -1)


def quantise(values: np.ndarray, bits: int, group_size: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values (rows, n) fp32, finite, n a multiple of `group_size` -> codes (rows, n * bits / 32) uint32, scales and
    biases (rows, n / group_size), raw items of `dtype`. bits: 4 or 8.

    A group's bias is the end of its range that is farther from zero, and zero is a code of its own. Codes are chosen
    with the scale and the bias as they are before they are rounded to `dtype`.
    """
    rows, n = values.shape
    groups = np.ascontiguousarray(values, np.float32).reshape(rows, n // group_size, group_size)
    bins = np.float32((1 << bits) - 1)
    low, high = groups.min(axis=2), groups.max(axis=2)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / bins, LEAST_SCALE)
    scale = np.where(below, scale, -scale)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    moved = steps != 0
    scale = np.divide(edge, steps, out=scale, where=moved)
    bias = np.where(moved, edge, np.float32(0))
    codes = groups - bias[..., None]
    codes /= scale[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, bins, out=codes)
    packed: np.ndarray = codes.astype(np.uint8).reshape(rows, n)
    if bits == 4:
        packed = packed[:, 0::2] | packed[:, 1::2] << 4
    words = np.ascontiguousarray(packed).view("<u4")
    return words, from_float32(scale, dtype), from_float32(bias, dtype)


@dataclass(frozen=True, eq=False)
class AffineRows:
    """Quantised weights (rows, n), which can be indexed like an array, by columns in whole groups.

    codes (rows, n * bits / 32) uint32; scales, biases (rows, n / group_size) float32, float16 or uint16 (bfloat16)
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1] * 32 // self.bits

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, key: Any) -> AffineRows:
        """Rows, by anything that indexes an array; with a slice as second index also columns, in whole groups."""
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        begin, end, _ = columns.indices(self.shape[1])
        if begin % self.group_size or end % self.group_size:
            raise ValueError(f"columns {begin}..{end} are no whole groups of {self.group_size}")
        words = slice(begin * self.bits // 32, end * self.bits // 32)
        groups = slice(begin // self.group_size, end // self.group_size)
        return AffineRows(
            self.codes[rows][:, words], self.scales[rows][:, groups], self.biases[rows][:, groups], self.bits
        )

    def widen(self, out: np.ndarray) -> None:
        """Write the weights into `out` (rows, n) fp32, any strides: code * scale + bias."""
        if not out.size:
            return
        items = unpack(self.codes, self.bits)
        groups = items.reshape(*self.scales.shape, self.group_size).astype(np.float32)
        groups *= _wide(self.scales)[..., None]
        groups += _wide(self.biases)[..., None]
        out[...] = groups.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class AffineBundles:
    """Quantised weights of bundles of several neurons.

    codes (bundles, rows, words) uint32; scales, biases (bundles, rows, groups)
    turned: a bundle is (d, neurons), its rows quantised along the neurons; otherwise (neurons, d)
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    turned: bool

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, key: Any) -> AffineBundles:
        """Bundles by anything that indexes an array."""
        return AffineBundles(self.codes[key], self.scales[key], self.biases[key], self.bits, self.turned)

    @property
    def neurons(self) -> int:
        """Neurons per bundle."""
        return self.codes.shape[2] * 32 // self.bits if self.turned else self.codes.shape[1]

    def widen(self, columns: slice = slice(None)) -> np.ndarray:
        """A copy of the neurons' rows (bundles * neurons, d) in fp32, or of these columns of them."""
        fields = [self.codes, self.scales, self.biases]
        if self.turned:
            fields = [field[:, columns] for field in fields]
        bundles, rows, _ = fields[0].shape
        codes, scales, biases = (field.reshape(bundles * rows, -1) for field in fields)
        plain = AffineRows(codes, scales, biases, self.bits)
        out = np.empty(plain.shape, np.float32)
        plain.widen(out)
        if not self.turned:
            return out[:, columns]
        return out.reshape(bundles, rows, -1).swapaxes(1, 2).reshape(bundles * self.neurons, rows)


def _wide(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return to_float32(np.ascontiguousarray(values), "bfloat16")
    return values.astype(np.float32)
