"""Makes the selectors of a model's layers from a selector's name, and refuses those that the model cannot run.

Says what each selector needs resident and calibrated. Knows no budgets, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_flash.config import Selection
from mlx_flash.engine.backends.base import FFNSpec, Predictor
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.window import Policy
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.calibration import Calibration
from mlx_flash.errors import FormatError, UsageError

from .all import AllSelector
from .context import Selector, SharedContext
from .gate import GateSelector
from .look_ahead import LookAhead
from .predictor import PredictorSelector
from .prompt import PromptSelector
from .sparse import LayerSetup, slot_parts
from .static import StaticSelector
from .threshold import ThresholdSelector

EXACT = ("all", "gate")


def check_selection(
    selection: Selection, activation: str, gated: bool, calibration: Calibration | None, neurons: int = 1
) -> None:
    """Raise UsageError, with what to do instead, for a selector that this model cannot run. neurons: per bundle."""
    name, sparse = selection.name, activation in ("relu", "fatrelu")
    if name == "router":
        raise UsageError("--select router needs a mixture of experts; this model has none: use auto")
    if neurons > 1 and name not in ("all", "prompt"):
        raise UsageError(
            f"--select {name} needs single neurons; this checkpoint was quantised before, and groups of {neurons} "
            "share scales: use all or prompt:F, or convert with --requantize -q (which loses a little)"
        )
    if name in ("gate", "predictor") and not sparse:
        raise UsageError(
            f"--select {name} needs a ReLU model; this one has {activation!r}: use all, prompt:F or threshold:S, or "
            "make it sparse with `mlx_flash relufy`"
        )
    if name == "threshold" and not gated:
        raise UsageError("--select threshold needs a gated FFN; this model has a plain one: use gate or prompt:F")
    if name in ("predictor", "threshold", "static") and calibration is None:
        raise UsageError(f"--select {name} needs a calibration; make one: mlx_flash calibrate --model M --data TEXT")
    if calibration is None:
        return
    if name == "predictor" and not calibration.has_predictors:
        raise UsageError("--select predictor: this calibration has none; make one: mlx_flash calibrate --model M ...")
    if name == "threshold":
        known = calibration.summary.get("sparsities")
        if not known:
            raise UsageError("--select threshold: this calibration has no cut-offs; run mlx_flash calibrate again")
        if selection.fraction is not None and not known[0] <= selection.fraction <= known[-1]:
            raise UsageError(f"--select {selection}: cut-offs are calibrated from {known[0]:g} to {known[-1]:g}")


def lead_of(selection: Selection, layout: Layout, calibration: Calibration | None) -> str | None:
    """The part that a selector needs resident for every bundle, or None."""
    if selection.name == "gate":
        return layout.matrices[0]
    if selection.name == "threshold":
        assert calibration is not None
        return str(calibration.summary["lead"])
    return None


def resident_parts(selection: Selection, layout: Layout, calibration: Calibration | None) -> list[str]:
    """The same as stored parts: a quantised one has scales and biases."""
    lead = lead_of(selection, layout, calibration)
    return layout.parts_of(lead) if lead else []


def parts_in_slots(selection: Selection, layout: Layout, calibration: Calibration | None) -> list[str]:
    """The parts of a bundle that its slot holds."""
    return slot_parts(layout, lead_of(selection, layout, calibration))


@dataclass
class SelectorFactory:
    """The selectors of one model, all on one `SharedContext`. look_ahead: "auto", "on" or "off"; capacities: slots per
    layer; reselect: see `PromptSelector`."""

    selection: Selection
    shared: SharedContext
    layouts: Sequence[Layout]
    capacities: Sequence[int]
    calibration: Calibration | None
    reselect: int | None = None
    look_ahead: str = "off"

    def __post_init__(self) -> None:
        chosen = {} if self.calibration is None else self.calibration.summary.get("policy", {})
        try:
            self._policy = Policy.of(chosen)
        except ValueError as error:
            raise FormatError(f"the calibration's {error}; make it anew: mlx_flash calibrate") from None
        self._look_ahead: LookAhead | None = None
        if self.look_ahead != "off":
            assert self.calibration is not None
            predictors = [self._predictor(layer) for layer in range(len(self.layouts))]
            margins = [layer.figures["look_ahead"]["margin"] for layer in self.calibration.layers]
            self._look_ahead = LookAhead(self.shared, predictors, margins, self.look_ahead)

    def make(self, layer: int, spec: FFNSpec) -> Selector:
        """The selector of one layer."""
        name, fraction = self.selection.name, self.selection.fraction
        if name == "all":
            return AllSelector(layer, spec, self.shared, self.capacities, self.layouts)
        calibrated = self.calibration.layers[layer].rate if self.calibration and name in ("gate", "predictor") else None
        compiled = self.shared.backend.compiles
        residency = Residency(spec.layout.count, self.capacities[layer], self._policy, calibrated, compiled)
        setup = LayerSetup(layer, spec, self.shared, residency, self._look_ahead)
        if name == "gate":
            return GateSelector(setup)
        if name == "prompt":
            assert fraction is not None
            prior = self.calibration.layers[layer].energy if self.calibration else None
            return PromptSelector(setup, fraction, prior, self.reselect)
        assert self.calibration is not None
        if name == "predictor":
            return PredictorSelector(setup, self._predictor(layer))
        assert fraction is not None
        if name == "static":
            return StaticSelector(setup, fraction, self.calibration.layers[layer].energy)
        lead = str(self.calibration.summary["lead"])
        return ThresholdSelector(setup, lead, self._cutoff(layer, lead, fraction))

    def _predictor(self, layer: int) -> Predictor:
        assert self.calibration is not None
        found = self.calibration.layers[layer]
        assert found.a is not None and found.b is not None and found.bias is not None and found.step is not None
        return self.shared.backend.predictor(found.a, found.b, float(found.step[0]), found.bias)

    def _cutoff(self, layer: int, lead: str, sparsity: float) -> float:
        """The cut-off for a sparsity, interpolated linearly between the calibrated ones."""
        assert self.calibration is not None
        cutoffs = self.calibration.layers[layer].figures["cutoffs"][lead]
        return float(np.interp(sparsity, self.calibration.summary["sparsities"], cutoffs))
