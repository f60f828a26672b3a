"""Decoding a token's attention in one call of compiled code, from the norm before it to the norm of what the FFN gets.

What Python does between kernels of some ten to some hundred microseconds is a tenth of a token's time. Here the steps
are put together once, from memory that stays where it is. Checks what compiled code takes on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_flash.engine.backends.decoder_base import Activations, Attention, Linear, Norm

from . import attention_loops
from .thread_pool import Steps, Workers

NORMS = {"rms": attention_loops.RMS, "layer": attention_loops.LAYER}
AddDots = Callable[[Steps, Any, np.ndarray, np.ndarray], None]  # out (rows,) = w . x, as further steps


def check(a: Attention, memory: Activations) -> None:
    """ValueError where the parts do not fit each other."""
    d, context = memory.x.shape[1], memory.scores.shape[1]
    rows = sum(len(w) for w, _ in a.inputs)
    if rows != a.width or any(w.shape[1] != d for w, _ in a.inputs) or a.output[0].shape != (d, a.heads * a.size):
        raise ValueError(f"{rows} rows and output {a.output[0].shape} for {a.heads} and {a.kv_heads} heads of {a.size}")
    if a.heads % a.kv_heads or a.width > len(memory.projected) or a.heads > len(memory.scores):
        raise ValueError(f"{a.heads} heads, {a.kv_heads} of keys, in memory for {memory.scores.shape}")
    for cache in (a.keys, a.values):
        fits = cache.dtype == a.keys.dtype and cache.strides == a.keys.strides and cache.strides[2] == cache.itemsize
        if cache.shape != (a.kv_heads, context, a.size) or not fits:
            raise ValueError(f"keys {a.keys.dtype} {a.keys.shape}, values {a.values.dtype} {a.values.shape}")
    if a.window is not None and a.window < 1:
        raise ValueError(f"a window of {a.window} positions")
    turns = a.rotations
    if turns is not None and (turns.shape != (2, context, a.size // 2) or a.size % 2 or not _plain(turns)):
        raise ValueError(f"rotations {turns.dtype} {turns.shape} for heads of {a.size} and {context} positions")
    for (weight, bias), n in ((a.before, d), (a.after, d), *_head_norms(a)):
        if weight.shape != (n,) or not _plain(weight) or bias is not None and (bias.shape != (n,) or not _plain(bias)):
            raise ValueError(f"a norm's weights {weight.dtype} {weight.shape} for {n} items")
    for w, bias in (*a.inputs, a.output):
        if bias is not None and (bias.shape != (len(w),) or not _plain(bias)):
            raise ValueError(f"a bias {bias.dtype} {bias.shape} for {len(w)} rows")


def _plain(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and array.flags.c_contiguous


def _head_norms(a: Attention) -> list[tuple[Norm, int]]:
    """The norms of queries and keys, and over how many items each works: of one head, or of all."""
    found = []
    for norm, heads in ((a.q_norm, a.heads), (a.k_norm, a.kv_heads)):
        if norm is not None:
            found.append((norm, a.size if len(norm[0]) == a.size else heads * a.size))
    return found


def attention_steps(workers: Workers, a: Attention, kind: int, memory: Activations, add_dots: AddDots) -> Steps:
    """x += attention(norm(x)), then h = norm(x). kind: of the cache's dtype."""
    check(a, memory)
    steps = Steps(workers)

    def add_linear(weights: Linear, x: np.ndarray, out: np.ndarray) -> None:
        w, bias = weights
        add_dots(steps, w, x, out)
        if bias is not None:
            steps.add(attention_loops.add, 1, len(out), bias, out)

    _add_norm(steps, a, a.before, None, memory)
    begin = 0
    for weights in a.inputs:
        end = begin + len(weights[0])
        add_linear(weights, memory.h[0], memory.projected[begin:end])
        begin = end
    _add_heads(steps, a, kind, memory)
    add_linear(a.output, memory.attended[: a.heads * a.size], memory.more[0])
    _add_norm(steps, a, a.after, memory.more, memory)
    return steps


def _add_norm(steps: Steps, a: Attention, norm: Norm, more: np.ndarray | None, memory: Activations) -> None:
    weight, bias = norm
    where = memory.x, _or_0(more), len(weight), weight, _or_0(bias), np.float32(a.eps), memory.h
    steps.add(attention_loops.add_and_norm, 1, NORMS[a.norm], *where)


def _add_heads(steps: Steps, a: Attention, kind: int, memory: Activations) -> None:
    """From the projections to what attention gives."""
    (q_weight, q_bias), (k_weight, k_bias) = a.q_norm or (None, None), a.k_norm or (None, None)
    norms = _or_0(q_weight), _or_0(q_bias), _count(q_weight), _or_0(k_weight), _or_0(k_bias), _count(k_weight)
    turns = (0, 0) if a.rotations is None else (a.rotations, a.rotations.strides[0])
    cache = a.keys, a.values, a.keys.strides[0], a.keys.strides[1]
    shape = memory.projected, a.heads, a.kv_heads, a.size
    norm = NORMS[a.norm], np.float32(a.eps)
    steps.add(attention_loops.turn_and_store, 1, kind, *shape, *norm, *norms, *turns, memory.position, *cache)
    scores = memory.scores, memory.scores.shape[1]
    window = memory.scores.shape[1] if a.window is None else a.window
    steps.add(attention_loops.attend, a.heads, kind, *shape, memory.position, *cache, *scores, memory.attended, window)


def _or_0(array: np.ndarray | None) -> Any:
    return 0 if array is None else array


def _count(array: np.ndarray | None) -> int:
    return 0 if array is None else len(array)
