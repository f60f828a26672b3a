"""The size of mlx-lm's KV cache for a model of any architecture.

The model runs on one token without evaluating anything, and the shapes of its cache are read. Needs mlx-lm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat import ArraysCache, CacheList, RotatingKVCache, make_prompt_cache


def kv_bytes(model: nn.Module, tokens: int, chunk: int) -> int:
    """Bytes of a KV cache for `tokens` tokens of one sequence, as `make_prompt_cache` gives it and a prompt in chunks
    of `chunk` tokens fills it. State that does not grow counts as it is. Reads no weights."""
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    return sum(_grown(each, tokens, chunk) for each in cache)


def _grown(cache: Any, tokens: int, chunk: int) -> int:
    if isinstance(cache, CacheList):
        return sum(_grown(each, tokens, chunk) for each in cache.caches)
    arrays = list(_arrays(vars(cache)))
    if isinstance(cache, ArraysCache):
        return sum(array.nbytes for array in arrays)
    step = int(getattr(cache, "step", 256))
    rows = -(-tokens // step) * step
    if isinstance(cache, RotatingKVCache):
        rows = min(rows, int(cache.max_size) + chunk)
    return sum(array.nbytes // array.shape[-2] * rows for array in arrays if array.ndim >= 3)


def _arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _arrays(each)
