"""Staging for experts: those without a slot of their own pass through a slab that layers share.

Knows rows of a slab; neither layers nor files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


def already_computed() -> None:
    """Settles a group whose results are computed at once."""


@dataclass(eq=False)
class ExpertGroup:
    """Experts ids (n,), distinct, in rows (n,) of `slab`, valid until the next group is asked for.

    The caller computes all pairs of these experts. If it does so lazily it sets `settle` to a function that waits for
    the results: it is called before the rows are overwritten, maybe in a later call.
    """

    ids: np.ndarray
    rows: np.ndarray
    slab: Any
    settle: Callable[[], None] = already_computed


class ExpertStaging:
    """A slab of `rows` experts in two halves: one is computed while the other is read into.

    Every layer that shares it must have experts that fit the slab's rows.
    """

    def __init__(self, slab: Any, rows: int):
        self.slab = slab
        half = max(1, rows // 2)
        self.halves = [np.arange(half)] + ([np.arange(half, 2 * half)] if rows > 1 else [])
        self._using: list[list[ExpertGroup]] = [[] for _ in self.halves]
        self._turn = 0

    @property
    def experts(self) -> int:
        """How many are read at once."""
        return len(self.halves[0])

    def next(self, ids: np.ndarray) -> ExpertGroup:
        """Rows for these ids, at most `experts` of them: when it returns nothing reads these rows any more."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self.halves)
        for group in self._using[turn]:
            group.settle()
        group = ExpertGroup(ids, self.halves[turn][: len(ids)], self.slab)
        self._using[turn] = [group]
        return group
