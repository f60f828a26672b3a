"""The selector `all`: computes every bundle of every layer, reading those that are not resident. Any model, exact.

The hybrid baseline of "LLM in a flash", Table 2: part of each layer is resident, the rest is read for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNSpec, block_of
from mlx_flash.engine.residency.staging import BlockRequest
from mlx_flash.engine.storage.bundle import Layout

from .context import SharedContext, blocks, is_decode


class AllSelector:
    """Whole blocks from id 0 up are resident, fixed for the run; the rest streams through staging.

    `capacities` and `layouts` are those of all layers: the reads continue, in a circle, from this layer into the next
    ones and into the next token.
    """

    exact = True

    def __init__(
        self, layer: int, spec: FFNSpec, shared: SharedContext, capacities: Sequence[int], layouts: Sequence[Layout]
    ):
        self.layer, self.spec, self.shared = layer, spec, shared
        self.capacities, self.layouts = capacities, layouts
        self.capacity, self.count = capacities[layer], layouts[layer].count
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
        for first, length in blocks(self.capacity, self.count, block_of(self.spec.layout)):
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
        """Nothing to do: `loaded` becomes true after the read, and the slab never changes."""

    def _load_resident(self) -> None:
        if self.capacity and not self.loaded:
            ids = np.arange(self.capacity)
            self.shared.source.read(self.layer, ids, ids, self.slab.targets).wait()
            self.loaded = True

    def _circle(self) -> Iterator[BlockRequest]:
        """Every streamed block of every layer, from this layer on, without end."""
        layers = len(self.layouts)
        for step in count(self.layer):
            layer = step % layers
            layout = self.layouts[layer]
            for first, length in blocks(self.capacities[layer], layout.count, block_of(layout)):
                yield BlockRequest(layer, np.arange(first, first + length))
