"""The selector `threshold`: drops the neurons of a SiLU or GELU model whose gate is near zero (CATS, arXiv 2404.08763).

The cut-off is calibrated per layer for a wanted sparsity. Loses quality; `calibrate` measures how much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass

from .sparse import LayerSetup, SparseSelector


class ThresholdSelector(SparseSelector):
    """Gated FFNs: the rows of `lead` ("gate" or "up") are resident; a neuron is dropped where they give at most
    `cutoff`, in magnitude."""

    def __init__(self, setup: LayerSetup, lead: str, cutoff: float):
        cut = replace(setup.spec, lead=lead, cutoff=max(cutoff, setup.spec.cutoff))
        super().__init__(setup, fixed=lead, decode_spec=cut)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        assert self.fixed is not None
        return work.gate(self.fixed)

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        """Unknown: the cut-off is not applied to a prompt."""
        return np.zeros(h.shape, bool)
