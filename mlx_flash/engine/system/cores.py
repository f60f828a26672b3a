"""How many threads arithmetic uses."""

from __future__ import annotations

import os

MOST_THREADS = 8  # memory is the limit: more threads than this add little


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Threads that a kernel or a product uses unless told otherwise."""
    return min(available_cores(), MOST_THREADS)
