"""Which bundles of one layer are in which slots ("LLM in a flash", section 3.3). Knows integers only, no bytes.

`plan` decides and changes nothing; `evict` before the reads and `place` or `commit` after them carry it out. Slots from
num_used on have never been filled. A call never evicts an id that it asked for. `slots_compiled` is `plan` in one
compiled call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from .window import DEFAULT, History, Policy

_NO_SLOTS = np.empty(0, np.int32)


@dataclass(frozen=True)
class SlotPlan:
    """What one step reads: `slots[k]` is where `ids[k]` is or will be, -1 where it must be streamed.

    hits, loads, overflow: positions in `ids` that are resident already, must be read into their slot, have no slot.
    """

    ids: np.ndarray
    slots: np.ndarray
    hits: np.ndarray
    loads: np.ndarray
    overflow: np.ndarray


class Residency:
    """The slots of one layer: `capacity` of them for `count` ids; `policy` says which bundle is evicted.

    rates (count,): calibrated shares of tokens that use an id, for the policy's prior and pins; compiled: plan with
    Numba, which must be there (policies with a window or pins are never compiled).
    """

    def __init__(
        self,
        count: int,
        capacity: int,
        policy: Policy = DEFAULT,
        rates: np.ndarray | None = None,
        compiled: bool = False,
    ):
        self.count, self.capacity = count, min(capacity, count)
        self.policy, self.rates = policy, rates
        self.reset()
        self._find: Callable[..., tuple[int, int]] | None = None
        self.compiled = compiled and self.history.by_worth_alone
        if self.compiled:
            self._find = import_module(f"{__package__}.slots_compiled").find_places

    def reset(self) -> None:
        """Forget everything: after a failed read no slot can be trusted."""
        self.slot_of = np.full(self.count, -1, np.int32)
        self.id_of = np.full(self.capacity, -1, np.int64)  # an index every token: numpy would convert others
        self.num_used = 0
        self.history = History(self.policy, self.count, int(self.policy.pinned * self.capacity), self.rates)

    @property
    def free(self) -> int:
        return self.capacity - self.num_used

    def plan(self, ids: np.ndarray, keep: np.ndarray | None = None) -> SlotPlan:
        """Where each of `ids` (ascending, distinct) is or goes. Pure.

        keep (n,): slots that must stay as they are, because bundles are being prefetched into them: they may hold
        nothing yet, and lie past `num_used`, one after the other. Negative ones are skipped. Ids that find no room
        beside them overflow.
        """
        if self._find is not None:
            return self._plan_compiled(self._find, ids, _NO_SLOTS if keep is None else keep)
        slots = self.slot_of.take(ids)
        there = slots >= 0
        hits, missing = there.nonzero()[0], (~there).nonzero()[0]
        if not len(missing):
            return SlotPlan(ids, slots, hits, missing, missing)
        # The hits are protected: a call must not evict its own ids.
        protected, begin = slots[hits], self.num_used
        if keep is not None and len(keep):
            begin = max(begin, int(keep.max()) + 1)
            protected = np.union1d(protected, keep[(keep >= 0) & (keep < self.num_used)])
        fresh = min(self.capacity - begin, len(missing))
        room = self.history.first_to_go(self.id_of[: self.num_used], len(missing) - fresh, protected)
        if fresh:
            room = np.concatenate([room, np.arange(begin, begin + fresh)])
        loads, overflow = missing, missing[:0]
        if len(room) < len(missing):
            over = self.history.first_to_go(ids[missing], len(missing) - len(room))
            loads, overflow = np.delete(missing, over), missing[over]
        slots[loads] = room
        return SlotPlan(ids, slots, hits, loads, overflow)

    def _plan_compiled(self, find: Callable[..., tuple[int, int]], ids: np.ndarray, keep: np.ndarray) -> SlotPlan:
        score, base, gain = self.history.worths
        slots, positions = np.empty(len(ids), np.int32), np.empty(len(ids), np.int64)
        hits, loads = find(ids, self.slot_of, self.id_of, self.num_used, score, base, gain, keep, slots, positions)
        return SlotPlan(ids, slots, positions[:hits], positions[hits : hits + loads], positions[hits + loads :])

    def evict(self, plan: SlotPlan) -> None:
        """Before the reads: empty the slots that will be overwritten."""
        self.vacate(plan.slots[plan.loads])

    def vacate(self, slots: np.ndarray) -> None:
        """Empty these slots (n,): they are the first to be filled again."""
        old = self.id_of[slots]
        self.slot_of[old[old >= 0]] = -1
        self.id_of[slots] = -1

    def commit(self, plan: SlotPlan, used: np.ndarray | None = None) -> None:
        """After the reads of one token: the loads are resident, and the ids at `used` were used (positions in plan.ids
        or a mask of them; None: all). An id that was asked for and did not fire is worth no more than before."""
        self.place(plan)
        self.history.use(plan.ids if used is None else plan.ids[used])

    def place(self, plan: SlotPlan) -> None:
        """After the reads: the loads are resident. Counts no use."""
        ids, slots = plan.ids[plan.loads], plan.slots[plan.loads]
        self.slot_of[ids], self.id_of[slots] = slots, ids
        if self.num_used < self.capacity:
            self.num_used = max(self.num_used, int(slots.max(initial=-1)) + 1)

    def begin_prompt(self, tokens: int) -> None:
        """Before a prompt's chunk of `tokens` tokens; `warm` is then called once for each of its ids."""
        self.history.pass_tokens(tokens)

    def warm(self, ids: np.ndarray, used: np.ndarray) -> SlotPlan:
        """Plan which of `ids` (ascending, distinct) get a slot after a prompt's chunk of T tokens; used (T, n) bool:
        which ids each token used. None of them has to get one. Follow with `evict`, copies and `place`."""
        self.history.use_many(ids, used)
        history, missing, resident = self.history, ids[self.slot_of[ids] < 0], self.id_of[: self.num_used]
        # What is left of the best missing ones after the free slots, against the resident ones that are worth least.
        best, worst = missing[history.order(missing)[::-1]], resident[history.order(resident)]
        challengers = best[self.free : self.capacity]
        better = int(history.beats(challengers, worst[: len(challengers)]).sum())
        return self.plan(np.sort(best[: self.free + better]))
