"""The plan of a run of a flash checkpoint: which selector, how bundles are read, and how the budget is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlx_flash.config import Selection, parse_selection
from mlx_flash.engine.storage.calibration import Calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import BudgetError
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.runtime.machine import Machine

from .cost_model import Prediction, predict
from .demand import Demand, token_demand
from .neuron_costs import costs_of
from .neuron_setup import NeuronSetup
from .run_plan import RunPlan
from .selective_persistence import NeuronCosts, budget_for
from .selector_choice import choose_selection
from .tuning import Tuning, default_tuning, given_settings
from .tuning_choice import choose_tuning


@dataclass(frozen=True)
class NeuronPlan(RunPlan):
    """How a flash checkpoint will run."""

    setup: NeuronSetup
    costs: NeuronCosts

    @property
    def checkpoint(self) -> Checkpoint:
        return self.setup.checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.setup.spec

    @property
    def calibration(self) -> Calibration | None:
        return self.setup.calibration

    @property
    def measured_loss(self) -> dict[str, Any] | None:
        losses = self.calibration.summary.get("losses", {}) if self.calibration else {}
        found: dict[str, Any] | None = losses.get(self.selector)
        return found

    @property
    def machine(self) -> Machine | None:
        return self.setup.measured.machine

    @property
    def machine_problem(self) -> str | None:
        return self.setup.measured.problem

    @property
    def notices(self) -> list[str]:
        problem = self.machine_problem
        unused = [] if problem is None else [f"reads as where nothing was measured: {problem}"]
        return [*super().notices, *unused]

    @property
    def look_ahead(self) -> str:
        """See `RunPlan`. "auto" is for `predictor`, whose predictors are in memory anyway; "on" for `gate` too."""
        mode, name = self.tuning.look_ahead, self.selection.name
        wanted = name == "predictor" or (name == "gate" and mode == "on")
        known = self.calibration is not None and self.calibration.has_predictors
        return mode if wanted and known and not self.all_resident else "off"

    @property
    def demand(self) -> Demand:
        """What a decoded token asks for, as far as it is known."""
        return token_demand(self.setup, self.selection, self.memory.capacities)

    @cached_property
    def prediction(self) -> Prediction | None:
        """See `RunPlan`. None where the machine was not measured, or the backend's kernels were not."""
        if self.machine is None or self.backend_name != "numpy":
            return None
        tuning = replace(self.tuning, look_ahead=self.look_ahead)
        return predict(self.machine, self.demand, tuning, self.memory.staging_blocks)

    @property
    def ffn_resident_bytes(self) -> int:
        """Memory that FFN weights may take: slots, and the rows that are resident for all bundles."""
        return sum(size for name, size in self.memory.parts.items() if name == "slots" or name.endswith(" rows"))

    @property
    def worst_bytes_per_token(self) -> int:
        """Most bytes that one token reads: selectors other than `all` may name every bundle of a layer."""
        pairs = list(zip(self.checkpoint.layouts, self.memory.capacities, strict=True))
        if self.selection.name != "all":
            return sum(layout.count * layout.stride for layout, capacity in pairs if capacity < layout.count)
        return sum((layout.count - capacity) * layout.stride for layout, capacity in pairs)


def plan_neurons(setup: NeuronSetup) -> NeuronPlan:
    """The selector, the settings of the reads and the costs. Whether the budget is enough shows at `.memory`. Raises
    UsageError for a selector that the model cannot have."""
    tuning = default_tuning(given_settings(setup.config))
    plan = _with(setup, choose_selection(setup, tuning), tuning)
    if setup.measured.machine is None:
        return plan
    tuning = _tuned(plan, setup.measured.machine)
    if parse_selection(setup.config.select) == Selection("prompt"):  # what fits beside the staging that was chosen
        return _with(setup, choose_selection(setup, tuning), tuning)
    return _with(setup, plan.selection, tuning)


def _with(setup: NeuronSetup, selection: Selection, tuning: Tuning) -> NeuronPlan:
    costs = costs_of(setup, selection, tuning)
    return NeuronPlan(setup, selection, tuning, costs, budget_for(setup.config, costs))


def _tuned(plan: NeuronPlan, machine: Machine) -> Tuning:
    """The settings that suit the machine; with a budget that is too small, as if there were no slots."""
    try:
        capacities: Sequence[int] = plan.memory.capacities
    except BudgetError:
        capacities = [0] * len(plan.costs.counts)
    demand = token_demand(plan.setup, plan.selection, capacities)
    return choose_tuning(machine, demand, given_settings(plan.config))
