"""The selector `predictor`: a small network predicts which neurons will fire ("LLM in a flash", section 3.1).

Whole bundles of the predicted neurons are read. Loses the neurons that fire though they were not predicted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass, Predictor

from .sparse import LayerSetup, SparseSelector


class PredictorSelector(SparseSelector):
    """ReLU models. A neuron is predicted to fire where `predict` gives a logit above 0; one that is predicted and does
    not fire adds nothing."""

    def __init__(self, setup: LayerSetup, predict: Predictor):
        super().__init__(setup)
        self.predict = predict

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        return np.flatnonzero(self.predict(x)() > 0).astype(np.int32)
