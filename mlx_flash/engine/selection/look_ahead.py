"""Look-ahead: while layer l computes, the bundles that layer l+1 will probably need are prefetched.

A guess is made from layer l's input, by layer l+1's predictor or router. It only prefetches, into the slots that its
layer needs least: a wrong guess costs time and never changes the output. Guesses are capped, and stop where
tokens take no less time with them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import Predictor
from mlx_flash.engine.residency.slot_loader import SlotLoader

from .context import SharedContext

GUESS_SHARE = 4  # a guess fills at most one slot in so many of its layer


class Trial:
    """Measures whether guesses pay: times `tokens` tokens with them and as many without, in turn, and keeps the faster
    way for the next `keep` tokens. Guesses must bring a token's time down to the share `gain`.

    on: whether the next token is to be guessed; kept: tokens until the next trial.
    """

    def __init__(self, tokens: int = 12, keep: int = 500, gain: float = 0.98) -> None:
        self.on, self.kept = True, 0
        self._tokens, self._keep, self._gain = tokens, keep, gain
        self._times: dict[bool, list[float]] = {True: [], False: []}

    def token(self, seconds: float) -> None:
        """Record how long a token took with `on` as it was; sets `on` for the next token."""
        if self.kept:
            self.kept -= 1
            return
        self._times[self.on].append(seconds)
        if all(len(times) >= self._tokens for times in self._times.values()):
            self.on = median(self._times[True]) < self._gain * median(self._times[False])
            self._times = {True: [], False: []}
            self.kept = self._keep
        else:
            self.on = not self.on


class LookAhead:
    """Guesses for all layers of a model, each made while the layer before computes.

    predictors[l]: for layer l; margins[l]: a bundle is guessed where its logit is above it
    mode: "auto" (times itself) or "on"
    """

    def __init__(
        self,
        shared: SharedContext,
        predictors: Sequence[Predictor] | Mapping[int, Predictor],
        margins: Sequence[float],
        mode: str = "auto",
    ):
        self.shared, self.predictors, self.margins = shared, predictors, margins
        self.trial = Trial() if mode == "auto" else None
        # Weakly: a cycle would keep their slabs in memory after the model is dropped.
        self.layers: dict[int, weakref.ref[SlotLoader]] = {}
        self._last: weakref.ref[SlotLoader] | None = None  # of the layer that was guessed last
        self._begin = 0.0
        self._begun: Callable[[], np.ndarray] | None = None  # logits of the layer that is guessed next

    def add(self, loader: SlotLoader) -> None:
        """Register the slots of a layer that may be guessed."""
        self.layers[loader.layer] = weakref.ref(loader)

    def target(self, layer: int) -> SlotLoader | None:
        """The layer's slots if guesses of it are to be made now, else None."""
        found = self.layers.get(layer)
        return found() if found is not None and (self.trial is None or self.trial.on) else None

    def forget(self) -> None:
        """The reader was drained: slots that were being filled hold unknown bytes."""
        self._begun = None
        for found in self.layers.values():
            if (loader := found()) is not None:
                loader.forget_prefetches()

    def prepare(self, layer: int, x: Any) -> None:
        """Begin to compute the logits that `guess` will need, if it is called with the same arguments."""
        self._begun = self.predictors[layer](x) if self.target(layer) is not None else None

    def guess(self, layer: int, x: Any) -> None:
        """After the reads of the layer before have begun: prefetch what `layer` will probably need. x None: nothing is
        known of it, the token is timed only."""
        if layer - 1 == min(self.layers):
            self._begin = time.perf_counter()
        if layer - 1 == max(self.layers):
            if self.trial is not None and self._begin:
                self.trial.token(time.perf_counter() - self._begin)
            self._begin = 0.0
        begun, self._begun = self._begun, None
        loader = None if x is None else self.target(layer)
        if loader is None:
            return
        logits = begun or self.predictors[layer](x)
        likely = self._likely(loader, logits())
        if len(likely):
            self.shared.stats.guessed += loader.prefetch(likely)
            self._last = self.layers[layer]

    def advance(self) -> None:
        """While a layer computes: start the prefetches that did not fit the disk's queue at first."""
        if self._last is not None and (loader := self._last()) is not None:
            loader.advance()

    def guessed_ids(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """The ids that logits (count,) predict, ascending."""
        return np.flatnonzero(logits > self.margins[layer])

    def _likely(self, loader: SlotLoader, logits: np.ndarray) -> np.ndarray:
        """Ids that the layer will probably ask for, ascending: the resident ones, so that they stay, and as many of the
        others as may take the place of resident ones."""
        residency = loader.residency
        likely = self.guessed_ids(loader.layer, logits)
        missing = np.flatnonzero(residency.slot_of[likely] < 0)
        most = residency.capacity // GUESS_SHARE
        if len(missing) > most:
            least = np.argsort(-logits[likely[missing]], kind="stable")[most:]
            likely = np.delete(likely, missing[least])
        return likely


class ExpertLookAhead(LookAhead):
    """Guesses for layers of experts: the next layer's router, applied to this layer's input, predicts its choice.

    top_k[l]: how many experts are guessed at most; mode: "auto" (times itself) or "on". A layer is guessed if it has a
    router (`add_router`) and at least GUESS_SHARE slots.
    """

    def __init__(self, shared: SharedContext, top_k: Sequence[int], mode: str = "auto"):
        self._routers: dict[int, Predictor] = {}
        super().__init__(shared, self._routers, (), mode)
        self.top_k = top_k

    def add_router(self, layer: int, predict: Callable[[Any], np.ndarray]) -> None:
        """Register a layer's router. predict: x, as it is handed to `guess`, -> logits (count,) in host memory."""
        self._routers[layer] = lambda x: partial(predict, x)

    def target(self, layer: int) -> SlotLoader | None:
        """See `LookAhead.target`."""
        found = super().target(layer) if layer in self._routers else None
        return found if found is not None and found.residency.capacity >= GUESS_SHARE else None

    def guessed_ids(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """The ids of the largest logits (count,), ascending."""
        return np.sort(np.argsort(-logits, kind="stable")[: self.top_k[layer]])
