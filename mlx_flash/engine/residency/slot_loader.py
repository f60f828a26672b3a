"""Moves one layer's bundles into its slots: reads, prefetches, copies ("LLM in a flash", section 3.3).

Owns the prefetches under way and the steps whose results may not be computed yet: those still read slots, so a slot is
overwritten only after they are settled. Which bundles are wanted is the selector's decision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlx_flash.engine.storage.reader import CountedReader, Done, Pending, Target
from mlx_flash.errors import ReadError

from .slab_copy import copy_rows
from .slots import Residency, SlotPlan

LAZY_STEPS = 2  # steps that a lazy backend may leave uncomputed while nothing is read: mlx-lm's loop is one ahead


class Step(Protocol):
    """A computation, maybe a lazy one, that reads slots."""

    def settle(self) -> None:
        """Return when it reads no slot any more."""


@dataclass(eq=False)
class Prefetch:
    """A read under way into slots that already count as filled. given_up: nothing that a step asked for needs it."""

    slots: np.ndarray
    pending: Pending
    given_up: bool = False


class SlotLoader:
    """The slots of one layer: `residency` says which bundle is in which, `targets` are the bytes of its slab.

    one_by_one: each prefetched bundle is a read of its own, which can be given up alone; else all are one read.
    arriving (capacity + 1,) bool: the slots of `prefetches`; the last item is False, for bundles without a slot, -1.
    """

    def __init__(
        self,
        layer: int,
        residency: Residency,
        targets: Sequence[Target],
        source: CountedReader,
        one_by_one: bool = False,
    ):
        self.layer, self.residency, self.targets = layer, residency, targets
        self.prefetches: list[Prefetch] = []
        self.arriving = np.zeros(residency.capacity + 1, bool)
        self._source, self._one_by_one = source, one_by_one
        self._steps: deque[Sequence[Step]] = deque()  # the last ones, which may still read slots

    def plan(self, ids: np.ndarray) -> SlotPlan:
        """Where each of `ids` (ascending, distinct) is or goes; arriving bundles keep their slots."""
        if not self.prefetches:
            return self.residency.plan(ids)
        return self.residency.plan(ids, keep=np.concatenate([each.slots for each in self.prefetches]))

    def make_room(self, plan: SlotPlan) -> None:
        """Before a plan's loads are read: no step reads their slots any more, and they count as empty."""
        if len(plan.loads):
            self.settle()
            self.residency.evict(plan)

    def read(self, plan: SlotPlan, positions: np.ndarray) -> Pending:
        """Begin to read a plan's bundles at these positions, some of its loads, into their slots."""
        return self._source.read(self.layer, plan.ids[positions], plan.slots[positions], self.targets)

    # Prefetches

    def prefetch(self, ids: np.ndarray) -> int:
        """Begin to read those of `ids` (n,), ascending, that have no slot; returns how many. Resident ones keep
        theirs."""
        self.land()
        plan = self.residency.plan(ids)
        slots = plan.slots[plan.loads]
        if not len(slots):
            return 0
        self.prefetches = [Prefetch(slots, Done())]  # so that after an interrupt `forget_prefetches` knows the slots
        self.arriving[slots] = True
        self.make_room(plan)
        parts = plan.loads[:, None] if self._one_by_one else plan.loads[None]
        self.prefetches = [Prefetch(plan.slots[part], self.read(plan, part)) for part in parts]
        self.residency.place(plan)
        return len(slots)

    def count_arriving(self, ids: np.ndarray) -> int:
        """How many of these bundles are being prefetched."""
        return int(self.arriving[self.residency.slot_of[ids]].sum()) if self.prefetches else 0

    def advance(self) -> None:
        """Start prefetches that are still waiting for room in the disk's queue, as far as there is room now."""
        for each in self.prefetches:
            each.pending.ended()

    def give_up_others(self, ids: np.ndarray) -> None:
        """Give up prefetches of bundles that are not among `ids`, if their reads have not begun: what is needed
        comes first."""
        wanted = set(self.residency.slot_of[ids].tolist())
        for each in self.prefetches:
            if wanted.isdisjoint(each.slots.tolist()):
                each.given_up = True
                each.pending.give_up()

    def land(self, prefetches: Sequence[Prefetch] | None = None) -> None:
        """Wait for these prefetches, None: all, before a step is planned. One that failed leaves its slots empty: what
        the step needs of it is read again."""
        for each in self.prefetches if prefetches is None else prefetches:
            try:
                each.pending.wait()
            except ReadError:
                self.residency.vacate(each.slots)
            self._remove(each)

    def land_ended(self) -> None:
        """Like `land`, for the prefetches whose reads have ended."""
        if self.prefetches:
            self.land([each for each in self.prefetches if each.pending.ended()])

    def land_given_up(self) -> None:
        """Like `land`, for the prefetches that were given up."""
        self.land([each for each in self.prefetches if each.given_up])

    def arriving_in(self, slots: np.ndarray) -> list[Prefetch]:
        """The prefetches into any of these slots (n,)."""
        wanted = set(slots.tolist())
        return [each for each in self.prefetches if not wanted.isdisjoint(each.slots.tolist())]

    def finish(self, prefetches: Sequence[Prefetch] | None = None) -> None:
        """Wait for these prefetches, None: all, on which a planned step counts. Raises ReadError."""
        for each in self.prefetches if prefetches is None else prefetches:
            each.pending.wait()
            self._remove(each)

    def _remove(self, prefetch: Prefetch) -> None:
        self.arriving[prefetch.slots] = False
        self.prefetches = [each for each in self.prefetches if each is not prefetch]

    # Copies

    def warm(self, ids: np.ndarray, used: np.ndarray, staging: Sequence[Target], rows: np.ndarray) -> None:
        """Copy those of `ids` (n,) that are worth a slot from `rows` (n,) of a staging slab; used (T, n) bool: which of
        them each of a prompt's tokens used."""
        plan = self.residency.warm(ids, used)
        if len(plan.loads):
            self.make_room(plan)
            loaded = rows[np.searchsorted(ids, plan.ids[plan.loads])]
            copy_rows(staging, loaded, self.targets, plan.slots[plan.loads])
            self.residency.place(plan)

    def copy_out(self, ids: np.ndarray, staging: Sequence[Target]) -> bool:
        """If all of `ids` (n,) are resident, copy them to rows 0.. of a staging slab; returns whether they are."""
        slots = self.residency.slot_of[ids]
        if (slots < 0).any():
            return False
        copy_rows(self.targets, slots, staging, np.arange(len(ids)))
        return True

    # Steps

    def add_step(self, parts: Sequence[Step], lazy: int = LAZY_STEPS) -> None:
        """A step has begun to compute from slots; all but the last `lazy` steps are settled."""
        self._steps.append(parts)
        self.settle(lazy)

    def settle(self, lazy: int = 0) -> None:
        """Wait until all steps but the last `lazy` read no slot any more. A lazy backend may not have computed them, if
        the caller feeds known tokens: those need nothing that this layer computed for the tokens before."""
        while len(self._steps) > lazy:
            for part in self._steps[0]:
                part.settle()
            self._steps.popleft()

    # Failures

    def forget(self) -> None:
        """After a failed read or an interrupt: the slots hold unknown bytes. Lazy steps are settled as ever, before
        their slots are overwritten."""
        self.residency.reset()
        self.arriving[:] = False
        self.prefetches = []

    def forget_prefetches(self) -> None:
        """After the reader was drained: prefetched slots hold unknown bytes."""
        if self.prefetches:
            self.forget()
