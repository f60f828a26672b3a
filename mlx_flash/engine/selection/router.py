"""The selector `router`: a mixture's own router names the experts; those without a slot are read. Exact.

Knows ids, slots and reads. Each chosen (token, expert) pair is computed on its own, so that its bits depend neither on
where its expert lies nor on what is computed beside it. The caller computes the pairs and fixes the order of their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_flash.engine.residency.expert_staging import ExpertGroup, ExpertStaging
from mlx_flash.engine.residency.slot_loader import LAZY_STEPS, SlotLoader
from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.storage.reader import Pending, Together

from .context import SharedContext
from .look_ahead import ExpertLookAhead

PIECES = 8  # a prompt's experts are computed in so many steps, each while the next ones are read


class RouterSelector:
    """One layer's experts: `slab` holds those that `residency` has slots for, the others pass through `staging`.

    slab, staging: None where they have no slots
    """

    exact = True

    def __init__(
        self,
        layer: int,
        shared: SharedContext,
        residency: Residency,
        slab: Any,
        staging: ExpertStaging | None,
        look_ahead: ExpertLookAhead | None = None,
    ):
        if residency.capacity < residency.count and staging is None:
            raise ValueError(f"{residency.capacity} slots for {residency.count} experts, and no staging")
        self.layer, self.shared, self.slab = layer, shared, slab
        self.staging, self.look_ahead = staging, look_ahead
        self.loader = SlotLoader(
            layer, residency, slab.targets if slab is not None else (), shared.source, one_by_one=True
        )
        if look_ahead is not None:
            look_ahead.add(self.loader)

    @property
    def residency(self) -> Residency:
        """Which expert is in which slot."""
        return self.loader.residency

    @property
    def complete(self) -> bool:
        """Whether every expert is in its slot for good."""
        return bool(self.residency.num_used == self.residency.count)

    def forget(self) -> None:
        """The slots hold unknown bytes."""
        self.loader.forget()
        if self.look_ahead is not None:
            self.look_ahead.forget()

    def groups(self, chosen: np.ndarray, decoding: bool, x: Any = None) -> Iterator[ExpertGroup]:
        """Yield groups that hold every expert of `chosen` (T, k) integers once: first those in slots already, one
        group alone where all are. Ask for the next group only when the last one's pairs are (lazily) computed; a call
        that is left before its end forgets its slots.

        decoding: one new token per sequence, which counts as hits and misses. x: of a lone new token, the input of the
        look-ahead's guess of the next layer. Raises ReadError.
        """
        self.shared.begin(self)
        loader, stats = self.loader, self.shared.stats
        ids = np.unique(chosen)
        lone = len(chosen) == 1
        if lone:
            loader.land_given_up()
        else:
            loader.land()
        missed = int((loader.residency.slot_of[ids] < 0).sum())
        if loader.prefetches:
            missed += self._use_prefetches(ids)
        plan = loader.plan(ids) if lone else self._plan_prompt(ids, chosen)
        if decoding:
            stats.hits += len(ids) - missed
            stats.misses += missed
        groups: list[ExpertGroup] = []
        for group in self._groups(plan, lone, x if decoding else None):
            groups.append(group)
            yield group
        if loader.residency.capacity < loader.residency.count:  # else no slot is ever given to another expert
            # A prompt's results are large: they are not kept to be waited for later.
            loader.add_step([group for group in groups if group.slab is self.slab], LAZY_STEPS if lone else 0)
        if lone and self.look_ahead is not None:
            self.look_ahead.advance()
        self.shared.end()

    def _use_prefetches(self, ids: np.ndarray) -> int:
        """Give up the wrong guesses that have not begun, and take in what has arrived; returns how many were right."""
        right = self.loader.count_arriving(ids)
        self.shared.stats.guessed_right += right
        self.loader.give_up_others(ids)
        self.loader.land_ended()
        return right

    def _plan_prompt(self, ids: np.ndarray, chosen: np.ndarray) -> SlotPlan:
        """Where each of these ids is, is read to (loads), or that it has no slot (overflow)."""
        residency, tokens = self.residency, len(chosen)
        residency.begin_prompt(tokens)
        used = np.zeros((tokens, residency.count), bool)
        np.put_along_axis(used, chosen.astype(np.int64), True, axis=1)
        if len(ids) <= residency.capacity:
            residency.history.use_many(ids, used[:, ids])
            return residency.plan(ids)
        slots = residency.slot_of[ids]
        loaded = residency.warm(ids, used[:, ids])  # those of the missing ones that are worth a slot
        loads = np.searchsorted(ids, loaded.ids[loaded.loads])
        hits = np.flatnonzero(slots >= 0)
        slots[loads] = loaded.slots[loaded.loads]
        overflow = np.setdiff1d(np.flatnonzero(slots < 0), loads)
        return SlotPlan(ids, slots, hits, loads, overflow)

    def _groups(self, plan: SlotPlan, lone: bool, x: Any) -> Iterator[ExpertGroup]:
        ids, slots, loader = plan.ids, plan.slots, self.loader
        streamed = self._stream(ids[plan.overflow])
        coming = next(streamed, None)  # is being read from now on
        arriving = loader.arriving[slots[plan.hits]]  # a lone token's only
        hits, late = plan.hits[~arriving], plan.hits[arriving]
        here = ExpertGroup(ids[hits], slots[hits], self.slab) if len(hits) else None
        if here is not None and len(plan.loads) and np.isin(here.rows, slots[plan.loads]).any():
            yield here  # a prompt: the slots of some are given away, once they have been computed
            here.settle()
            here = None
        loader.make_room(plan)
        parts = [part for part in np.array_split(plan.loads, 1 if lone else PIECES) if len(part)]
        reads = [loader.read(plan, part) for part in parts]
        prefetches = loader.arriving_in(slots[late]) if len(late) else []
        if prefetches:
            parts = [np.concatenate([late, plan.loads])]
            reads = [Together([*(each.pending for each in prefetches), *reads])]
        if lone and self.look_ahead is not None:
            self.look_ahead.guess(self.layer + 1, x)
        if here is not None:
            yield here  # is computed while the others are read
        for part, pending in zip(parts, reads, strict=True):
            pending.wait()
            yield ExpertGroup(ids[part], slots[part], self.slab)
        loader.finish(prefetches)
        if lone:
            loader.residency.commit(plan)
        else:
            loader.residency.place(plan)
        overlapped = self.staging is not None and len(self.staging.halves) > 1
        while coming is not None:
            group, pending = coming
            pending.wait()
            coming = next(streamed, None) if overlapped else coming
            yield group
            coming = coming if overlapped else next(streamed, None)

    def _stream(self, ids: np.ndarray) -> Iterator[tuple[ExpertGroup, Pending]]:
        """Begin to read these experts into staging, some at a time."""
        if not len(ids):
            return
        assert self.staging is not None
        for first in range(0, len(ids), self.staging.experts):
            group = self.staging.next(ids[first : first + self.staging.experts])
            yield group, self.shared.source.read(self.layer, group.ids, group.rows, group.slab.targets)
