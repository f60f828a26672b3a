"""Counters of one run: what was read, what was found in memory. Owned by the generating thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Stats:
    """Counts since `reset`.

    bytes_read, reads: from the disk; wait_s: seconds that the generating thread waited for them
    hits, misses: bundles that decoding steps asked for, and that were in memory, or not
    guessed, guessed_right: bundles that were read ahead, and those of them that were asked for afterwards
    """

    bytes_read: int = 0
    reads: int = 0
    wait_s: float = 0.0
    hits: int = 0
    misses: int = 0
    guessed: int = 0
    guessed_right: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the bundles asked for that were resident; 1.0 when none was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def reset(self) -> None:
        for field in fields(self):
            setattr(self, field.name, field.default)

    def add(self, other: Stats) -> None:
        """Add another one's counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.wait_s += time.perf_counter() - begin
