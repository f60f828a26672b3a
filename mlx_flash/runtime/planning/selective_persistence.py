"""How a memory budget is split: what must be resident, and how many slots each layer gets. Arithmetic only.

budget = dense part + selector rows + KV cache + prefill scratch + staging + slots; the interpreter and its libraries
come on top. ("LLM in a flash", section 3.1: selective persistence.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from mlx_flash.config import FlashConfig, format_bytes
from mlx_flash.engine.residency.miss_curves import split_by_gain
from mlx_flash.errors import BudgetError

FLOOR = 1.5  # slots of a layer over the bundles that a token asks of it, where that can be
STAGING_BLOCKS = 6  # blocks in flight or being computed: enough to keep a disk busy, little memory


@dataclass(frozen=True)
class MemoryPlan:
    """A budget split: `parts` in bytes by name, slots per layer, staging slabs of one block each."""

    budget_bytes: int
    parts: dict[str, int]
    capacities: tuple[int, ...]
    staging_blocks: int

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


class Costs(Protocol):
    """What a model needs in memory, in bytes. fixed: parts by name; counts: bundles per layer."""

    @property
    def model(self) -> str: ...

    @property
    def fixed(self) -> dict[str, int]: ...

    @property
    def counts(self) -> tuple[int, ...]: ...

    @property
    def staging_block(self) -> int:
        """The least staging."""

    @property
    def smallest(self) -> int:
        """The smallest legal budget."""

    @property
    def largest(self) -> int:
        """Everything resident."""

    def split(self, budget_bytes: int) -> MemoryPlan:
        """The plan for a budget. Raises BudgetError for one under `smallest`."""


@dataclass(frozen=True)
class NeuronCosts:
    """What a model of neuron bundles needs, in bytes. `fixed` parts by name; a slot of layer l holds one of `counts[l]`
    bundles.

    unit: slots come in multiples of it (a layer's last unit may be shorter).
    curves: calibrated misses over slots, one per layer; without them slots are split in proportion to layers' sizes.
    staging_blocks: the most blocks of staging; least_staging: the fewest, even if fewer slots are left then.
    resident_staging: blocks where everything is resident; None: staging_blocks.
    share: of every layer's bundles that get slots; None: as many as the budget leaves room for.
    layer_slots: a slot's bytes in each layer, where they differ; `slot` is then the largest one, and slots are counted
        as if all were that large.
    """

    model: str
    fixed: dict[str, int]
    staging_block: int
    slot: int
    counts: tuple[int, ...]
    unit: int = 1
    curves: tuple[Any, ...] = ()
    staging_blocks: int = STAGING_BLOCKS
    least_staging: int = 1
    resident_staging: int | None = None
    share: float | None = None
    layer_slots: tuple[int, ...] = ()

    def slots_bytes(self, capacities: Sequence[int]) -> int:
        """Bytes of these slots, given per layer."""
        if not self.layer_slots:
            return self.slot * sum(capacities)
        return sum(slot * capacity for slot, capacity in zip(self.layer_slots, capacities, strict=True))

    @property
    def shared_slots(self) -> tuple[int, ...]:
        """Slots per layer by `share`, in whole units; none where no share is given."""
        share = self.share or 0.0
        return tuple(n if share == 1 else int(share * n) // self.unit * self.unit for n in self.counts)

    @property
    def staging_when_resident(self) -> int:
        return self.staging_blocks if self.resident_staging is None else self.resident_staging

    @property
    def smallest(self) -> int:
        """The smallest legal budget: no slots but those asked for, staging for one block if anything streams."""
        staging = self.least_staging if self.share != 1 else min(self.least_staging, self.staging_when_resident)
        return sum(self.fixed.values()) + self.staging_block * staging + self.slots_bytes(self.shared_slots)

    @property
    def largest(self) -> int:
        """Everything resident."""
        staging, slots = self.staging_block * self.staging_when_resident, self.slots_bytes(self.counts)
        # A tiny model's bundles may take less than a block of staging does: never under the smallest.
        return max(sum(self.fixed.values()) + staging + slots, self.smallest)

    def split(self, budget_bytes: int) -> MemoryPlan:
        """See `split_budget`."""
        return split_budget(self, budget_bytes)


def split_slots(total: int, counts: Sequence[int], unit: int) -> tuple[int, ...]:
    """Slots per layer, in proportion to the layer's size, in whole units, at most `total` in all.

    The slots that rounding down leaves go unit by unit to the layers that lost most by it.
    """
    everything = sum(counts)
    if total >= everything:
        return tuple(counts)
    exact = [total * count / everything for count in counts]
    slots = [int(share) // unit * unit for share in exact]
    left = total - sum(slots)
    for layer in sorted(range(len(counts)), key=lambda i: slots[i] - exact[i]):
        more = min(unit, counts[layer] - slots[layer])
        if 0 < more <= left:
            slots[layer] += more
            left -= more
    return tuple(slots)


def split_budget(costs: NeuronCosts, budget_bytes: int) -> MemoryPlan:
    """The plan for a budget; raises BudgetError, part by part, when it is under the smallest legal one."""
    if budget_bytes < costs.smallest:
        slots = costs.slots_bytes(costs.shared_slots)
        parts = costs.fixed | {"staging": costs.smallest - sum(costs.fixed.values()) - slots}
        needs = ", ".join(f"{name} {format_bytes(size)}" for name, size in (parts | {"slots": slots}).items() if size)
        smaller = "--slots" if slots else "--max-context"
        raise BudgetError(
            f"{costs.model} needs at least {format_bytes(costs.smallest)} ({needs}), the budget is "
            f"{format_bytes(budget_bytes)}; use --memory {-(-costs.smallest // 10**5) / 10:.1f}MB or more, "
            f"or a smaller {smaller}"
        )
    left = budget_bytes - sum(costs.fixed.values())
    if costs.share is not None:
        staging, capacities = _given_slots(costs, left)
    elif budget_bytes >= costs.largest:
        staging, capacities = costs.staging_when_resident, costs.counts
    else:
        # Staging beyond what is needed may take an eighth of what is left, no more.
        staging = max(costs.least_staging, min(costs.staging_blocks, left // 8 // costs.staging_block))
        total = (left - staging * costs.staging_block) // costs.slot
        if costs.curves:
            capacities = split_by_gain(total, costs.counts, costs.unit, costs.curves, _floors(costs.curves, total))
        else:
            capacities = split_slots(total, costs.counts, costs.unit)
    parts = dict(costs.fixed) | {"staging": staging * costs.staging_block, "slots": costs.slots_bytes(capacities)}
    return MemoryPlan(budget_bytes, parts, capacities, staging)


def _given_slots(costs: NeuronCosts, left: int) -> tuple[int, tuple[int, ...]]:
    """Staging blocks and slots per layer where the share of the slots is given; staging takes what they leave."""
    capacities = costs.shared_slots
    wanted = costs.staging_when_resident if capacities == costs.counts else costs.staging_blocks
    return min(wanted, (left - costs.slots_bytes(capacities)) // costs.staging_block), capacities


def _floors(curves: Sequence[Any], total: int) -> list[int]:
    """Slots that every layer gets first: one and a half times what a token asks for. With fewer, bundles without a slot
    pass through staging, and their reads overlap nothing. Scaled down where this takes more than half of all slots."""
    floors = [FLOOR * float(curve[1, 0]) for curve in curves]
    scale = min(1.0, total / 2 / max(sum(floors), 1.0))
    return [int(scale * floor) for floor in floors]


def cgroup_limit(root: Path = Path("/")) -> int | None:
    """The memory limit of this process's control group (Linux, v1 or v2) in bytes, or None. Limits of the groups
    above count too, and in a container the group's own path need not exist below the mount."""
    limits = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / group.lstrip("/")
        for above in [folder, *folder.parents][: len(folder.parts) - len(base.parts) + 1]:
            try:
                limits.append(int((above / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def budget_for(config: FlashConfig, costs: Costs) -> int:
    """The budget in bytes of a run that needs `costs`."""
    return auto_budget(costs) if config.memory == "auto" else int(config.memory)


def auto_budget(costs: Costs) -> int:
    """The least of everything resident, half of the available memory, half of a cgroup limit."""
    limit = cgroup_limit()
    choices = [costs.largest, psutil.virtual_memory().available // 2] + ([limit // 2] if limit else [])
    return min(choices)
