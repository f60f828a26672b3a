"""The selector `gate`: computes which neurons of a ReLU model fire, and reads only those. Exact.

All gate rows (up rows where the FFN has no gate) are resident, so this replaces the predictor of "LLM in a flash",
section 3.1, by the real thing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass

from .sparse import LayerSetup, SparseSelector


class GateSelector(SparseSelector):
    """ReLU models: the resident gate rows say which neurons fire; only the other parts of those are read. Exact, as a
    neuron that does not fire adds nothing."""

    exact = True

    def __init__(self, setup: LayerSetup):
        super().__init__(setup, fixed=setup.spec.first)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        assert self.fixed is not None
        return work.gate(self.fixed)
