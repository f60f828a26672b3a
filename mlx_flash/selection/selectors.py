"""Which bundles a step needs, and the order in which they are computed and read: one class per selector.

`AllSelector` and `GateSelector` are exact. Both run one layer's FFN on a backend's pass; neither knows which backend.
A token's output depends on the selector alone, never on how many bundles are resident (DESIGN 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ..backends.base import BLOCK, Backend, FFNPass, FFNSpec, Slab
from ..residency.residency import Plan, Residency
from ..residency.rows import clip_targets, copy_rows
from ..residency.stream import BlockStream, Request
from ..stats import Stats
from ..storage.reader import Done, Pending, Reader, ReadReport, Target


@dataclass
class Shared:
    """What the layers of one model have in common: one reader, one ring of staging slabs, one set of counters."""

    backend: Backend
    reader: Reader
    stream: BlockStream
    stats: Stats
    unfinished: AllSelector | GateSelector | None = None  # whose call is under way, or was when it was interrupted

    def begin(self, selector: AllSelector | GateSelector) -> None:
        """Before a call: clean up after one that raised. Here, not in an `except`, which a second Ctrl-C would cut
        short; the same interrupt can hit here, and the next call begins again."""
        if self.unfinished is not None:
            self.reader.drain()  # first: what is still being read must not land in memory that is given anew
            self.stream.stop()
            self.unfinished.forget()
        self.unfinished = selector

    def end(self) -> None:
        self.unfinished = None

    def read(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        if not len(ids):
            return Done()
        return Counted(self.reader.submit(layer, ids, rows, targets), self.stats)

    def fetch(self, request: Request, slab: Slab) -> Pending:
        """Fill a staging slab: row k holds bundle ids[k]."""
        return self.read(request.layer, request.ids, np.arange(len(request.ids)), slab.targets)


class Counted:
    """A read whose bytes are counted once, when it has ended."""

    def __init__(self, pending: Pending, stats: Stats):
        self._pending, self._stats, self._counted = pending, stats, False

    def wait(self) -> ReadReport:
        with self._stats.waiting():
            report = self._pending.wait()
        if not self._counted:
            self._counted = True
            self._stats.bytes_read += report.bytes
            self._stats.reads += report.reads
        return report


def blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """(first id, length) of the fixed blocks of ids from `first` (a multiple of BLOCK) to `last`."""
    for begin in range(first, last, BLOCK):
        yield begin, min(BLOCK, last - begin)


def is_decode(x: Any) -> bool:
    """One new token per sequence: x is (..., 1, d)."""
    return x.shape[-2] == 1


class AllSelector:
    """Every bundle: whole blocks from id 0 up are resident, fixed for the run, the rest streams through staging.

    `capacities` and `counts` are those of every layer: the reads go on, in a circle, from this layer into the next
    ones and into the next token.
    """

    def __init__(self, layer: int, spec: FFNSpec, shared: Shared, capacities: Sequence[int], counts: Sequence[int]):
        self.layer, self.spec, self.shared = layer, spec, shared
        self.capacities, self.counts = capacities, counts
        self.capacity, self.count = capacities[layer], counts[layer]
        names = [part.name for part in spec.layout.parts]
        self.slab = shared.backend.slab(spec.layout, self.capacity, names)
        self.loaded = False

    def __call__(self, x: Any) -> Any:
        self.shared.begin(self)
        streamed = self.capacity < self.count
        if streamed and not self.shared.stream.next_is(self.layer, self.capacity):
            self.shared.stream.start(self._circle(), self.shared.fetch)
        self._load_resident()
        work = self.shared.backend.ffn(self.spec, x)
        if self.capacity:
            work.dense(self.slab, 0, 0, self.capacity)
        for first, length in blocks(self.capacity, self.count):
            _, staging = self.shared.stream.take()
            work.dense(staging, 0, first, length)
            work.settle()
            self.shared.stream.release(staging)
        if is_decode(x):
            self.shared.stats.hits += self.capacity
            self.shared.stats.misses += self.count - self.capacity
        result = work.result()
        self.shared.end()
        return result

    def forget(self) -> None:
        """A call was cut short: nothing to do, `loaded` becomes true after the read and the slab never changes."""

    def _load_resident(self) -> None:
        if self.capacity and not self.loaded:
            ids = np.arange(self.capacity)
            self.shared.read(self.layer, ids, ids, self.slab.targets).wait()
            self.loaded = True

    def _circle(self) -> Iterator[Request]:
        """Every streamed block of every layer, from this layer on, for ever."""
        layers = len(self.counts)
        for step in count(self.layer):
            layer = step % layers
            for first, length in blocks(self.capacities[layer], self.counts[layer]):
                yield Request(layer, np.arange(first, first + length))


class GateSelector:
    """ReLU models: all gate rows (up rows where there is no gate) are resident and say which neurons fire; only
    the other parts of those that do are read. Exact: a neuron that does not fire adds nothing.

    A prompt activates almost every neuron, so it streams whole blocks (DESIGN 9) and warms the slots on the way.
    """

    def __init__(self, layer: int, spec: FFNSpec, shared: Shared, capacity: int):
        self.layer, self.spec, self.shared = layer, spec, shared
        self.count = spec.layout.count
        names = [part.name for part in spec.layout.parts]
        self.gate_slab = shared.backend.slab(spec.layout, self.count, names[:1])
        self.slab = shared.backend.slab(spec.layout, capacity, names[1:])
        self.residency = Residency(self.count, capacity)
        self.loaded = False

    def __call__(self, x: Any) -> Any:
        self.shared.begin(self)
        if not self.loaded:
            ids = np.arange(self.count)
            self.shared.read(self.layer, ids, ids, self.gate_slab.targets).wait()
            self.loaded = True
        result = self._decode(x) if is_decode(x) else self._prefill(x)
        self.shared.end()
        return result

    def forget(self) -> None:
        """A call was cut short, by a failed read or an interrupt: the slots hold unknown bytes."""
        self.residency.reset()

    def _decode(self, x: Any) -> Any:
        work = self.shared.backend.ffn(self.spec, x)
        plan = self.residency.plan(work.gate(self.gate_slab))
        self.shared.stats.hits += len(plan.hits)
        self.shared.stats.misses += len(plan.ids) - len(plan.hits)
        self._add_fired(work, plan)
        return work.result()

    def _add_fired(self, work: FFNPass, plan: Plan) -> None:
        ids, slots = plan.ids, plan.slots
        self.residency.evict(plan)
        pending = self.shared.read(self.layer, ids[plan.loads], slots[plan.loads], self.slab.targets)
        spans = list(overflow_spans(ids, plan.overflow))
        if spans:
            self.shared.stream.start((Request(self.layer, ids[span.overflow]) for span in spans), self._fetch_fired)
        # Hits are computed while misses are read: h_i needs no other neuron.
        if not spans:
            self._scalars(work, plan, plan.hits)
        pending.wait()
        self.residency.commit(plan)
        if not spans:
            self._scalars(work, plan, plan.loads)
            work.down()
        for span in spans:
            self._scalars(work, plan, span.resident(slots))
            _, staging = self.shared.stream.take()
            work.scalars(ids[span.overflow], staging, np.arange(len(span.overflow)))
            work.down()
            work.settle()
            self.shared.stream.release(staging)

    def _scalars(self, work: FFNPass, plan: Plan, positions: np.ndarray) -> None:
        if len(positions):
            work.scalars(plan.ids[positions], self.slab, plan.slots[positions])

    def _fetch_fired(self, request: Request, staging: Slab) -> Pending:
        """Neurons that fire but have no slot: all but the gate part, which is resident."""
        targets = clip_targets(staging.targets, self.spec.layout.parts[0].nbytes)
        return self.shared.read(request.layer, request.ids, np.arange(len(request.ids)), targets)

    def _prefill(self, x: Any) -> Any:
        last = self.shared.backend.ffn(self.spec, x[..., -1:, :]).gate(self.gate_slab)
        fires = np.zeros(self.count, bool)
        fires[last] = True
        requests = (Request(self.layer, np.arange(f, f + n)) for f, n in blocks(0, self.count))
        self.shared.stream.start(requests, self._fetch_block)
        work = self.shared.backend.ffn(self.spec, x)
        for first, length in blocks(0, self.count):
            _, staging = self.shared.stream.take()
            work.dense(staging, 0, first, length)
            work.settle()
            self._keep(first, length, fires, staging)
            self.shared.stream.release(staging)
        return work.result()

    def _fetch_block(self, request: Request, staging: Slab) -> Pending:
        """From memory where all its bundles are resident, else from disk."""
        slots = self.residency.slot_of[request.ids]
        if (slots < 0).any():
            return self.shared.fetch(request, staging)
        rows = np.arange(len(request.ids))
        copy_rows(self.gate_slab.targets, request.ids, staging.targets, rows)
        copy_rows(self.slab.targets, slots, staging.targets, rows)
        return Done()

    def _keep(self, first: int, length: int, fires: np.ndarray, staging: Slab) -> None:
        """Warm the slots from a block in staging: any of its bundles while slots are free, then those that the
        last token fired."""
        ids = np.arange(first, first + length)
        missing = self.residency.slot_of[ids] < 0
        wanted = ids[missing & fires[ids]]
        spare = ids[missing & ~fires[ids]][: max(0, self.residency.free - len(wanted))]
        wanted = np.sort(np.concatenate([wanted, spare]))
        plan = self.residency.plan(wanted)
        if len(plan.loads):
            self.residency.evict(plan)
            loaded = plan.ids[plan.loads]
            copy_rows(staging.targets, loaded - first, self.slab.targets, plan.slots[plan.loads])
            self.residency.commit(plan)


@dataclass(frozen=True)
class Span:
    """Positions `first..last` of a step's ids, whole blocks, of which `overflow` (positions) stream through staging."""

    first: int
    last: int
    overflow: np.ndarray

    def resident(self, slots: np.ndarray) -> np.ndarray:
        return self.first + np.flatnonzero(slots[self.first : self.last] >= 0)


def overflow_spans(ids: np.ndarray, overflow: np.ndarray) -> Iterator[Span]:
    """Cut a step's ids (ascending) at block borders so that the overflow of each span fits one staging slab of
    BLOCK rows. Nothing when there is no overflow."""
    if not len(overflow):
        return
    borders = np.flatnonzero(np.diff(ids // BLOCK)) + 1
    ends = [*borders.tolist(), len(ids)]
    begin = taken = 0
    previous = 0
    for end in ends:
        upto = int(np.searchsorted(overflow, end))
        if upto - taken > BLOCK:
            cut = int(np.searchsorted(overflow, previous))
            yield Span(begin, previous, overflow[taken:cut])
            begin, taken = previous, cut
        previous = end
    yield Span(begin, len(ids), overflow[taken:])
