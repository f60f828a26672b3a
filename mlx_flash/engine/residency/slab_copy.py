"""Copies bundles from one slab to another, whichever parts each of them holds. Knows bytes only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_flash.engine.storage.reader import Target


def copy_rows(
    source: Sequence[Target], source_rows: np.ndarray, target: Sequence[Target], target_rows: np.ndarray
) -> None:
    """Copy bundles `source_rows[k]` of one slab to `target_rows[k]` of another: every byte that both hold."""
    for to in target:
        end = to.offset + to.rows.shape[1]
        for at in source:
            low, high = max(to.offset, at.offset), min(end, at.offset + at.rows.shape[1])
            if low < high:
                rows = at.rows[source_rows, low - at.offset : high - at.offset]
                to.rows[target_rows, low - to.offset : high - to.offset] = rows


def clip_targets(targets: Sequence[Target], begin: int) -> list[Target]:
    """The same memory without the bundle's first `begin` bytes."""
    clipped = []
    for target in targets:
        skip = max(0, begin - target.offset)
        if skip < target.rows.shape[1]:
            clipped.append(Target(target.offset + skip, target.rows[:, skip:]))
    return clipped
