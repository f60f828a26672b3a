"""How a memory budget is split when bundles are experts, whose layers may differ in size. Arithmetic only.

budget = dense part + KV cache + prefill scratch + staging + slots. Staging holds experts that have no slot of their
own, at the least the top-k experts of one layer; where every expert has a slot there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_flash.config import format_bytes
from mlx_flash.errors import BudgetError

from .selective_persistence import MemoryPlan

STAGING_BYTES = 16 << 20  # of experts that pass through: enough for long reads, and for computing beside them


@dataclass(frozen=True)
class ExpertCosts:
    """What a mixture of experts needs, in bytes. `fixed` parts by name.

    slots, counts, top_k: per layer: bytes of one expert, how many there are, how many a token uses.
    kinds: layers of one kind have experts of the same parts and shapes, and share staging.
    share: of every layer's experts that get slots; None: as many as the budget leaves room for.
    """

    model: str
    fixed: dict[str, int]
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    top_k: tuple[int, ...]
    kinds: tuple[int, ...]
    share: float | None = None

    @property
    def staging_block(self) -> int:
        """The least staging."""
        return self.staging_bytes(1)

    def staging_rows(self, blocks: int) -> dict[int, int]:
        """Slots of staging by kind: `blocks` times the most experts that a token uses of one layer of that kind."""
        rows: dict[int, int] = {}
        for kind, top_k, count in zip(self.kinds, self.top_k, self.counts, strict=True):
            rows[kind] = max(rows.get(kind, 0), min(blocks * top_k, count))
        return rows if blocks else {}

    def staging_bytes(self, blocks: int) -> int:
        slot = dict(zip(self.kinds, self.slots, strict=True))
        return sum(rows * slot[kind] for kind, rows in self.staging_rows(blocks).items())

    @property
    def smallest(self) -> int:
        """The smallest legal budget: no slots but those asked for, all experts pass through staging."""
        capacities = self.given or (0,) * len(self.counts)
        staging = 0 if capacities == self.counts else self.staging_bytes(1)
        return sum(self.fixed.values()) + staging + self._slot_bytes(capacities)

    @property
    def largest(self) -> int:
        """Everything resident."""
        return max(sum(self.fixed.values()) + self._slot_bytes(self.counts), self.smallest)

    @property
    def given(self) -> tuple[int, ...] | None:
        """Slots per layer by `share`."""
        return None if self.share is None else tuple(int(self.share * count) for count in self.counts)

    def _slot_bytes(self, capacities: Sequence[int]) -> int:
        return sum(capacity * slot for capacity, slot in zip(capacities, self.slots, strict=True))

    def split(self, budget_bytes: int) -> MemoryPlan:
        """The plan for a budget; raises BudgetError, part by part, when it is under the smallest legal one."""
        if budget_bytes < self.smallest:
            parts = self.fixed | {"experts of one token's layer": self.staging_block}
            if self.given:
                parts["slots"] = self._slot_bytes(self.given)
            needs = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
            smaller = "--slots" if self.given else "--max-context"
            raise BudgetError(
                f"{self.model} needs at least {format_bytes(self.smallest)} ({needs}; the top {max(self.top_k)} "
                f"experts of a layer must fit), the budget is {format_bytes(budget_bytes)}; use --memory "
                f"{-(-self.smallest // 10**5) / 10:.1f}MB or more, or a smaller {smaller}"
            )
        left = budget_bytes - sum(self.fixed.values())
        blocks, capacities = 0, self.counts
        if self.given is not None:
            capacities = self.given
            blocks = 0 if capacities == self.counts else self._blocks(left - self._slot_bytes(capacities))
        elif budget_bytes < self.largest:
            blocks = self._blocks(left // 8)
            capacities = self._spread(left - self.staging_bytes(blocks))
        staging, slots = self.staging_bytes(blocks), self._slot_bytes(capacities)
        return MemoryPlan(budget_bytes, self.fixed | {"staging": staging, "slots": slots}, capacities, blocks)

    def _blocks(self, spare: int) -> int:
        """Blocks of staging in at most `spare` bytes: more than one where experts are small."""
        one = self.staging_bytes(1)
        return max(1, min(-(-STAGING_BYTES // one), spare // one))

    def _spread(self, left: int) -> tuple[int, ...]:
        """Slots per layer in `left` bytes: the same share of every layer's experts; what rounding down leaves goes one
        by one to the layers that lost most by it."""
        share = left / self._slot_bytes(self.counts)
        exact = [share * count for count in self.counts]
        capacities = [min(int(each), count) for each, count in zip(exact, self.counts, strict=True)]
        left -= self._slot_bytes(capacities)
        for layer in sorted(range(len(exact)), key=lambda i: capacities[i] - exact[i]):
            if self.slots[layer] <= left and capacities[layer] < self.counts[layer]:
                capacities[layer] += 1
                left -= self.slots[layer]
        return tuple(capacities)
