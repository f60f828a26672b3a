"""Which selector runs: the one that was asked for, or the best exact one that the budget holds."""

from __future__ import annotations

from mlx_flash.config import Selection, parse_selection
from mlx_flash.engine.selection.factory import check_selection
from mlx_flash.errors import BudgetError

from .neuron_costs import costs_of
from .neuron_setup import NeuronSetup
from .selective_persistence import NeuronCosts, budget_for
from .tuning import Tuning

# Bytes of a layer's bundles. On MLX asking a layer which neurons fired takes some 0.15 ms, in which more than this is
# computed; larger layers save more by leaving out what did not fire.
SMALL_LAYER = 8 << 20


def choose_selection(setup: NeuronSetup, tuning: Tuning) -> Selection:
    """The selector that runs.

    `auto` is exact: `gate` for ReLU models whose gate rows fit the budget, else `all`; on a lazy backend also `all` for
    small layers that stay in memory. `prompt:auto` keeps the share of neurons that has slots. Raises UsageError,
    BudgetError.
    """
    config, spec = setup.config, setup.spec
    selection = parse_selection(config.select)
    layouts = setup.checkpoint.layouts
    neurons = max(max(2, layout.neurons) if layout.grouped else 1 for layout in layouts)

    def costs(each: Selection) -> NeuronCosts:
        return costs_of(setup, each, tuning)

    if selection.name == "auto":
        whole = costs(Selection("all"))
        small = setup.backend.lazy and config.slots == "auto" and max(whole.counts) * whole.slot < SMALL_LAYER
        if small and budget_for(config, whole) >= whole.largest:
            return Selection("all")
        if not spec.has_zeros or neurons > 1:
            return Selection("all")
        gate = costs(Selection("gate"))
        return Selection("gate" if budget_for(config, gate) >= gate.smallest else "all")
    check_selection(selection, spec.activation, spec.gated, setup.calibration, neurons)
    return _what_fits(setup, costs(selection)) if selection == Selection("prompt") else selection


def _what_fits(setup: NeuronSetup, costs: NeuronCosts) -> Selection:
    """`prompt:F` with as many neurons as have slots. Raises BudgetError where that is less than 1 %."""
    budget = budget_for(setup.config, costs)
    capacities = costs.split(budget).capacities
    fraction = int(100 * min(c / n for c, n in zip(capacities, costs.counts, strict=True))) / 100
    if not fraction:
        raise BudgetError(
            f"--select prompt:auto: a budget of {budget} bytes has slots for less than 1 % of the neurons; "
            "raise --memory, or give a fraction (what has no slot is read for every token)"
        )
    return Selection("prompt", fraction)
