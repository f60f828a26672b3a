"""Which bundles a decoding step needs: one class per selector (DESIGN 4), each a few lines over `SparseSelector`.

Only `GateSelector` (and `AllSelector`, in exact.py) are exact; the others lose what they do not name, and run only when
the user asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..backends.base import FFNPass, FFNSpec, Slab
from ..residency.residency import Residency
from .exact import AllSelector as AllSelector
from .lookahead import LookAhead
from .shared import Shared
from .sparse import SparseSelector, squares, top

Predict = Callable[[Any], np.ndarray]  # x (..., d) -> (count,) fp32; a neuron is predicted to fire where it is > 0


class GateSelector(SparseSelector):
    """ReLU models: all gate rows (up rows where there is no gate) are resident and say which neurons fire; only
    the other parts of those that do are read. Exact: a neuron that does not fire adds nothing."""

    exact = True

    def __init__(
        self, layer: int, spec: FFNSpec, shared: Shared, residency: Residency, look_ahead: LookAhead | None = None
    ):
        super().__init__(layer, spec, shared, residency, look_ahead, fixed=spec.first)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        assert self.fixed is not None
        return work.gate(self.fixed)


class ThresholdSelector(SparseSelector):
    """Any GLU model: the gate (or up) rows are resident; a neuron for which they give no more than a calibrated cut-off
    is dropped (CATS, arXiv 2404.08763)."""

    def __init__(self, layer: int, spec: FFNSpec, shared: Shared, residency: Residency, lead: str, cutoff: float):
        cut = replace(spec, lead=lead, cutoff=max(cutoff, spec.cutoff))
        super().__init__(layer, spec, shared, residency, fixed=lead, decode_spec=cut)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        assert self.fixed is not None
        return work.gate(self.fixed)

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        """Unknown: the cut-off is not applied to a prompt."""
        return np.zeros(h.shape, bool)


class PredictorSelector(SparseSelector):
    """ReLU models: a low-rank predictor names the neurons that will fire ("LLM in a flash", section 3.1); whole
    bundles are read. One that fires unnamed is lost; one that is named and does not fire adds nothing."""

    def __init__(
        self,
        layer: int,
        spec: FFNSpec,
        shared: Shared,
        residency: Residency,
        predict: Predict,
        look_ahead: LookAhead | None = None,
    ):
        super().__init__(layer, spec, shared, residency, look_ahead)
        self.predict = predict

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        predicted = np.flatnonzero(self.predict(x) > 0).astype(np.int32)
        return predicted if self.shared.override is None else self.shared.override(self.layer)


class StaticSelector(SparseSelector):
    """The same neurons for every prompt: those with the most energy over the calibration. What `prompt` must beat."""

    def __init__(self, layer: int, spec: FFNSpec, shared: Shared, residency: Residency, ids: np.ndarray):
        super().__init__(layer, spec, shared, residency)
        self.ids = ids.astype(np.int32)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        return self.ids

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        used = np.zeros(h.shape, bool)
        used[:, self.ids[(self.ids >= first) & (self.ids < first + h.shape[1])] - first] = True
        return used


class PromptSelector(SparseSelector):
    """Any model: the neurons that had the most energy over the prompt serve the whole reply (GRIFFIN, arXiv
    2404.01365), so that nothing is read once they are resident.

    Energy: the mean over tokens of (h |down|)^2. GRIFFIN divides by each token's total and leaves |down| out; measured
    on small models that loses several times more. prior (count,): calibrated energies, which count as
    PRIOR_TOKENS tokens; None without a calibration. reselect: every so many decoded tokens one is computed whole, which
    counts as RESELECT_TOKENS.
    """

    PRIOR_TOKENS = 256
    RESELECT_TOKENS = 32

    def __init__(
        self,
        layer: int,
        spec: FFNSpec,
        shared: Shared,
        residency: Residency,
        fraction: float,
        prior: np.ndarray | None = None,
        reselect: int | None = None,
    ):
        super().__init__(layer, spec, shared, residency)
        self.fraction, self.reselect = fraction, reselect
        self.prior = np.zeros(self.count) if prior is None else self.PRIOR_TOKENS * prior.astype(np.float64)
        self.down_squares = np.full(self.count, -1.0)
        self.energy, self.tokens = np.zeros(self.count), 0
        self.reply, self.decoded = shared.reply, 0
        self.ids: np.ndarray | None = None

    def is_decode(self, x: Any) -> bool:
        if not super().is_decode(x) or self.reply != self.shared.reply or not self.tokens:
            return False
        self.decoded += 1
        return self.reselect is None or self.decoded % self.reselect != 0

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        if self.ids is None:
            self.ids = top(self.energy + self.prior, self.fraction).astype(np.int32)
        return self.ids

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        """Known only when the whole prompt has been seen."""
        return np.zeros(h.shape, bool)

    def prompt_block(self, first: int, h: np.ndarray, staging: Slab) -> None:
        ids = slice(first, first + h.shape[1])
        if first == 0:
            self._begin(len(h))
        if self.down_squares[first] < 0:
            self.down_squares[ids] = squares(staging, self.spec.layout, "down", h.shape[1])
        weight = self.RESELECT_TOKENS if self.decoded else 1
        self.energy[ids] += weight * np.square(h).sum(axis=0, dtype=np.float64) * self.down_squares[ids]

    def _begin(self, tokens: int) -> None:
        """A chunk of a prompt, or a token that is computed whole to select anew, is under way."""
        another = self.reply != self.shared.reply or (self.decoded and tokens > 1)
        if another:
            self.energy[:] = 0
            self.reply, self.decoded, self.tokens = self.shared.reply, 0, 0
        self.tokens += tokens
        self.ids = None
