"""What our own decoder asks of a backend beyond the FFN: resident weights, attention, and a mixture's experts.

Activations are NumPy arrays in fp32. Weights and the KV cache have the backend's own form, which the decoder only hands
back. mlx-lm's models compute these themselves: the mlx backend has none of this. Knows no checkpoints and no families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_flash.engine.storage.bundle import Layout

from .base import Backend, OwnSlab, Slab


class Weights(Protocol):
    """A resident matrix (rows, n) or vector (n,): what `from_bytes` made, or `AffineRows` of three such arrays."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...


Linear = tuple[Weights, np.ndarray | None]  # a matrix and its bias in fp32
Norm = tuple[np.ndarray, np.ndarray | None]  # a norm's weight and bias in fp32


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's attention, H query heads that share K key and value heads of `size` items, and the norms before and
    after it. Vectors are fp32.

    norm: "rms" or "layer"
    inputs: weights of queries, keys and values, in this order: one for all, or three
    q_norm, k_norm: over as many items at a time as they have weights
    rotations: (2, context, size / 2) cosines and sines, half-split
    keys, values: the KV cache (K, context, size), as `new_cache` made it
    window: how many positions a token sees, its own included; None: all up to its own
    """

    heads: int
    kv_heads: int
    size: int
    norm: str
    eps: float
    before: Norm
    after: Norm
    inputs: Sequence[Linear]
    output: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    rotations: np.ndarray | None
    keys: np.ndarray
    values: np.ndarray
    window: int | None = None

    @property
    def width(self) -> int:
        """Items of a token's queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.size


class Activations:
    """One token's activations, in memory that all layers of a model share: x (1, d), the residual stream; h (1, d), the
    FFN's input; position (1,) of the token. The rest is used within a layer; scores takes memory as positions come."""

    def __init__(self, dim: int, width: int, heads: int, context: int):
        self.x, self.h, self.more = (np.zeros((1, dim), np.float32) for _ in range(3))
        self.position = np.zeros(1, np.int64)
        self.projected, self.attended = np.zeros(width, np.float32), np.zeros(width, np.float32)
        self.scores = np.empty((heads, context), np.float32)


class DecoderBackend(Backend, Protocol):
    """A backend that computes a whole decoder. T tokens of width d, H query heads and K key/value heads of size D."""

    def from_bytes(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Weights:
        """Weights of this shape from their bytes in a file. raw (nbytes,) uint8, which stays as it is, so that a view
        will do; dtype: "float32", "float16", "bfloat16", or "uint32" for words of codes."""

    def to_float32(self, w: Weights) -> np.ndarray:
        """Weights as fp32, same shape."""

    def linear(self, x: np.ndarray, w: Weights, bias: np.ndarray | None = None) -> np.ndarray:
        """x (T, n), w (rows, n), bias (rows,) fp32 -> x @ w.T + bias, (T, rows)."""

    def embed(self, w: Weights, ids: np.ndarray) -> np.ndarray:
        """Rows ids (T,) of w (V, d) -> (T, d)."""

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x (..., n), weight (n,) -> x / sqrt(mean(x^2) + eps) * weight, (..., n)."""

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
        """x (..., n), weight and bias (n,) -> (x - mean) / sqrt(variance + eps) * weight + bias, (..., n)."""

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Rotary positions, half-split: item i turns with item i + D/2. x (T, H, D), cos and sin (T, D/2) ->
        (T, H, D)."""

    def new_cache(self, kv_heads: int, context: int, head_dim: int, dtype: str) -> np.ndarray:
        """Keys or values of one layer, zeroed: (K, context, D), stored in `dtype`."""

    def store(self, cache: np.ndarray, start: int, values: np.ndarray) -> None:
        """Write keys or values (T, K, D) of the positions from `start` on into a cache."""

    def attend(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int, window: int | None = None
    ) -> np.ndarray:
        """Causal attention: query t, at position start + t, sees positions 0..start + t, or the last `window` of them.
        q (T, H, D); keys, values: caches; head h uses h // (H / K) of them -> (T, H, D)."""

    def attention(self, layer: Attention, memory: Activations) -> Callable[[], None] | None:
        """A step that computes one layer's attention for one token in one call: it adds the attention of x's norm to
        memory.x, puts the next norm of that into memory.h, and stores the token's keys and values. Arrays must stay
        where they are. None: the backend has no such step, and the decoder puts it together from the rest."""

    def decode(self, step: Callable[[], None]) -> None:
        """Run a step that `attention` made."""

    def products(self) -> AbstractContextManager[None]:
        """Entered around a prompt's chunk: the place to set up libraries for large products."""


class ExpertPass(Protocol):
    """One layer's experts on x (T, d). Every (token, expert) pair has the same bits wherever the expert's slot is."""

    def add(self, ids: np.ndarray, rows: np.ndarray, slab: OwnSlab) -> None:
        """Compute all pairs of the experts ids (n,), which lie in rows (n,) of the slab."""

    def result(self, weights: np.ndarray) -> np.ndarray:
        """The pairs' outputs times weights (T, k) fp32, added up token by token in the order chosen: (T, d)."""


class ExpertBackend(DecoderBackend, Protocol):
    """A backend that also computes mixtures of experts whose experts lie in a checkpoint as downloaded."""

    def activate(self, name: str, values: np.ndarray) -> np.ndarray:
        """An activation ("relu", "silu") of values, contiguous fp32, which it may overwrite."""

    def expert_slab(self, layout: Layout, shapes: Mapping[str, tuple[int, int]], rows: int) -> Slab:
        """Memory for `rows` experts. shapes: (rows, columns) of the matrices "gate", "up" and "down"."""

    def expert_pass(self, activation: str, x: np.ndarray, chosen: np.ndarray) -> ExpertPass:
        """Begin one layer's experts on x (T, d). chosen (T, k): each token's experts, distinct."""

    def expert_scratch_bytes(self, tokens: int, dim: int, width: int, top_k: int) -> int:
        """Most bytes that an expert pass over so many tokens takes beyond slabs. width: of one expert."""
