"""The decoding step of all selectors that name neurons per token: find their bundles in slots or read them, and sum.

A token's output depends on the ids alone, never on what is resident. A prompt activates almost every neuron,
so it streams whole blocks, exactly, and fills the slots on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass, FFNSpec, Fired, Slab, block_of
from mlx_flash.engine.residency.slab_copy import clip_targets, copy_rows
from mlx_flash.engine.residency.slot_loader import SlotLoader
from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.residency.staging import BlockRequest
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.bundle_weights import wide_rows
from mlx_flash.engine.storage.reader import Done, Pending, Target

from .context import SharedContext, blocks, is_decode
from .look_ahead import LookAhead


@dataclass(frozen=True)
class LayerSetup:
    """What the selector of one layer is made from. look_ahead: prefetches for this layer and the next one, or None."""

    layer: int
    spec: FFNSpec
    shared: SharedContext
    residency: Residency
    look_ahead: LookAhead | None = None


class SparseSelector(ABC):
    """One layer: `loader` holds some bundles in slots; `fixed`, if any, holds the leading part of all of them.

    fixed: the part's name; decode_spec: what decoding computes, where that is not what a prompt computes.
    """

    exact = False

    def __init__(self, setup: LayerSetup, fixed: str | None = None, decode_spec: FFNSpec | None = None):
        self.layer, self.spec, self.shared = setup.layer, setup.spec, setup.shared
        self.look_ahead, self.decode_spec = setup.look_ahead, decode_spec or setup.spec
        layout, backend = setup.spec.layout, setup.shared.backend
        self.count, self.neurons, self.block = layout.count, layout.neurons, block_of(layout)
        self.fixed = backend.slab(layout, self.count, layout.parts_of(fixed)) if fixed else None
        self.skipped_bytes = layout.matrix_bytes(fixed) if fixed and fixed == layout.matrices[0] else 0
        self.loaded = False  # whether `fixed` has been read
        self.slab = backend.slab(layout, setup.residency.capacity, slot_parts(layout, fixed))
        self.loader = SlotLoader(self.layer, setup.residency, self.slab.targets, self.shared.source)
        if self.look_ahead is not None:
            self.look_ahead.add(self.loader)

    @property
    def residency(self) -> Residency:
        """Which bundle is in which slot."""
        return self.loader.residency

    @abstractmethod
    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        """The ids that a decoding step computes, ascending (n,)."""

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        """Which ids from `first` on decoding would have used for each token of a prompt, (T, n) bool; h: the scalars of
        their neurons, (T, n * neurons)."""
        return h != 0

    def prompt_block(self, first: int, h: np.ndarray, staging: Slab) -> None:  # noqa: B027
        """Learn from a block of a prompt's chunk: scalars (T, n) of the neurons of ids first.. , in rows 0.. of
        `staging`."""

    def __call__(self, x: Any) -> Any:
        self.shared.begin(self)
        if self.fixed is not None and not self.loaded:
            ids = np.arange(self.count)
            self.shared.source.read(self.layer, ids, ids, self.fixed.targets).wait()
            self.loaded = True
        result = self._decode(x) if self.is_decode(x) else self._prefill(x)
        self.shared.end()
        return result

    def is_decode(self, x: Any) -> bool:
        """Whether the tokens of x (..., T, d) are computed from the chosen ids alone."""
        return is_decode(x) if self.exact else self.shared.is_decode(x)

    def forget(self) -> None:
        """The slots hold unknown bytes."""
        self.loader.forget()
        if self.look_ahead is not None:
            self.look_ahead.forget()

    def _decode(self, x: Any) -> Any:
        loader, stats = self.loader, self.shared.stats
        work = self.shared.backend.ffn(self.decode_spec, x)
        ids = self.choose(x, work)
        right = 0
        if self.look_ahead is not None:
            self.look_ahead.prepare(self.layer + 1, x)
            right = loader.count_arriving(ids)
            stats.guessed_right += right
            loader.land_ended()
        plan = loader.plan(ids)
        stats.hits += len(plan.hits) - right
        stats.misses += len(plan.ids) - len(plan.hits) + right
        used = self._add(work, plan, x)
        loader.residency.commit(plan, used)
        loader.add_step([work])
        return work.result()

    def _add(self, work: FFNPass, plan: SlotPlan, x: Any) -> np.ndarray | None:
        """Add the terms of the step's ids; returns which of them fired, where the backend knows."""
        ids, slots, loader = plan.ids, plan.slots, self.loader
        loader.make_room(plan)
        # Hits are computed while misses are read, and while what follows is planned: h_i needs no other neuron, and
        # a block's sum none of another block.
        pending = loader.read(plan, plan.loads)
        if len(plan.overflow):
            return self._add_spans(work, plan, pending)
        here, late = plan.hits, plan.loads
        if loader.prefetches:
            arriving = loader.arriving[slots[here]]
            here, late = here[~arriving], np.concatenate([here[arriving], late])
        found = [self._scalars(work, plan, here, ids[late])]
        if self.look_ahead is not None:
            self.look_ahead.guess(self.layer + 1, x)
        loader.finish()
        pending.wait()
        found.append(self._scalars(work, plan, late))
        if self.look_ahead is not None:
            self.look_ahead.advance()
        work.down()
        return which_fired(len(ids), found)

    def _add_spans(self, work: FFNPass, plan: SlotPlan, pending: Pending) -> np.ndarray | None:
        """The same where there are not enough slots: some of the ids pass through staging, in order."""
        ids, slots = plan.ids, plan.slots
        spans, found = list(overflow_spans(ids, plan.overflow, self.block)), []
        self.shared.stream.start((BlockRequest(self.layer, ids[span.overflow]) for span in spans), self._fetch_missing)
        self.loader.finish()
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
        """Begin to compute the ids at these positions, which lie in slots; `late` ids come after them."""
        if not len(positions):
            return positions, lambda: np.empty(0, bool)
        return positions, work.scalars(plan.ids[positions], self.slab, plan.slots[positions], late)

    def _fetch_missing(self, request: BlockRequest, staging: Slab) -> Pending:
        """Read bundles without a slot, but for the part that is resident."""
        targets = clip_targets(staging.targets, self.skipped_bytes)
        return self.shared.source.read(request.layer, request.ids, np.arange(len(request.ids)), targets)

    def _prefill(self, x: Any) -> Any:
        self.loader.land()
        requests = (BlockRequest(self.layer, np.arange(f, f + n)) for f, n in blocks(0, self.count, self.block))
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
            rows = np.arange(length)
            self.loader.warm(first + rows, self.uses(first, h), staging.targets, rows)
            self.shared.stream.release(staging)
        return work.result()

    def _fetch_block(self, request: BlockRequest, staging: Slab) -> Pending:
        """Fill a staging slab from the slots where all its bundles are resident, else from disk."""
        if not self.loader.copy_out(request.ids, staging.targets):
            return self.shared.fetch(request, staging)
        if self.fixed is not None:
            copy_rows(self.fixed.targets, request.ids, staging.targets, np.arange(len(request.ids)))
        return Done()


@dataclass(frozen=True)
class Span:
    """Positions `first..last` of a step's ids, whole blocks, of which `overflow` (positions) stream through staging."""

    first: int
    last: int
    overflow: np.ndarray

    def resident(self, slots: np.ndarray) -> np.ndarray:
        """The positions of those that have slots."""
        return self.first + np.flatnonzero(slots[self.first : self.last] >= 0)


def overflow_spans(ids: np.ndarray, overflow: np.ndarray, block: int) -> Iterator[Span]:
    """Cut a step's ids (ascending) at block borders so that the overflow of each span fits one staging slab of
    `block` rows. Nothing when there is no overflow."""
    if not len(overflow):
        return
    borders = np.flatnonzero(np.diff(ids // block)) + 1
    ends = [*borders.tolist(), len(ids)]
    begin = taken = 0
    previous = 0
    for end in ends:
        upto = int(np.searchsorted(overflow, end))
        if upto - taken > block:
            cut = int(np.searchsorted(overflow, previous))
            yield Span(begin, previous, overflow[taken:cut])
            begin, taken = previous, cut
        previous = end
    yield Span(begin, len(ids), overflow[taken:])


def which_fired(count: int, found: Sequence[tuple[np.ndarray, Fired | None]]) -> np.ndarray | None:
    """(count,) bool: which of a step's ids fired, from what is known of some positions each; all others count as fired.
    None where a part is not known."""
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
