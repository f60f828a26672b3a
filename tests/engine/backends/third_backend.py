"""A third backend: everything that the protocols ask for, in plain NumPy, of the simplest kind. The test of the seam.

Weights are fp32 whatever the checkpoint holds; rows are copied when they are used. Every product is summed row by row,
so that its bits do not depend on what else is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import BLOCK, SEGMENTS, add_pairwise, block_segments
from mlx_flash.engine.numerics.casting import RAW, to_float32
from mlx_flash.engine.storage.reader import Target

ACTIVATIONS = {"": lambda z: z, "relu": lambda z: np.maximum(z, 0), "silu": lambda z: z / (1 + np.exp(-z))}


def dots(x, w):  # x (T, n), w (rows, n) -> (T, rows)
    return (x[:, None] * w).sum(axis=2)


class ThirdSlab:
    def __init__(self, layout, rows, parts):
        self.layout, self.rows, self.begin = layout, rows, layout.offset(parts[0])
        self.memory = np.zeros((rows, sum(layout.part(name).nbytes for name in parts)), np.uint8)
        self.nbytes, self.targets = self.memory.nbytes, (Target(self.begin, self.memory),)

    def part(self, name, rows):  # -> (n, d) fp32, a copy
        part, at = self.layout.part(name), self.layout.offset(name) - self.begin
        raw = np.ascontiguousarray(self.memory[rows, at : at + part.nbytes])
        return to_float32(raw.view(RAW[part.dtype]), part.dtype)


class ThirdPass:
    def __init__(self, spec, x):
        self.spec, self.x, self.leads = spec, x, None
        self.terms: list[tuple] = []  # ids (n,), scalars (T, n), rows of down (n, d)

    def factor(self, name, ids, rows, slab):
        z = dots(self.x, slab.part(name, rows))
        if (bias := self.spec.biases[name]) is not None:
            z = z + bias[ids]
        return z if self.spec.gated and name == "up" else ACTIVATIONS[self.spec.activation](z)

    def lead(self, ids, rows, slab):
        z = self.factor(self.spec.first, ids, rows, slab)
        return np.where(np.abs(z) <= self.spec.cutoff, 0, z)

    def gate(self, slab):
        ids = np.arange(self.spec.layout.count)
        self.leads = self.lead(ids, ids, slab)
        return np.flatnonzero(self.leads.any(axis=0)).astype(np.int32)

    def scalars(self, ids, slab, rows, late=None):
        h = self.lead(ids, rows, slab) if self.leads is None else self.leads[:, ids]
        if self.spec.second is not None:
            h = h * self.factor(self.spec.second, ids, rows, slab)
        self.terms.append((ids, h, slab.part("down", rows)))

    def down(self):
        """`result` sums up."""

    def dense(self, slab, first_row, first_id, count, h=None):
        self.scalars(np.arange(first_id, first_id + count), slab, np.arange(first_row, first_row + count))
        if h is not None:
            h[:] = self.terms[-1][1]

    def settle(self):
        """Rows were copied."""

    def result(self):
        ids, h, down = (np.concatenate([term[k] for term in self.terms], axis=k % 2) for k in range(3))
        segments, sums = block_segments(self.spec.layout), np.zeros((SEGMENTS, *self.x.shape), np.float32)
        for block in np.unique(ids // BLOCK):
            mine = np.flatnonzero(ids // BLOCK == block)
            mine = mine[np.argsort(ids[mine])]
            sums[segments[block]] += (h[:, mine, None] * down[mine]).sum(
                axis=1
            )  # NumPy adds along this axis one by one
        y = add_pairwise(sums)
        return y if self.spec.down_bias is None else y + self.spec.down_bias


class ThirdBackend:
    name, compiles, lazy, executor = "third", False, False, None

    def slab(self, layout, rows, parts):
        return ThirdSlab(layout, rows, parts)

    def slab_bytes(self, layout, rows, parts):
        return rows * sum(layout.part(name).nbytes for name in parts)

    def ffn(self, spec, x):
        return ThirdPass(spec, x)

    def predictor(self, a, b, step, bias):
        return lambda x: lambda: (step * dots(dots(x, a), b) + bias).max(axis=0).astype(np.float32)

    def shift(self, y, offset):
        return y + offset

    def to_numpy(self, x):
        return x

    def prefill_scratch_bytes(self, layout, widths, chunk, context):
        return 4 * chunk * widths.dim * (widths.intermediate + widths.qkv_rows + context)

    def from_bytes(self, raw, dtype, shape):
        return to_float32(raw.view(RAW[dtype]), dtype).reshape(shape)

    def to_float32(self, w):
        return w

    def linear(self, x, w, bias=None):
        return dots(x, w) if bias is None else dots(x, w) + bias

    def embed(self, w, ids):
        return w[ids]

    def rms_norm(self, x, weight, eps):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight

    def layer_norm(self, x, weight, bias, eps):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight + bias

    def rope(self, x, cos, sin):
        (a, b), cos, sin = np.split(x, 2, axis=-1), cos[:, None], sin[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def new_cache(self, kv_heads, context, head_dim, dtype):
        return np.zeros((kv_heads, context, head_dim), np.float32)

    def store(self, cache, start, values):
        cache[:, start : start + len(values)] = values.swapaxes(0, 1)

    def attend(self, q, keys, values, start, window=None):
        out = np.empty_like(q)
        for t, head in np.ndindex(q.shape[:2]):
            end, group = start + t + 1, head // (q.shape[1] // len(keys))
            seen = slice(0 if window is None else max(0, end - window), end)
            scores = np.exp(keys[group, seen] @ q[t, head] / np.sqrt(q.shape[2]))
            out[t, head] = scores / scores.sum() @ values[group, seen]
        return out

    def attention(self, layer, memory) -> Callable[[], None] | None:
        return None

    def decode(self, step: Any) -> None:
        step()

    def products(self):
        return nullcontext()
