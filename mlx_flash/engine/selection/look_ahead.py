"""Look-ahead: reads for layer l+1 begin while layer l computes, from what layer l's input says of layer l+1's neurons.

A guess only prefetches, into the slots of what its layer needs least: what it gets wrong costs time, never output
(DESIGN 9). Guesses are capped, and left out where tokens take no less time with them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Protocol

import numpy as np

from mlx_flash.engine.backends.base import Predictor
from mlx_flash.engine.residency.slots import Residency

from .context import SharedContext

TRIAL = 12  # tokens timed with guesses, and as many without, in turn
KEEP = 500  # tokens until the next trial
GUESS_SHARE = 4  # a guess fills at most one slot in so many of its layer
GAIN = 0.98  # guesses stay while a token takes at most this share of the time it takes without


class Trial:
    """Whether guesses pay: times tokens with and without them, in turn, and keeps what is faster for a while."""

    def __init__(self) -> None:
        self.on = True
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._kept = 0

    def token(self, seconds: float) -> None:
        """A token took so long, with `on` as it was; `on` is then what the next one is to do."""
        if self._kept:
            self._kept -= 1
            return
        self._times[self.on].append(seconds)
        if all(len(times) >= TRIAL for times in self._times.values()):
            self.on = median(self._times[True]) < GAIN * median(self._times[False])
            self._times = {True: [], False: []}
            self._kept = KEEP
        else:
            self.on = not self.on


class Foreseen(Protocol):
    """One layer, whose bundles may be read ahead."""

    layer: int
    residency: Residency

    def read_ahead(self, ids: np.ndarray) -> int:
        """Begin to read those of `ids` (n,), ascending, that are missing; returns how many."""

    def ahead_ended(self) -> bool:
        """Whether all that is being read ahead has come; reads that wait for their turn go on."""

    def forget_ahead(self) -> None:
        """What was being read ahead may not have come."""


class LookAhead:
    """Guesses for all layers of a model, each made while the layer before computes.

    predictors[l]: for layer l; margins[l]: a guess's logit is above it
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
        self.layers: dict[int, weakref.ref[Foreseen]] = {}
        self._last: weakref.ref[Foreseen] | None = None  # whose bundles were guessed last
        self._begin = 0.0
        self._begun: Callable[[], np.ndarray] | None = None  # logits of the layer that is guessed next

    def add(self, selector: Foreseen) -> None:
        """A layer whose bundles may be guessed."""
        self.layers[selector.layer] = weakref.ref(selector)

    @property
    def on(self) -> bool:
        return self.trial is None or self.trial.on

    def wanted(self, layer: int) -> Foreseen | None:
        """The layer, where guesses of it are to be made now."""
        found = self.layers.get(layer)
        return found() if found is not None and self.on else None

    def forget(self) -> None:
        """Reads were drained: slots that were being filled ahead hold unknown bytes."""
        self._begun = None
        for found in self.layers.values():
            if (selector := found()) is not None:
                selector.forget_ahead()

    def prepare(self, layer: int, x: Any) -> None:
        """Begin to compute what `guess` will need, if it is called with the same."""
        self._begun = self.predictors[layer](x) if self.wanted(layer) is not None else None

    def guess(self, layer: int, x: Any) -> None:
        """After the reads of the layer before were begun: begin those that `layer` will probably need. x None: nothing
        is known of it, the token is timed only."""
        if layer - 1 == min(self.layers):
            self._begin = time.perf_counter()
        if layer - 1 == max(self.layers):
            if self.trial is not None and self._begin:
                self.trial.token(time.perf_counter() - self._begin)
            self._begin = 0.0
        begun, self._begun = self._begun, None
        selector = None if x is None else self.wanted(layer)
        if selector is None:
            return
        logits = begun or self.predictors[layer](x)
        likely = self._likely(selector, logits())
        if len(likely):
            self.shared.stats.guessed += selector.read_ahead(likely)
            self._last = self.layers[layer]

    def go_on(self) -> None:
        """While a layer computes: what did not fit the disk's queue when it was guessed is begun."""
        if self._last is not None and (selector := self._last()) is not None:
            selector.ahead_ended()

    def named(self, layer: int, logits: np.ndarray) -> np.ndarray:
        """Ids that logits (count,) name, ascending."""
        return np.flatnonzero(logits > self.margins[layer])

    def _likely(self, selector: Foreseen, logits: np.ndarray) -> np.ndarray:
        """Ids that the layer will probably ask for, ascending: those that are resident, so that they stay, and as many
        of the others as may take the place of resident ones."""
        layer, residency = selector.layer, selector.residency
        override = self.shared.override_guess
        likely = self.named(layer, logits) if override is None else override(layer)
        missing = np.flatnonzero(residency.slot_of[likely] < 0)
        most = residency.capacity // GUESS_SHARE
        if len(missing) > most:
            least = np.argsort(-logits[likely[missing]], kind="stable")[most:]
            likely = np.delete(likely, missing[least])
        return likely
