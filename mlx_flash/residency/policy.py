"""Which slots give way: pure functions on integers, no state, no I/O."""

from __future__ import annotations

import numpy as np


def least_recently_used(last_used: np.ndarray, protected: np.ndarray, count: int) -> np.ndarray:
    """The `count` slots used longest ago, none of them protected; of equal age the lowest slots.

    last_used (n,) int64 token numbers, protected (n,) bool -> (<= count,) slots; fewer when too few are free to go.
    """
    candidates = np.flatnonzero(~protected)
    if count >= len(candidates):
        return candidates
    order = np.argsort(last_used[candidates], kind="stable")
    return np.sort(candidates[order[:count]])
