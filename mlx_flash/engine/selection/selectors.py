"""Which bundles a decoding step needs: one class per selector (DESIGN 4), each a few lines over `SparseSelector`.

Only `GateSelector` (and `AllSelector`, in all.py) are exact; the others lose what they do not name, and run only when
the user asks for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass, FFNSpec, Predictor
from mlx_flash.engine.residency.slots import Residency

from .context import SharedContext
from .look_ahead import LookAhead
from .sparse import SparseSelector


class GateSelector(SparseSelector):
    """ReLU models: all gate rows (up rows where there is no gate) are resident and say which neurons fire; only
    the other parts of those that do are read. Exact: a neuron that does not fire adds nothing."""

    exact = True

    def __init__(
        self,
        layer: int,
        spec: FFNSpec,
        shared: SharedContext,
        residency: Residency,
        look_ahead: LookAhead | None = None,
    ):
        super().__init__(layer, spec, shared, residency, look_ahead, fixed=spec.first)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        assert self.fixed is not None
        return work.gate(self.fixed)


class ThresholdSelector(SparseSelector):
    """Any GLU model: the gate (or up) rows are resident; a neuron for which they give no more than a calibrated cut-off
    is dropped (CATS, arXiv 2404.08763)."""

    def __init__(
        self, layer: int, spec: FFNSpec, shared: SharedContext, residency: Residency, lead: str, cutoff: float
    ):
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
    bundles are read. One that fires unnamed is lost; one that is named and does not fire adds nothing.

    predict: a neuron is predicted to fire where its logit is above 0
    """

    def __init__(
        self,
        layer: int,
        spec: FFNSpec,
        shared: SharedContext,
        residency: Residency,
        predict: Predictor,
        look_ahead: LookAhead | None = None,
    ):
        super().__init__(layer, spec, shared, residency, look_ahead)
        self.predict = predict

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        predicted = np.flatnonzero(self.predict(x)() > 0).astype(np.int32)
        return predicted if self.shared.override is None else self.shared.override(self.layer)


class StaticSelector(SparseSelector):
    """The same neurons for every prompt: those with the most energy over the calibration. What `prompt` must beat."""

    def __init__(self, layer: int, spec: FFNSpec, shared: SharedContext, residency: Residency, ids: np.ndarray):
        super().__init__(layer, spec, shared, residency)
        self.ids = ids.astype(np.int32)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        return self.ids

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        used = np.zeros(h.shape, bool)
        used[:, self.ids[(self.ids >= first) & (self.ids < first + h.shape[1])] - first] = True
        return used
