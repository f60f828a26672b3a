"""Splits slots over the layers: each further slot goes to the layer where it saves most misses by calibrated curves.

The curve of a layer gives the bundles that a token misses for a number of resident ones. Arithmetic only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def lower_hull(curve: np.ndarray, count: int) -> list[tuple[float, float]]:
    """The corners (slots, misses) of the largest convex function under a curve (K, 2), which ends where all `count`
    bundles have slots and nothing is missed. A curve without a point at 0 slots gets one: a token then misses as many
    bundles as its first window holds. Raises ValueError for an empty curve."""
    points = {(float(slots), float(misses)) for slots, misses in curve if 0 <= slots < count and misses >= 0}
    if not points:
        raise ValueError(f"a curve without points, for a layer of {count} bundles")
    first = min(points)[0]
    hull: list[tuple[float, float]] = []
    for point in sorted(points | ({(0.0, first)} if first else set()) | {(float(count), 0.0)}):
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def split_by_gain(
    total: int, counts: Sequence[int], unit: int, curves: Sequence[np.ndarray], floors: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Slots per layer, at most `total` in all: each `unit` (a layer's last one may be shorter) goes where it saves
    most misses by the curves' lower hulls, of equals to the lowest layer; less than a unit is left.

    curves[l] (K, 2): slots and misses per token, for windows of 1 (or 0), 2, 4, ... tokens.
    floors[l]: slots that a layer gets first, where `total` is enough for all floors. A layer whose slots do not hold
    what one token asks for reads it through staging, where reads and arithmetic do not overlap.
    """
    if total >= sum(counts):
        return tuple(counts)
    hulls = [np.array(lower_hull(curve, count)) for curve, count in zip(curves, counts, strict=True)]

    def offer(layer: int, slots: int) -> tuple[float, int, int]:
        more = min(unit, counts[layer] - slots)
        before, after = np.interp([slots, slots + more], hulls[layer][:, 0], hulls[layer][:, 1])
        return (after - before) / more, layer, slots

    floors = floors or [0] * len(counts)
    result = [min(count, -(-floor // unit) * unit) for count, floor in zip(counts, floors, strict=True)]
    if sum(result) > total:
        result = [0] * len(counts)
    left = total - sum(result)
    offers = [offer(layer, result[layer]) for layer in range(len(counts)) if result[layer] < counts[layer]]
    heapq.heapify(offers)
    while offers:
        _, layer, slots = heapq.heappop(offers)
        step = min(unit, counts[layer] - slots)
        if step > left:
            continue  # this layer can have no more, another's shorter last unit may still fit
        # Up to the hull's next corner every step saves the same.
        corner = hulls[layer][np.searchsorted(hulls[layer][:, 0], slots, side="right"), 0]
        more = step * max(1, int(min(corner - slots, left)) // step)
        result[layer], left = slots + more, left - more
        if result[layer] < counts[layer]:
            heapq.heappush(offers, offer(layer, result[layer]))
    return tuple(result)
