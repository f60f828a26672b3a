"""Look-ahead: reads for layer l+1 begin while layer l computes, from what layer l's input says of layer l+1's neurons.

A guess only prefetches, into memory of its own: what it gets wrong costs time, never output (DESIGN 9). Guesses are
capped, given up when the layer's real reads are due, and left out where tokens take no less time with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import BLOCK
from ..errors import ReadError
from ..residency.residency import Residency
from ..residency.rows import clip_targets, copy_rows
from ..storage.layout import Layout
from ..storage.reader import Pending
from .shared import Shared

if TYPE_CHECKING:
    from .sparse import SparseSelector

TRIAL = 12  # tokens timed with guesses, and as many without, in turn
KEEP = 500  # tokens until the next trial
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


class LookAhead:
    """One guess at a time, for all layers of a model.

    predictors[l]: x (..., d) -> (count,) fp32 logits of layer l; margins[l]: a guess's logit is above it
    mode: "auto" (times itself) or "on"
    """

    def __init__(
        self,
        shared: Shared,
        layout: Layout,
        predictors: Sequence[Callable[[Any], np.ndarray]],
        margins: Sequence[float],
        mode: str = "auto",
    ):
        self.shared, self.predictors, self.margins = shared, predictors, margins
        self.trial = Trial() if mode == "auto" else None
        self.slab = shared.backend.slab(layout, BLOCK, [part.name for part in layout.parts])
        # Not the selectors themselves: a cycle would keep their slabs in memory after the model is dropped.
        self.layers: dict[int, tuple[Residency, int]] = {}  # and the bytes that no guess needs to read
        self._layer, self._ids = -1, np.empty(0, np.int64)
        self._pending: Pending | None = None
        self._begin = 0.0

    def add(self, selector: SparseSelector) -> None:
        """A layer whose bundles may be guessed."""
        self.layers[selector.layer] = selector.residency, selector.skipped_bytes

    @property
    def on(self) -> bool:
        return self.trial is None or self.trial.on

    def forget(self) -> None:
        """Reads were drained: what the memory holds is not known."""
        self._pending = None

    def guess(self, layer: int, x: Any) -> None:
        """After the reads of the layer before were begun: begin those that `layer` will probably need."""
        if layer - 1 == min(self.layers):
            self._begin = time.perf_counter()
        if layer not in self.layers:
            if self.trial is not None and self._begin:
                self.trial.token(time.perf_counter() - self._begin)
            self._begin = 0.0
            return
        if not self.on:
            return
        self._end()
        (residency, skipped_bytes), logits = self.layers[layer], self.predictors[layer](x)
        likely = np.flatnonzero((logits > self.margins[layer]) & (residency.slot_of < 0))
        if len(likely) > BLOCK:
            likely = np.sort(likely[np.argsort(-logits[likely], kind="stable")[:BLOCK]])
        if not len(likely):
            return
        self._layer, self._ids = layer, likely
        targets = clip_targets(self.slab.targets, skipped_bytes)
        self._pending = self.shared.read(layer, likely, np.arange(len(likely)), targets)
        self.shared.stats.guessed += len(likely)

    def serve(self, selector: SparseSelector, ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Copy into `slots` (n,) what was read ahead of the layer's missing `ids` (n,), ascending; returns the
        positions that are left to be read."""
        if self._pending is None or self._layer != selector.layer or not self._end():
            return np.arange(len(ids))
        row = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        found = self._ids[row] == ids
        if found.any():
            source = clip_targets(self.slab.targets, selector.skipped_bytes)
            copy_rows(source, row[found], selector.slab.targets, slots[found])
            self.shared.stats.guessed_right += int(found.sum())
        return np.flatnonzero(~found)

    def _end(self) -> bool:
        """Wait for what is in flight, no more; whether all of the guess has been read."""
        pending, whole = self._pending, False
        if pending is not None:
            if not pending.ended():
                pending.give_up()  # real reads wait
            with suppress(ReadError):  # given up; a disk that fails will say so again
                pending.wait()
                whole = True
        self._pending = None  # not before the wait, which may be interrupted
        return whole
