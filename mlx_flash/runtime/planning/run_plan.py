"""The plan of a run: everything that is decided before anything is loaded.

What all plans have in common. Neuron bundles and mixtures of experts add their own in neuron_plan.py and
expert_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_flash.config import FlashConfig, Selection
from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.selection.factory import EXACT
from mlx_flash.engine.storage.calibration import Calibration
from mlx_flash.runtime.machine import Machine
from mlx_flash.runtime.model_code import ModelCode

from .cost_model import Prediction
from .selective_persistence import Costs, MemoryPlan
from .setup import ModelFacts, ModelFolder, Setup
from .tuning import Tuning


@dataclass(frozen=True)
class RunPlan:
    """How a model will run. Nothing has been loaded yet.

    tuning: how bundles are read; costs: what the model needs in memory
    """

    setup: Setup
    selection: Selection
    tuning: Tuning
    costs: Costs
    budget_bytes: int

    @property
    def name(self) -> str:
        """What the user calls the model."""
        return self.setup.name

    @property
    def checkpoint(self) -> ModelFolder:
        return self.setup.checkpoint

    @property
    def spec(self) -> ModelFacts:
        return self.setup.spec

    @property
    def config(self) -> FlashConfig:
        return self.setup.config

    @property
    def backend_name(self) -> str:
        return self.setup.backend_name

    @property
    def backend(self) -> Backend:
        return self.setup.backend

    @property
    def models(self) -> ModelCode:
        """The backend's model code."""
        return self.setup.models

    @property
    def dtype(self) -> str:
        return self.setup.dtype

    @property
    def context(self) -> int:
        """In tokens."""
        return self.setup.context_of.tokens

    @property
    def context_text(self) -> str:
        """The context, and why it is not the model's."""
        return str(self.setup.context_of)

    @property
    def selector(self) -> str:
        """The selector as the user would write it."""
        return str(self.selection)

    @property
    def exact(self) -> bool:
        """Whether the output is that of the whole model."""
        return self.selection.name in EXACT

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` learned of the model; None where it was not calibrated."""
        return None

    @property
    def measured_loss(self) -> dict[str, Any] | None:
        """What `calibrate` measured this selector to lose: nats per token of it and of `all`, tokens scored."""
        return None

    @property
    def machine(self) -> Machine | None:
        """What was measured of this machine; None where nothing was, or where it makes no difference."""
        return None

    @property
    def notices(self) -> list[str]:
        """What to tell the user before the model is loaded."""
        reason = self.setup.context_of.reason
        return [] if reason is None else [f"context {self.context_text}"]

    @property
    def machine_problem(self) -> str | None:
        """Why what was measured cannot be used."""
        return None

    @cached_property
    def memory(self) -> MemoryPlan:
        """How the budget is split; raises BudgetError when it is too small."""
        return self.costs.split(self.budget_bytes)

    @property
    def prediction(self) -> Prediction | None:
        """How long a token should take; None where that is not known."""
        return None

    @property
    def all_resident(self) -> bool:
        """Whether nothing is ever read once everything has been."""
        return self.memory.capacities == self.costs.counts

    @property
    def look_ahead(self) -> str:
        """Whether the next layer's reads begin early: "auto" (times itself), "on" or "off"."""
        raise NotImplementedError

    @property
    def ffn_resident_bytes(self) -> int:
        """Memory that FFN weights may take."""
        raise NotImplementedError

    @property
    def worst_bytes_per_token(self) -> int:
        """Most bytes that one token reads."""
        raise NotImplementedError
