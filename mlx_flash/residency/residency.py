"""Which bundle ids of one layer are in which slots. Knows integers only: neither files nor arrays of weights.

`plan` decides and changes nothing; `evict` and `commit` carry it out around the reads ("LLM in a flash", section 3.3).
Slots 0..num_used-1 are always filled. A call never evicts an id that it asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .policy import least_recently_used


@dataclass(frozen=True)
class Plan:
    """What one step does: `slots[k]` is where `ids[k]` is or will be, -1 where it must be streamed.

    hits, loads, overflow are positions in `ids`: resident already, to be read into their slot, without a slot.
    """

    ids: np.ndarray
    slots: np.ndarray
    hits: np.ndarray
    loads: np.ndarray
    overflow: np.ndarray


class Residency:
    """The slots of one layer: `capacity` of them for `count` ids, least recently used first to go."""

    def __init__(self, count: int, capacity: int):
        self.count, self.capacity = count, min(capacity, count)
        self.reset()

    def reset(self) -> None:
        """Forget everything: after a failed read no slot can be trusted."""
        self.slot_of = np.full(self.count, -1, np.int32)
        self.id_of = np.full(self.capacity, -1, np.int32)
        self.last_used = np.zeros(self.capacity, np.int64)
        self.num_used = 0
        self.clock = 0

    @property
    def free(self) -> int:
        return self.capacity - self.num_used

    def plan(self, ids: np.ndarray) -> Plan:
        """Where each of `ids` (ascending, distinct) is or goes. Pure."""
        slots = self.slot_of[ids]
        hits, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        fresh = np.arange(self.num_used, min(self.capacity, self.num_used + len(missing)))
        # Protect the hits before choosing victims: a call must not evict its own ids.
        protected = np.zeros(self.num_used, bool)
        protected[slots[hits]] = True
        victims = least_recently_used(self.last_used[: self.num_used], protected, len(missing) - len(fresh))
        room = np.concatenate([victims, fresh]).astype(np.int32)
        loads, overflow = missing[: len(room)], missing[len(room) :]
        slots[loads] = room
        return Plan(ids, slots, hits, loads, overflow)

    def evict(self, plan: Plan) -> None:
        """Before the reads: the slots about to be overwritten hold nothing."""
        slots = plan.slots[plan.loads]
        old = self.id_of[slots]
        self.slot_of[old[old >= 0]] = -1
        self.id_of[slots] = -1

    def commit(self, plan: Plan) -> None:
        """After the reads: the loaded ids are resident, and all that have a slot were used now."""
        self.clock += 1
        ids, slots = plan.ids[plan.loads], plan.slots[plan.loads]
        self.slot_of[ids], self.id_of[slots] = slots, ids
        self.last_used[plan.slots[plan.slots >= 0]] = self.clock
        self.num_used = max(self.num_used, int(slots.max(initial=-1)) + 1)
