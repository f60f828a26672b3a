"""What a run of neuron bundles needs in memory, part by part, and which selector fits. Reads headers only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_flash.config import FlashConfig, Selection, parse_selection
from mlx_flash.engine.backends.base import BLOCK, Backend, Widths, block_of
from mlx_flash.engine.selection.factory import check_selection, parts_in_slots, resident_parts
from mlx_flash.engine.storage.bundle import ITEM_BYTES, Layout, bundle_kinds
from mlx_flash.engine.storage.calibration import Calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import BudgetError
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.runtime.run import budget_for

from .cost_model import Tuning, given_settings
from .selective_persistence import Costs, split_budget

# Bytes of a layer's bundles. On MLX asking a layer which neurons fired takes some 0.15 ms, in which more than this is
# computed; larger layers save more by leaving out what did not fire.
SMALL_LAYER = 8 << 20


def run_costs(
    name: str,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    backend: Backend,
    selection: Selection,
    calibration: Calibration | None,
    config: FlashConfig,
    context: int,
    tuning: Tuning,
) -> Costs:
    """What this model needs with this selector, part by part, in bytes."""
    layouts, chunk = checkpoint.layouts, config.prefill_chunk
    largest = max(layouts, key=lambda layout: layout.count * layout.bundle_bytes)
    _, kinds = bundle_kinds(layouts)
    resident = resident_parts(selection, largest, calibration)

    def slot_names(layout: Layout) -> list[str]:
        return parts_in_slots(selection, layout, calibration)

    item = ITEM_BYTES[layouts[0].dtype]
    block = sum(backend.slab_bytes(each, block_of(each), [part.name for part in each.parts]) for each in kinds)
    fixed = {
        "dense part": sum(info.nbytes for _, info in checkpoint.resident_tensors().values()),
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
    slots = [backend.slab_bytes(each, 8 * BLOCK, slot_names(each)) // (8 * BLOCK) for each in layouts]
    pages = [backend.slab_bytes(each, 1, slot_names(each)) for each in layouts]
    fixed["page rounding"] = sum(pages) - sum(slots)
    counts = tuple(layout.count for layout in layouts)
    curves: tuple[np.ndarray, ...] = ()
    if calibration is not None and spec.has_zeros and selection.name in ("gate", "predictor"):
        predicted = selection.name == "predictor"
        curves = tuple(layer.predicted_curve if predicted else layer.curve for layer in calibration.layers)
    given = "staging_blocks" in given_settings(config)
    # With `all` a prompt's blocks come from memory too, so that nothing is left to stream; the others copy them.
    unused = selection.name == "all" and not given
    return Costs(
        name,
        fixed,
        block,
        max(slots),
        counts,
        unit=max(map(block_of, layouts)) if selection.name == "all" else 1,
        curves=curves,
        staging_blocks=tuning.staging_blocks,
        least_staging=tuning.staging_blocks if given else 1,
        resident_staging=0 if unused else None,
        share=None if config.slots == "auto" else float(config.slots),
        layer_slots=tuple(slots) if len(set(slots)) > 1 else (),
    )


def spec_widths(spec: ModelSpec) -> Widths:
    return Widths(
        spec.dim,
        max(layer.intermediate for layer in spec.layers),
        max((layer.heads + 2 * layer.kv_heads) * spec.head_dim for layer in spec.layers),
        spec.head_dim,
        max(layer.heads for layer in spec.layers),
    )


def choose_selection(
    config: FlashConfig,
    spec: ModelSpec,
    calibration: Calibration | None,
    costs: Callable[[Selection], Costs],
    neurons: int = 1,
    lazy: bool = False,
) -> Selection:
    """The selector that runs. `auto` is exact: `gate` for ReLU models whose gate rows fit the budget, else `all`, as on
    a lazy backend for small layers that stay in memory; `prompt:auto` keeps the share of neurons that fits."""
    selection = parse_selection(config.select)
    if selection.name == "auto":
        whole = costs(Selection("all"))
        small = lazy and config.slots == "auto" and max(whole.counts) * whole.slot < SMALL_LAYER
        if small and budget_for(config, whole) >= whole.largest:
            return Selection("all")
        gate = Selection("gate")
        fits = spec.has_zeros and neurons == 1 and budget_for(config, costs(gate)) >= costs(gate).smallest
        return gate if fits else Selection("all")
    check_selection(selection, spec.activation, spec.gated, calibration, neurons)
    if selection != Selection("prompt"):
        return selection
    found = costs(selection)
    budget = budget_for(config, found)
    capacities = split_budget(found, budget).capacities
    fraction = int(100 * min(c / n for c, n in zip(capacities, found.counts, strict=True))) / 100
    if not fraction:
        raise BudgetError(
            f"--select prompt:auto: a budget of {budget} bytes has slots for less than 1 % of the neurons; "
            "raise --memory, or give a fraction (what has no slot is read for every token)"
        )
    return Selection("prompt", fraction)
