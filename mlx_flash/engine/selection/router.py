"""Which experts are in memory when a mixture's router has chosen: find them in slots, or read them. Exact.

Knows ids, slots and reads. Each chosen (token, expert) pair is computed on its own, so that its bits depend neither on
where its expert lies nor on what is computed beside it; how, and in which order pairs are summed, is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.storage.reader import Done, Pending, Together
from mlx_flash.errors import ReadError

from .context import SharedContext
from .expert_look_ahead import ExpertLookAhead

AHEAD = 2  # calls that a lazy backend may leave uncomputed while nothing is read: mlx-lm's loop is one ahead
PIECES = 8  # a prompt's experts are computed in so many steps, each while the next ones are read


def computed() -> None:
    """What was asked for has been computed."""


@dataclass(eq=False)
class Group:
    """Experts ids (n,), distinct, which are in rows (n,) of `slab`, until the next group is asked for.

    The caller computes all pairs of these experts. Where it does so lazily it sets `settle`, which waits for that: it
    is called before the rows are overwritten, maybe in a later call.
    """

    ids: np.ndarray
    rows: np.ndarray
    slab: Any
    settle: Callable[[], None] = computed


class Staging:
    """Slots that belong to no layer: experts without a slot of their own pass through, one half of the slots being
    computed while the other is read into. slab: one of `rows` experts that all its layers' experts fit."""

    def __init__(self, slab: Any, rows: int):
        self.slab = slab
        half = max(1, rows // 2)
        self.halves = [np.arange(half)] + ([np.arange(half, 2 * half)] if rows > 1 else [])
        self._using: list[list[Group]] = [[] for _ in self.halves]
        self._turn = 0

    @property
    def experts(self) -> int:
        """How many are read at once."""
        return len(self.halves[0])

    def next(self, ids: np.ndarray) -> Group:
        """Room for these ids, at most `experts` of them: when it returns nothing reads these slots any more."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self.halves)
        for group in self._using[turn]:
            group.settle()
        group = Group(ids, self.halves[turn][: len(ids)], self.slab)
        self._using[turn] = [group]
        return group


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
        staging: Staging | None,
        look_ahead: ExpertLookAhead | None = None,
    ):
        if residency.capacity < residency.count and staging is None:
            raise ValueError(f"{residency.capacity} slots for {residency.count} experts, and no staging")
        self.layer, self.shared, self.residency = layer, shared, residency
        self.slab, self.staging, self.look_ahead = slab, staging, look_ahead
        self._coming: dict[int, Pending] = {}  # what is being read ahead, by slots that count as filled
        self._given_up: list[int] = []  # of these slots: for nothing that a later call could ask for
        self._unsettled: deque[list[Group]] = deque()  # of the last calls, which may still be reading slots
        if look_ahead is not None:
            look_ahead.add(self)

    @property
    def complete(self) -> bool:
        """Whether every expert is in its slot for good."""
        return bool(self.residency.num_used == self.residency.count)

    def forget(self) -> None:
        """The slots hold unknown bytes. What is lazily computed from them is waited for as ever, before others come."""
        self.residency.reset()
        self._coming, self._given_up = {}, []
        if self.look_ahead is not None:
            self.look_ahead.forget()

    def read_ahead(self, ids: np.ndarray) -> int:
        """Begin to read those of `ids` (n,), ascending, that are missing, each by itself; returns how many. None that
        is resident gives way."""
        self._land(list(self._coming))
        plan = self.residency.plan(ids)
        slots = plan.slots[plan.loads]
        if not len(slots):
            return 0
        self._coming = dict.fromkeys(slots.tolist(), Done())  # whatever interrupts this: `forget_ahead` knows of it
        self._settle()
        self.residency.evict(plan)
        for k, slot in zip(plan.loads.tolist(), slots.tolist(), strict=True):
            one = slice(k, k + 1)
            self._coming[slot] = self.shared.read(self.layer, ids[one], plan.slots[one], self.slab.targets)
        self.residency.place(plan)
        return len(slots)

    def ahead_ended(self) -> bool:
        """Whether all that is being read ahead has come; reads that wait for their turn go on."""
        return all([pending.ended() for pending in self._coming.values()])

    def forget_ahead(self) -> None:
        """What was being read ahead may not have come."""
        if self._coming:
            self.residency.reset()
            self._coming, self._given_up = {}, []

    def _land(self, slots: Sequence[int]) -> None:
        """Wait for what is being read ahead into these. What failed or was given up left its slot empty: if it is
        needed, it is read as if it had not been guessed."""
        for slot in slots:
            try:
                self._coming[slot].wait()
            except ReadError:
                self.residency.vacate(np.array([slot]))
            del self._coming[slot]
        self._given_up = [slot for slot in self._given_up if slot in self._coming]

    def _check_guesses(self, ids: np.ndarray) -> int:
        """How many guesses were right. The others are given up as far as they have not begun, so that what is missing
        comes first."""
        if not self._coming:
            return 0
        right = set(self.residency.slot_of[ids].tolist()) & self._coming.keys()
        self.shared.stats.guessed_right += len(right)
        self._given_up = [slot for slot in self._coming if slot not in right]
        for slot in self._given_up:
            self._coming[slot].give_up()
        self._land([slot for slot, pending in self._coming.items() if pending.ended()])
        return len(right)

    def groups(self, chosen: np.ndarray, decoding: bool, x: Any = None) -> Iterator[Group]:
        """Yield groups that hold every expert of `chosen` (T, k) integers once: first those in slots already, one
        group alone where all are. Ask for the next group only when the last one's pairs are (lazily) computed; a call
        that is left before its end forgets its slots.

        decoding: one new token per sequence, which counts as hits and misses. x: of a lone new token, what the
        look-ahead's predictor of the next layer takes. Raises ReadError.
        """
        self.shared.begin(self)
        ids = np.unique(chosen)
        if decoding and self.shared.recorder is not None:
            self.shared.recorder(self.layer, ids)
        lone = len(chosen) == 1
        self._land(self._given_up if lone else list(self._coming))
        missed = int((self.residency.slot_of[ids] < 0).sum()) + self._check_guesses(ids)
        plan = self._plan(ids, chosen)
        if decoding:
            self.shared.stats.hits += len(ids) - missed
            self.shared.stats.misses += missed
        groups: list[Group] = []
        for group in self._groups(plan, lone, x if decoding else None):
            groups.append(group)
            yield group
        if self.residency.capacity < self.residency.count:  # else no slot is ever given to another expert
            self._unsettled.append([group for group in groups if group.slab is self.slab])
            # A prompt's results are large: they are not kept to be waited for later.
            self._settle(AHEAD if lone else 0)
        if lone and self.look_ahead is not None:
            self.look_ahead.go_on()
        self.shared.end()

    def _plan(self, ids: np.ndarray, chosen: np.ndarray) -> SlotPlan:
        """Where each of these ids is, is read to (loads), or that it has no slot (overflow)."""
        residency, tokens = self.residency, len(chosen)
        if tokens == 1:
            return residency.plan(ids, keep=np.array(list(self._coming), np.int64) if self._coming else None)
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

    def _groups(self, plan: SlotPlan, lone: bool, x: Any) -> Iterator[Group]:
        ids, slots = plan.ids, plan.slots
        streamed = self._stream(ids[plan.overflow])
        coming = next(streamed, None)  # is being read from now on
        late = np.isin(slots[plan.hits], list(self._coming))
        hits, late = plan.hits[~late], plan.hits[late]
        here = Group(ids[hits], slots[hits], self.slab) if len(hits) else None
        if len(plan.loads):
            if here is not None and np.isin(here.rows, slots[plan.loads]).any():
                yield here  # a prompt: the slots of some are given away, once they have been computed
                here.settle()
                here = None
            self._settle()
            self.residency.evict(plan)
        parts = [part for part in np.array_split(plan.loads, 1 if lone else PIECES) if len(part)]
        reads = [self.shared.read(self.layer, ids[part], slots[part], self.slab.targets) for part in parts]
        if len(late):  # a lone token
            parts = [np.concatenate([late, plan.loads])]
            reads = [Together([*(self._coming[slot] for slot in slots[late].tolist()), *reads])]
        if lone and self.look_ahead is not None:
            self.look_ahead.guess(self.layer + 1, x)
        if here is not None:
            yield here  # is computed while the others are read
        for part, pending in zip(parts, reads, strict=True):
            pending.wait()
            yield Group(ids[part], slots[part], self.slab)
        for slot in slots[late].tolist():
            del self._coming[slot]
        if lone:
            self.residency.commit(plan)
        else:
            self.residency.place(plan)
        ahead = self.staging is not None and len(self.staging.halves) > 1
        while coming is not None:
            group, pending = coming
            pending.wait()
            coming = next(streamed, None) if ahead else coming
            yield group
            coming = coming if ahead else next(streamed, None)

    def _stream(self, ids: np.ndarray) -> Iterator[tuple[Group, Pending]]:
        """Begin to read these experts into staging, some at a time."""
        if not len(ids):
            return
        assert self.staging is not None
        for first in range(0, len(ids), self.staging.experts):
            group = self.staging.next(ids[first : first + self.staging.experts])
            yield group, self.shared.read(self.layer, group.ids, group.rows, group.slab.targets)

    def _settle(self, but: int = 0) -> None:
        """Wait until the calls before the last `but` no longer need their slots. A lazy backend may not have computed
        them, if the caller feeds known tokens: those need nothing that this layer gave the ones before."""
        while len(self._unsettled) > but:
            for group in self._unsettled[0]:
                group.settle()
            self._unsettled.popleft()
