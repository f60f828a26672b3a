"""A step whose bundles do not all have slots, cut into spans that staging can hold. Integers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """Positions `first..last` of a step's ids, whole blocks, of which `overflow` (positions) stream through staging."""

    first: int
    last: int
    overflow: np.ndarray

    def resident(self, slots: np.ndarray) -> np.ndarray:
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
