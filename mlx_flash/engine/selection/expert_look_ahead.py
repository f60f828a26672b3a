"""Look-ahead for experts: the next layer's router, applied to this layer's input, says what that layer will choose.

Knows ids, logits and slots; what a router is, and how its logits get into host memory, is the model code's. A guess
only prefetches: what it gets wrong costs time, never output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import Predictor

from .context import SharedContext
from .look_ahead import GUESS_SHARE, Foreseen, LookAhead


class ExpertLookAhead(LookAhead):
    """Guesses for layers of experts, `top_k[l]` of them at most. mode: "auto" (times itself) or "on".

    `learn` says how a layer is foreseen; one of which nothing is known, or that has too few slots, is not guessed.
    """

    def __init__(self, shared: SharedContext, top_k: Sequence[int], mode: str = "auto"):
        self._known: dict[int, Predictor] = {}
        super().__init__(shared, self._known, (), mode)
        self.top_k = top_k

    def learn(self, layer: int, predict: Callable[[Any], np.ndarray]) -> None:
        """predict: x, as it is handed to `guess`, -> logits (count,) of the layer's router in host memory."""
        self._known[layer] = lambda x: partial(predict, x)

    def wanted(self, layer: int) -> Foreseen | None:
        """See `LookAhead.wanted`."""
        found = super().wanted(layer) if layer in self._known else None
        return found if found is not None and found.residency.capacity >= GUESS_SHARE else None

    def named(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """The ids of the largest logits (count,), ascending."""
        top_k = self.top_k[layer]
        return np.sort(np.argsort(-logits, kind="stable")[:top_k])
