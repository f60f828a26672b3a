"""What a model of neuron bundles needs in memory with a selector, part by part. Reads headers only."""

from __future__ import annotations

import numpy as np

from mlx_flash.config import Selection
from mlx_flash.engine.backends.base import BLOCK, Widths, block_of
from mlx_flash.engine.selection.factory import parts_in_slots, resident_parts
from mlx_flash.engine.storage.bundle import ITEM_BYTES, bundle_kinds
from mlx_flash.models.specs.model_spec import ModelSpec

from .neuron_setup import NeuronSetup
from .selective_persistence import NeuronCosts
from .tuning import Tuning, given_settings


def costs_of(setup: NeuronSetup, selection: Selection, tuning: Tuning) -> NeuronCosts:
    """What this model needs with this selector, in bytes."""
    backend, config, layouts = setup.backend, setup.config, setup.checkpoint.layouts
    _, kinds = bundle_kinds(layouts)
    slots = _slot_bytes(setup, selection, 8 * BLOCK)
    fixed = _fixed(setup, selection, tuning)
    fixed["page rounding"] = sum(_slot_bytes(setup, selection, 1)) - sum(slots)
    given = "staging_blocks" in given_settings(config)
    # With `all` a prompt's blocks come from memory too, so that nothing is left to stream; the others copy them.
    unused = selection.name == "all" and not given
    return NeuronCosts(
        model=setup.name,
        fixed=fixed,
        staging_block=sum(
            backend.slab_bytes(each, block_of(each), [part.name for part in each.parts]) for each in kinds
        ),
        slot=max(slots),
        counts=tuple(layout.count for layout in layouts),
        unit=max(map(block_of, layouts)) if selection.name == "all" else 1,
        curves=_curves(setup, selection),
        staging_blocks=tuning.staging_blocks,
        least_staging=tuning.staging_blocks if given else 1,
        resident_staging=0 if unused else None,
        share=None if config.slots == "auto" else float(config.slots),
        layer_slots=tuple(slots) if len(set(slots)) > 1 else (),
    )


def _slot_bytes(setup: NeuronSetup, selection: Selection, rows: int) -> list[int]:
    """Bytes of a slot in each layer, where slabs of `rows` slots are allocated."""
    return [
        setup.backend.slab_bytes(layout, rows, parts_in_slots(selection, layout, setup.calibration)) // rows
        for layout in setup.checkpoint.layouts
    ]


def _fixed(setup: NeuronSetup, selection: Selection, tuning: Tuning) -> dict[str, int]:
    """What does not depend on the budget, by name."""
    backend, spec, config, context = setup.backend, setup.spec, setup.config, setup.context_of.tokens
    layouts, chunk, calibration = setup.checkpoint.layouts, config.prefill_chunk, setup.calibration
    largest = max(layouts, key=lambda layout: layout.count * layout.bundle_bytes)
    resident = resident_parts(selection, largest, calibration)
    item = ITEM_BYTES[layouts[0].dtype]
    fixed = {
        "dense part": sum(info.nbytes for _, info in setup.checkpoint.resident_tensors().values()),
        "KV cache": spec.kv_items_per_token * item * context * config.sequences,
        "prefill scratch": max(
            backend.prefill_scratch_bytes(layout, spec_widths(spec), chunk, context) for layout in layouts
        ),
    }
    if resident:
        fixed[f"{resident[0]} rows"] = sum(backend.slab_bytes(layout, layout.count, resident) for layout in layouts)
    if selection.name != "all":
        neurons = min(BLOCK, max(layout.count * layout.neurons for layout in layouts))
        fixed["prefill scratch"] += 4 * min(chunk, context) * neurons  # scalars of a block
    predicts = selection.name == "predictor" or (selection.name == "gate" and tuning.look_ahead == "on")
    if predicts and calibration is not None and calibration.has_predictors:
        fixed["predictors"] = sum(layer.predictor_bytes for layer in calibration.layers)
    return fixed


def _curves(setup: NeuronSetup, selection: Selection) -> tuple[np.ndarray, ...]:
    """Calibrated misses over slots per layer, of selectors that ask for what fires."""
    if setup.calibration is None or not setup.spec.has_zeros or selection.name not in ("gate", "predictor"):
        return ()
    predicted = selection.name == "predictor"
    return tuple(layer.predicted_curve if predicted else layer.curve for layer in setup.calibration.layers)


def spec_widths(spec: ModelSpec) -> Widths:
    return Widths(
        spec.dim,
        max(layer.intermediate for layer in spec.layers),
        max((layer.heads + 2 * layer.kv_heads) * spec.head_dim for layer in spec.layers),
        spec.head_dim,
        max(layer.heads for layer in spec.layers),
    )
