"""The work of one token, layer by layer: bytes of weights to compute with, bundles to read. Arithmetic only.

Derived from a model's shapes, its calibration and its slots. How long the work takes is in cost_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_flash.config import Selection
from mlx_flash.engine.backends.base import BLOCK, block_of
from mlx_flash.engine.residency.miss_curves import lower_hull
from mlx_flash.engine.selection.factory import lead_of
from mlx_flash.engine.storage.bundle import ITEM_BYTES
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.quantisation import resident_codings, usual_coding

from .neuron_setup import NeuronSetup

WORST = "assuming that every neuron is asked for, as nothing is calibrated"
ALIKE = "assuming that all neurons are asked for equally often"


@dataclass(frozen=True)
class LayerDemand:
    """The work of one layer for one decoded token. Numbers of bundles are means over tokens.

    dense_bytes: of attention's matrices; lead_bytes: of the part that is resident and computed for every bundle
    asked: bundles that the selector names; fired: those of them that are not zero; missed: those without a slot
    recall, precision: of guesses made one layer earlier; 0 where nothing can be guessed
    """

    bundles: int
    capacity: int
    dense_bytes: int
    lead_bytes: int
    predictor_bytes: int
    asked: float
    fired: float
    missed: float
    recall: float = 0.0
    precision: float = 0.0

    @property
    def resident(self) -> bool:
        return self.capacity >= self.bundles


@dataclass(frozen=True)
class Demand:
    """The work of a whole token.

    stride: bytes of a bundle where whole blocks stream; read_bytes: bytes that are read of a missing bundle
    first_part_bytes: computed of every bundle asked for; other_parts_bytes: computed also of one that fires
    head_bytes: of the output layer; kv_bytes: of the keys and values of one token of context
    chunk: tokens of a prompt that pass the layers at once; block: bundles that stream together
    assumption: what was assumed where the model's statistics are not known; "" where all are
    bits, dense_bits: of the codes of bundles and of resident matrices; None where they are not quantised
    """

    selector: str
    dtype: str
    layers: tuple[LayerDemand, ...]
    stride: int
    read_bytes: int
    first_part_bytes: int
    other_parts_bytes: int
    head_bytes: int
    kv_bytes: int
    chunk: int
    assumption: str = ""
    block: int = BLOCK
    bits: int | None = None
    dense_bits: int | None = None

    @property
    def item_bytes(self) -> float:
        """Bytes of a weight in a bundle, without scales and biases."""
        return ITEM_BYTES[self.dtype] if self.bits is None else self.bits / 8

    @property
    def dense_item_bytes(self) -> float:
        """Bytes of a resident weight."""
        return ITEM_BYTES[self.dtype] if self.dense_bits is None else self.dense_bits / 8

    @property
    def all_resident(self) -> bool:
        return all(layer.resident for layer in self.layers)

    def observed(self, asked: Sequence[float], missed: Sequence[float], fired: Sequence[float] | None = None) -> Demand:
        """The same with means per layer and token that were counted in a run, instead of those of the calibration."""
        fired = asked if fired is None else fired
        found = zip(self.layers, asked, fired, missed, strict=True)
        layers = tuple(replace(layer, asked=a, fired=f, missed=m) for layer, a, f, m in found)
        return replace(self, layers=layers, assumption="")


def token_demand(setup: NeuronSetup, selection: Selection, capacities: Sequence[int]) -> Demand:
    """What a decoded token of this model asks for with `selection`, with so many slots per layer."""
    spec, calibration, layouts = setup.spec, setup.calibration, setup.checkpoint.layouts
    dense = usual_coding(resident_codings(setup.checkpoint))
    head, item, coded = layouts[0].matrices[0], ITEM_BYTES[setup.dtype], layouts[0].quantisation
    width = item if dense is None else dense.bits / 8 + 2 * item / dense.group_size  # bytes of a resident weight
    lead = lead_of(selection, layouts[0], calibration)
    lead_bytes = layouts[0].matrix_bytes(lead) if lead else 0
    used = [_use(spec, selection, calibration, i, layouts[i].count, capacities[i]) for i in range(len(layouts))]
    layers = []
    for i, (layout, shape) in enumerate(zip(layouts, spec.layers, strict=True)):
        known = calibration.layers[i] if calibration else None
        ahead = known.figures.get("look_ahead", {}) if known and known.a is not None else {}
        layers.append(
            LayerDemand(
                bundles=layout.count,
                capacity=capacities[i],
                dense_bytes=int(2 * (shape.heads + shape.kv_heads) * spec.head_dim * spec.dim * width),
                lead_bytes=lead_bytes * layout.count,
                predictor_bytes=known.predictor_bytes if known else 0,
                asked=used[i][0],
                fired=used[i][1],
                missed=used[i][2],
                recall=_share(ahead.get("recall")),
                precision=_share(ahead.get("precision")),
            )
        )
    others = layouts[0].bundle_bytes - lead_bytes
    first = 0 if lead else layouts[0].matrix_bytes(head)
    return Demand(
        selector=selection.name,
        dtype=setup.dtype,
        layers=tuple(layers),
        stride=layouts[0].stride,
        read_bytes=layouts[0].stride - (lead_bytes if lead == head else 0),
        first_part_bytes=first,
        other_parts_bytes=others - first,
        head_bytes=int(spec.vocab * spec.dim * width),
        kv_bytes=spec.kv_items_per_token * item,
        chunk=min(setup.config.prefill_chunk, setup.context_of.tokens),
        assumption=_assumption(selection, calibration),
        block=block_of(layouts[0]),
        bits=None if coded is None else coded.bits,
        dense_bits=None if dense is None else dense.bits,
    )


def _share(value: Any) -> float:
    """A share from a calibration file, which is not checked for being one."""
    return min(1.0, max(0.0, float(value))) if type(value) in (int, float) else 0.0


def _curve(selection: Selection, known: LayerCalibration | None) -> np.ndarray | None:
    """Calibrated misses over slots (K, 2) of a selector that asks for what fires, or None."""
    if known is None or selection.name not in ("gate", "predictor"):
        return None
    curve = known.curve if selection.name == "gate" else known.predicted_curve
    return curve if len(curve) else None


def _use(
    spec: ModelSpec, selection: Selection, calibration: Calibration | None, layer: int, count: int, capacity: int
) -> tuple[float, float, float]:
    """Bundles per token: asked for, firing, missing."""
    known = calibration.layers[layer] if calibration else None
    fires = float(known.rate.sum()) if known and spec.has_zeros else float(count)
    curve = _curve(selection, known)
    if curve is not None:
        slots, misses = np.array(lower_hull(curve, count)).T
        asked = min(float(misses[0]), float(count))
        return asked, min(asked, fires), min(asked, float(np.interp(capacity, slots, misses)))
    fraction = 1.0 if selection.fraction is None else selection.fraction
    if selection.name == "threshold":
        asked = (1 - fraction) * count
        return asked, asked, asked * (1 - capacity / count)
    asked = float(max(1, round(fraction * count)))
    return asked, min(asked, fires), max(0.0, asked - capacity)


def _assumption(selection: Selection, calibration: Calibration | None) -> str:
    if selection.name == "threshold":
        return ALIKE
    if selection.name not in ("gate", "predictor"):
        return ""
    known = calibration is not None and all(_curve(selection, layer) is not None for layer in calibration.layers)
    return "" if known else WORST
