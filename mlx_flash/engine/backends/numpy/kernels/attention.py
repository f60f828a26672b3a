"""What a set of kernels needs to know to decode a token's attention in one call (`kernels.Kernels.attention`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Biased = tuple[Any, np.ndarray | None]  # weights as kernels take them, and their bias in fp32


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention, H query heads that share K key and value heads of `size` items, and the norms before and
    after it. Vectors are fp32.

    norm: "rms" or "layer"
    inputs: weights of queries, keys and values, in this order: one for all, or three
    q_norm, k_norm: over as many items at a time as they have weights
    rotations: (2, context, size / 2) cosines and sines, half-split
    keys, values: (K, context, size) in a storage dtype
    window: how many positions a token sees, its own included; None: all up to its own
    """

    heads: int
    kv_heads: int
    size: int
    norm: str
    eps: float
    before: Biased
    after: Biased
    inputs: Sequence[Biased]
    output: Biased
    q_norm: Biased | None
    k_norm: Biased | None
    rotations: np.ndarray | None
    keys: np.ndarray
    values: np.ndarray
    window: int | None = None

    @property
    def width(self) -> int:
        """Items of a token's queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.size


class Activations:
    """What the layers of one model hand on: x (1, d), the residual stream; h (1, d), what the FFN gets; position (1,),
    that of the token. The rest is used within a layer; scores takes memory as the positions come."""

    def __init__(self, dim: int, width: int, heads: int, context: int):
        self.x, self.h, self.more = (np.zeros((1, dim), np.float32) for _ in range(3))
        self.position = np.zeros(1, np.int64)
        self.projected, self.attended = np.zeros(width, np.float32), np.zeros(width, np.float32)
        self.scores = np.empty((heads, context), np.float32)
