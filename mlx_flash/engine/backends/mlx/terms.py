"""What every FFN in MLX arrays is made of: its activation, and the sum of its terms. Needs mlx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

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


@dataclass
class Sum:
    """The terms added so far. One token: a list of partials, summed at the end in one operation of fixed shape;
    more tokens: a running sum, so that a prompt's partials are not all alive at once."""

    partials: list[mx.array] = field(default_factory=list)  # each (n, 1, d), n blocks' sums
    running: mx.array | None = None  # (1, T, d) float32

    def add(self, terms: mx.array) -> None:
        """terms (n, T, d), each the sum of a block; n > 1 for one token only."""
        if terms.shape[1] == 1:
            self.partials.append(terms)
        else:
            terms = terms.astype(mx.float32)
            self.running = terms if self.running is None else self.running + terms

    def arrays(self) -> list[mx.array]:
        return self.partials + ([] if self.running is None else [self.running])

    def total(self, shape: tuple[int, ...]) -> mx.array:
        """float32, as many items as `shape`; of that shape where there are no terms."""
        if self.running is not None:
            return self.running
        if not self.partials:
            return mx.zeros(shape, mx.float32)
        if [len(terms) for terms in self.partials] == [1, 1]:  # one operation instead of three, in the same order
            return self.partials[0].astype(mx.float32) + self.partials[1].astype(mx.float32)
        whole = self.partials[0] if len(self.partials) == 1 else mx.concatenate(self.partials)
        whole = whole.astype(mx.float32)
        return whole if len(whole) == 1 else whole.sum(axis=0, keepdims=True)
