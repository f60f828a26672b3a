"""`Residency.plan` in one compiled call, for what a decoding step asks of every layer. Importing compiles nothing.

The same integers as in `slots.py` and `window.py`, which say what they mean; here only for policies that rank by
worth alone, without windows and pins.
"""

from __future__ import annotations

import numpy as np

from mlx_flash.engine.numerics.compile_cache import compiled


@compiled
def find_places(ids, slot_of, id_of, used, score, base, gain, keep, slots, positions):  # type: ignore[no-untyped-def]
    """Fill `slots` (n,) with where each of `ids` (n,) is or goes, -1 where it finds no room, and `positions` (n,) with
    those of the hits, then of the loads, then of the overflow, each ascending; returns how many the first two are.

    used: slots 0.. that are filled; score, base: the worth of id i is score[i] + gain * base[i] (base may be empty);
    keep (k,): slots that stay as they are
    """
    capacity, begin, spared, hits = len(id_of), used, 0, 0
    stays = np.zeros(capacity, np.bool_)
    for k in range(len(ids)):
        slot = slot_of[ids[k]]
        slots[k] = slot
        if slot >= 0:
            positions[hits] = k
            hits += 1
            if slot < used and not stays[slot]:
                stays[slot] = True
                spared += 1
    missing = len(ids) - hits
    if not missing:
        return hits, 0
    for slot in keep:
        begin = max(begin, slot + 1)
        if 0 <= slot < used and not stays[slot]:
            stays[slot] = True
            spared += 1
    fresh = min(capacity - begin, missing)
    room = max(0, min(missing - fresh, used - spared))
    worth, at = np.empty(used - spared), 0
    for slot in range(used):
        if not stays[slot]:
            worth[at] = worth_of(id_of[slot], score, base, gain)
            at += 1
    limit, equals = least(worth, room)
    free, found, at = np.empty(room + fresh, np.int64), 0, 0
    for slot in range(used):
        if not stays[slot]:
            if found < room and (worth[at] < limit or (worth[at] == limit and equals > 0)):
                equals -= worth[at] == limit
                free[found] = slot
                found += 1
            at += 1
    for k in range(fresh):
        free[room + k] = begin + k
    return hits, give(ids, slots, positions, hits, free, score, base, gain)


@compiled
def give(ids, slots, positions, hits, free, score, base, gain):  # type: ignore[no-untyped-def]
    """Give the `free` slots to the missing ids, those worth least going without; returns how many get one."""
    missing = np.empty(len(ids) - hits, np.int64)
    at = 0
    for k in range(len(ids)):
        if slots[k] < 0:
            missing[at] = k
            at += 1
    over = len(missing) - len(free)
    worth = np.empty(len(missing) if over else 0)
    for k in range(len(worth)):
        worth[k] = worth_of(ids[missing[k]], score, base, gain)
    limit, equals = least(worth, over)
    given = left = 0
    for k in range(len(missing)):
        if left < over and (worth[k] < limit or (worth[k] == limit and equals > 0)):
            equals -= worth[k] == limit
            positions[hits + len(free) + left] = missing[k]
            left += 1
        else:
            slots[missing[k]] = free[given]
            positions[hits + given] = missing[k]
            given += 1
    return given


@compiled
def worth_of(bundle, score, base, gain):  # type: ignore[no-untyped-def]
    """What an id is worth; -1, of an empty slot, is the last."""
    return score[bundle] + base[bundle] * gain if len(base) else np.float64(score[bundle])


@compiled
def least(values, count):  # type: ignore[no-untyped-def]
    """(limit, equals): the `count` smallest values are those below the limit and the first `equals` equal to it."""
    if count == 0:
        return -np.inf, 0
    parted, low, high, wanted = values.copy(), 0, len(values) - 1, count - 1
    while low < high:  # Hoare's selection
        pivot, i, j = parted[(low + high) // 2], low, high
        while i <= j:
            while parted[i] < pivot:
                i += 1
            while parted[j] > pivot:
                j -= 1
            if i <= j:
                parted[i], parted[j] = parted[j], parted[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    limit, below = parted[wanted], 0
    for value in values:
        below += value < limit
    return limit, count - below
