"""Streams blocks of bundles through a ring of staging slabs: the next blocks are read while one is computed.

Owns the ring. The selector decides which blocks are read and computes from them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.engine.storage.reader import Pending
from mlx_flash.errors import ReadError


@dataclass(frozen=True, eq=False)
class BlockRequest:
    """Bundles of one layer that go together into one staging slab, row k for ids[k]."""

    layer: int
    ids: np.ndarray

    def same(self, layer: int, first_id: int) -> bool:
        return self.layer == layer and len(self.ids) > 0 and int(self.ids[0]) == first_id


Fetch = Callable[[BlockRequest, Any], Pending]


class BlockStream:
    """Reads blocks in a fixed order into all staging slabs but the one in use. `take` and `release` alternate.

    slabs: the ring. Where layers have bundles of different layouts, others[k] has one slab beside each of `slabs`, for
    layers of kind k + 1; kinds: the kind of each layer, 0 for `slabs`.

    An exception other than ReadError (Ctrl-C) leaves reads under way, also some that are not in the ring: drain the
    reader, then `stop`.
    """

    def __init__(self, slabs: list[Any], others: Sequence[list[Any]] = (), kinds: Sequence[int] = ()):
        self.slabs = slabs
        self._rings, self._kinds = [slabs, *others], kinds
        self._place = {id(slab): place for ring in self._rings for place, slab in enumerate(ring)}
        self._fetch: Fetch | None = None
        self._free = list(range(len(slabs)))
        self._coming: deque[tuple[BlockRequest, Any, Pending]] = deque()
        self._wanted: Iterator[BlockRequest] = iter(())

    def start(self, wanted: Iterable[BlockRequest], fetch: Fetch) -> None:
        """Drop the blocks under way, and read these blocks in this order, each by `fetch` into a staging slab."""
        self.stop()
        self._fetch = fetch
        self._wanted = iter(wanted)
        self._fill()

    def stop(self) -> None:
        """Wait for the reads in flight and drop their blocks; all slabs are free afterwards."""
        while self._coming:
            with suppress(ReadError):  # dropped: the next read of it fails again
                self._coming[0][2].wait()
            self._coming.popleft()  # not before the wait, which may be interrupted
        self._free = list(range(len(self.slabs)))
        self._wanted = iter(())
        self._fetch = None  # a selector's method: held, it would keep the slabs of a model that was dropped

    def next_is(self, layer: int, first_id: int) -> bool:
        """Whether the next block is under way and begins with this bundle."""
        return bool(self._coming) and self._coming[0][0].same(layer, first_id)

    def take(self) -> tuple[BlockRequest, Any]:
        """The next block, once it is there. A ReadError stops the stream: `start` begins anew."""
        request, slab, pending = self._coming[0]
        try:
            pending.wait()
        except ReadError:
            self.stop()
            raise
        self._coming.popleft()
        return request, slab

    def release(self, slab: Any) -> None:
        """The block has been computed: read the next one into its slab."""
        self._free.append(self._place[id(slab)])
        self._fill()

    def _fill(self) -> None:
        while self._free:
            request = next(self._wanted, None)
            if request is None:
                return
            slab = self._rings[self._kinds[request.layer] if self._kinds else 0][self._free.pop()]
            assert self._fetch is not None
            # If this is interrupted the slab is in neither list: it may be half submitted, so nobody may have it.
            self._coming.append((request, slab, self._fetch(request, slab)))
