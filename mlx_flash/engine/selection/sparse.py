"""The step that all selectors share which name bundles token by token: find them in slots or read them, and sum.

A token's output depends on the ids alone, never on what is resident (DESIGN 2). A prompt activates almost every
neuron, so it streams whole blocks, exactly, and warms the slots on the way (DESIGN 9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_flash.engine.backends.base import FFNPass, FFNSpec, Fired, Slab, block_of
from mlx_flash.engine.residency.slab_copy import clip_targets, copy_rows
from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.residency.staging import Request
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.bundle_weights import wide_rows
from mlx_flash.engine.storage.reader import Done, Pending, Target

from .context import SharedContext, blocks, is_decode
from .look_ahead import LookAhead
from .overflow import overflow_spans

AHEAD = 2  # steps that a lazy backend may leave uncomputed while nothing is read: mlx-lm's loop is one ahead


class Ahead(NamedTuple):
    """What is being read before it was asked for, into slots that count as filled. mask (capacity + 1,) bool: these
    slots; its last item is for those that have none, -1."""

    slots: np.ndarray
    mask: np.ndarray
    pending: Pending


class SparseSelector(ABC):
    """One layer: `slots` hold `parts` of `capacity` bundles; `fixed`, if any, holds the leading part of all of them.

    decode_spec: what decoding computes, where that is not what the prompt computes.
    """

    exact = False

    def __init__(
        self,
        layer: int,
        spec: FFNSpec,
        shared: SharedContext,
        residency: Residency,
        look_ahead: LookAhead | None = None,
        fixed: str | None = None,
        decode_spec: FFNSpec | None = None,
    ):
        self.layer, self.spec, self.shared = layer, spec, shared
        self.decode_spec = decode_spec or spec
        self.residency, self.look_ahead = residency, look_ahead
        self.count, self.neurons, self.block = spec.layout.count, spec.layout.neurons, block_of(spec.layout)
        layout = spec.layout
        self.fixed = shared.backend.slab(layout, self.count, layout.parts_of(fixed)) if fixed else None
        self.skipped_bytes = layout.matrix_bytes(fixed) if fixed and fixed == layout.matrices[0] else 0
        self.slab = shared.backend.slab(layout, residency.capacity, slot_parts(layout, fixed))
        self.loaded = False
        self._ahead: Ahead | None = None
        self._unsettled: deque[FFNPass] = deque()  # the last decoding steps, which may still be reading slots
        if look_ahead is not None:
            look_ahead.add(self)

    @abstractmethod
    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        """The ids that a decoding step computes, ascending (n,)."""

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        """What a prompt's block tells of what decoding will use, (T, n) bool; h: the scalars of the neurons of ids
        first.. , (T, n * neurons)."""
        return h != 0

    def prompt_block(self, first: int, h: np.ndarray, staging: Slab) -> None:  # noqa: B027
        """A block of a prompt's chunk: scalars (T, n) of the neurons of ids first.. , in rows 0.. of `staging`."""

    def __call__(self, x: Any) -> Any:
        self.shared.begin(self)
        if self.fixed is not None and not self.loaded:
            ids = np.arange(self.count)
            self.shared.read(self.layer, ids, ids, self.fixed.targets).wait()
            self.loaded = True
        result = self._decode(x) if self.is_decode(x) else self._prefill(x)
        self.shared.end()
        return result

    def is_decode(self, x: Any) -> bool:
        return is_decode(x) if self.exact else self.shared.is_decode(x)

    def forget(self) -> None:
        """The slots hold unknown bytes."""
        self.residency.reset()
        self._ahead = None
        if self.look_ahead is not None:
            self.look_ahead.forget()

    def read_ahead(self, ids: np.ndarray) -> int:
        """Begin to read those of `ids` (n,), ascending, that are missing; returns how many. None that is resident
        gives way."""
        self._finish_ahead()
        plan = self.residency.plan(ids)
        if not len(plan.loads):
            return 0
        slots, mask = plan.slots[plan.loads], np.zeros(self.residency.capacity + 1, bool)
        mask[slots] = True
        self._ahead = Ahead(slots, mask, Done())  # whatever interrupts this: `forget_ahead` then knows of it
        self._settle()  # what they hold may not have been used yet
        self.residency.evict(plan)
        self._ahead = Ahead(slots, mask, self.shared.read(self.layer, ids[plan.loads], slots, self.slab.targets))
        self.residency.place(plan)
        return len(slots)

    def ahead_ended(self) -> bool:
        """Whether all that is being read ahead has come; reads that wait for their turn go on."""
        return self._ahead is not None and self._ahead.pending.ended()

    def forget_ahead(self) -> None:
        """What was being read ahead may not have come."""
        if self._ahead is not None:
            self.residency.reset()
            self._ahead = None

    def _finish_ahead(self) -> None:
        """Wait for what is being read ahead. A read that failed is raised here, needed or not: the call is cut short,
        and the slots are forgotten."""
        if self._ahead is not None:
            self._ahead.pending.wait()
            self._ahead = None

    def _decode(self, x: Any) -> Any:
        shared = self.shared
        work = shared.backend.ffn(self.decode_spec, x)
        ids = self.choose(x, work)
        if self.look_ahead is not None:
            self.look_ahead.prepare(self.layer + 1, x)
        right = self._guessed_right(ids)
        if self.ahead_ended():
            self._finish_ahead()
        plan = self.residency.plan(ids, keep=None if self._ahead is None else self._ahead.slots)
        if shared.recorder is not None:
            shared.recorder(self.layer, plan.ids)
        shared.stats.hits += len(plan.hits) - right
        shared.stats.misses += len(plan.ids) - len(plan.hits) + right
        used = self._add(work, plan, x)
        self.residency.commit(plan, used)
        self._unsettled.append(work)
        self._settle(AHEAD)
        return work.result()

    def _guessed_right(self, ids: np.ndarray) -> int:
        """How many of `ids` are being read ahead, which is counted."""
        if self._ahead is None:
            return 0
        right = int(self._ahead.mask[self.residency.slot_of[ids]].sum())
        self.shared.stats.guessed_right += right
        return right

    def _settle(self, but: int = 0) -> None:
        """Wait until the decoding steps before the last `but` no longer need their slots. A lazy backend may not have
        computed them, if the caller feeds known tokens: those need nothing that this layer gave the ones before."""
        while len(self._unsettled) > but:
            self._unsettled[0].settle()
            self._unsettled.popleft()

    def _add(self, work: FFNPass, plan: SlotPlan, x: Any) -> np.ndarray | None:
        """Add the terms of the step's ids; returns which of them fired, where the backend knows."""
        ids, slots = plan.ids, plan.slots
        if len(plan.loads):
            self._settle()  # what they hold may not have been used yet
        self.residency.evict(plan)
        here, late = plan.hits, plan.loads
        if self._ahead is not None:
            coming = self._ahead.mask[slots[here]]
            here, late = here[~coming], np.concatenate([here[coming], late])
        if len(plan.overflow):
            return self._add_spans(work, plan)
        # Hits are computed while misses are read, and while what follows is planned: h_i needs no other neuron, and
        # a block's sum none of another block.
        pending = self.shared.read(self.layer, ids[plan.loads], slots[plan.loads], self.slab.targets)
        found = [self._scalars(work, plan, here, ids[late])]
        if self.look_ahead is not None:
            self.look_ahead.guess(self.layer + 1, x)
        self._finish_ahead()
        pending.wait()
        found.append(self._scalars(work, plan, late))
        if self.look_ahead is not None:
            self.look_ahead.go_on()
        work.down()
        return which_fired(len(ids), found)

    def _add_spans(self, work: FFNPass, plan: SlotPlan) -> np.ndarray | None:
        """The same where there are not enough slots: some of the ids pass through staging, in order."""
        ids, slots = plan.ids, plan.slots
        pending = self.shared.read(self.layer, ids[plan.loads], slots[plan.loads], self.slab.targets)
        spans, found = list(overflow_spans(ids, plan.overflow, self.block)), []
        self.shared.stream.start((Request(self.layer, ids[span.overflow]) for span in spans), self._fetch_missing)
        self._finish_ahead()
        pending.wait()
        for span in spans:
            found.append(self._scalars(work, plan, span.resident(slots)))
            _, staging = self.shared.stream.take()
            work.scalars(ids[span.overflow], staging, np.arange(len(span.overflow)))
            work.down()
            work.settle()
            self.shared.stream.release(staging)
        return which_fired(len(ids), found)

    def _scalars(
        self, work: FFNPass, plan: SlotPlan, positions: np.ndarray, late: np.ndarray | None = None
    ) -> tuple[np.ndarray, Fired | None]:
        """Begin to compute what lies in slots: the ids at these positions; `late` ids come after them."""
        if not len(positions):
            return positions, lambda: np.empty(0, bool)
        return positions, work.scalars(plan.ids[positions], self.slab, plan.slots[positions], late)

    def _fetch_missing(self, request: Request, staging: Slab) -> Pending:
        """Bundles without a slot, but for the part that is resident."""
        targets = clip_targets(staging.targets, self.skipped_bytes)
        return self.shared.read(request.layer, request.ids, np.arange(len(request.ids)), targets)

    def _prefill(self, x: Any) -> Any:
        self._finish_ahead()
        requests = (Request(self.layer, np.arange(f, f + n)) for f, n in blocks(0, self.count, self.block))
        self.shared.stream.start(requests, self._fetch_block)
        work = self.shared.backend.ffn(self.spec, x)
        tokens = int(np.prod(x.shape[:-1]))
        memory = self.shared.prompt_scalars(tokens * min(self.block, self.count) * self.neurons)
        self.residency.begin_prompt(tokens)
        for first, length in blocks(0, self.count, self.block):
            _, staging = self.shared.stream.take()
            h = memory[: tokens * length * self.neurons].reshape(tokens, -1)
            work.dense(staging, 0, first, length, h)
            work.settle()
            self.prompt_block(first, h, staging)
            self._keep(first, self.uses(first, h), staging)
            self.shared.stream.release(staging)
        return work.result()

    def _fetch_block(self, request: Request, staging: Slab) -> Pending:
        """From memory where all its bundles are resident, else from disk."""
        slots = self.residency.slot_of[request.ids]
        if (slots < 0).any():
            return self.shared.fetch(request, staging)
        rows = np.arange(len(request.ids))
        if self.fixed is not None:
            copy_rows(self.fixed.targets, request.ids, staging.targets, rows)
        copy_rows(self.slab.targets, slots, staging.targets, rows)
        return Done()

    def _keep(self, first: int, used: np.ndarray, staging: Slab) -> None:
        """Warm the slots with what of a block in staging is worth one."""
        ids = np.arange(first, first + used.shape[1])
        self._place(ids, used, staging, ids - first)

    def _place(self, ids: np.ndarray, used: np.ndarray, staging: Slab, rows: np.ndarray) -> None:
        """Give slots to those of `ids` (n,), in `rows` of staging, that are worth one; used (T, n) bool."""
        plan = self.residency.warm(ids, used)
        if len(plan.loads):
            self._settle()  # what they hold may not have been used yet
            self.residency.evict(plan)
            loaded = rows[np.searchsorted(ids, plan.ids[plan.loads])]
            copy_rows(staging.targets, loaded, self.slab.targets, plan.slots[plan.loads])
            self.residency.place(plan)


def which_fired(count: int, found: Sequence[tuple[np.ndarray, Fired | None]]) -> np.ndarray | None:
    """(count,) bool, from what is known of some positions each; all others count as fired. None where a part is not
    known."""
    fired = np.ones(count, bool)
    for positions, which in found:
        if which is None:
            return None
        fired[positions] = which()
    return fired


def top(values: np.ndarray, fraction: float) -> np.ndarray:
    """The ids of the largest `fraction` of values (count,), at least one, ascending; of equal ones the lowest ids."""
    kept = max(1, round(fraction * len(values)))
    return np.sort(np.argsort(-values, kind="stable")[:kept])


def part_rows(slab: Slab, layout: Layout, name: str, rows: int) -> np.ndarray:
    """A matrix' rows of the neurons in a slab's first rows, (rows * neurons, d) fp32: a copy, whatever the backend."""
    whole = np.empty((rows, layout.matrix_bytes(name)), np.uint8)
    copy_rows(slab.targets, np.arange(rows), [Target(layout.offset(name), whole)], np.arange(rows))
    return wide_rows(whole, layout, name)


def slot_parts(layout: Layout, fixed: str | None) -> list[str]:
    """The parts that a slot holds when matrix `fixed` is resident for all bundles: a slab's parts follow each other, so
    what lies between others stays in the slots too."""
    left_out = layout.parts_of(fixed) if fixed and fixed == layout.matrices[0] else []
    return [part.name for part in layout.parts if part.name not in left_out]
