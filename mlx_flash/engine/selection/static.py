"""The selector `static`: the same neurons for every prompt, those with the most energy over the calibration text.

A baseline: `prompt`, which chooses per prompt, must lose less. Loses quality; `calibrate` measures how much.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass

from .sparse import LayerSetup, SparseSelector, top


class StaticSelector(SparseSelector):
    """The top `fraction` of the neurons by calibrated `energy` (count,)."""

    def __init__(self, setup: LayerSetup, fraction: float, energy: np.ndarray):
        super().__init__(setup)
        self.ids = top(energy, fraction).astype(np.int32)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        return self.ids

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        used = np.zeros(h.shape, bool)
        used[:, self.ids[(self.ids >= first) & (self.ids < first + h.shape[1])] - first] = True
        return used
