"""An FFN's activation and the sum of its terms, in MLX arrays. Needs mlx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.engine.backends.base import SEGMENTS, add_pairwise

Unary = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Activation:
    """`alone(g)`, and `times(g, u)` = alone(g) * u in one kernel."""

    alone: Unary
    times: Callable[[mx.array, mx.array], mx.array]


def _relu(gate: mx.array) -> mx.array:
    return mx.maximum(gate, 0)


def _fused(alone: Unary) -> Activation:
    return Activation(alone, mx.compile(lambda gate, up: alone(gate) * up, shapeless=True))


_ALONE = {"silu": nn.silu, "relu": _relu, "gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "relu2": nn.relu2}
ACTIVATIONS = {name: _fused(alone) for name, alone in _ALONE.items()}


class Sum:
    """The terms added so far, in fp32: segments of blocks, added pairwise (see `base.BLOCK`). One token: a list of
    partial sums, added up at the end in a few operations; more tokens: running sums, so that a prompt's partial sums
    are not all alive at once.

    What a segment's partial sums are depends on its own terms alone, and so do the bits of its sum.
    """

    LIVE = 4  # running sums alive at once

    def __init__(self) -> None:
        self._partials: list[mx.array] = []  # each (n, 1, d)
        self._segments: list[np.ndarray] = []  # each (n,)
        self._segment = 0  # the one under way, for several tokens
        self._running: mx.array | None = None  # its sum (1, T, d)
        self._complete: list[mx.array | None] = []  # the parts of the tree left of it, ever smaller ones

    def add(self, terms: mx.array, segments: np.ndarray) -> None:
        """terms (n, T, d), each the sum of some terms of one segment; segments (n,), ascending from call to call; n > 1
        for one token only."""
        if terms.shape[1] == 1:
            self._partials.append(terms)
            self._segments.append(segments)
            return
        self._enter(int(segments[0]))
        terms = terms.astype(mx.float32)
        self._running = terms if self._running is None else self._running + terms

    def arrays(self) -> list[mx.array]:
        held = [*self._complete, self._running]
        return self._partials + [array for array in held if array is not None]

    def total(self, shape: tuple[int, ...]) -> mx.array:
        """float32, as many items as `shape`; of that shape where there are no terms."""
        if self._partials:
            return self._total_of_partials()
        self._enter(SEGMENTS)
        root = self._complete[0]
        return mx.zeros(shape, mx.float32) if root is None else root

    def _enter(self, segment: int) -> None:
        """Terms of `segment` come next; what is complete left of it is added pairwise."""
        while self._segment < segment:
            found, odd = self._running, self._segment
            while odd & 1:  # the right half of a pair
                left = self._complete.pop()
                found, odd = (found if left is None else left if found is None else left + found), odd >> 1
            self._complete.append(found)
            self._running, self._segment = None, self._segment + 1

    def _total_of_partials(self) -> mx.array:
        if [len(terms) for terms in self._partials] == [1, 1]:  # whatever their segments
            return self._partials[0].astype(mx.float32) + self._partials[1].astype(mx.float32)
        lengths = np.bincount(np.concatenate(self._segments), minlength=SEGMENTS)
        partials, longest = list(self._partials), int(lengths.max())
        padded = bool((lengths < longest).any())
        if padded and lengths.sum() > 1:
            partials.append(mx.zeros((1, *partials[0].shape[1:]), partials[0].dtype))
        whole = (partials[0] if len(partials) == 1 else mx.concatenate(partials)).astype(mx.float32)
        if len(whole) == 1:
            return whole
        if padded:  # each segment's partial sums, then zeros up to one length
            index = np.full((SEGMENTS, longest), len(whole) - 1, np.uint32)
            index[np.arange(longest) < lengths[:, None]] = np.arange(len(whole) - 1)
            whole = mx.take(whole, mx.array(index.reshape(-1)), axis=0)
        sums = whole.reshape(SEGMENTS, longest, -1)
        total: mx.array = add_pairwise(sums.sum(axis=1) if longest > 1 else sums[:, 0])
        return total
