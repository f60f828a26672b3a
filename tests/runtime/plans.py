"""Plans whose memory is split as a test says, not by a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.runtime.loading import load_planned
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.runtime.planning.selective_persistence import MemoryPlan, NeuronCosts


@dataclass(frozen=True)
class GivenSplit(NeuronCosts):
    """Costs that any budget is split into the same slots and staging for."""

    capacities: tuple[int, ...] = ()
    blocks: int = 1

    def split(self, budget_bytes: int) -> MemoryPlan:
        return MemoryPlan(budget_bytes, {}, self.capacities, self.blocks)


def load_split(
    path: Path, capacities: Sequence[int], blocks: int, reader: Callable[..., Any] = open_reader, **fields: Any
) -> Any:
    """The model of a flash checkpoint with these slots per layer and so many staging slabs. fields: FlashConfig's."""
    plan = plan_checkpoint(path, FlashConfig(**fields))
    costs = GivenSplit(**vars(plan.costs), capacities=tuple(capacities), blocks=blocks)
    return load_planned(replace(plan, costs=costs), reader)[0]
