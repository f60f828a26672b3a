"""Slots by marginal gain: the convex hull of a curve, nothing left over, never more than a layer has, better than
in proportion."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.engine.residency.miss_curves import lower_hull, split_by_gain
from mlx_flash.runtime.planning.selective_persistence import split_slots


@st.composite
def layers(draw: st.DrawFn, most: int = 40) -> tuple[list[int], list[np.ndarray]]:
    counts = draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    curves = []
    for count in counts:
        size = draw(st.integers(1, 5))
        slots = sorted(draw(st.lists(st.floats(0, count, width=32), min_size=size, max_size=size)))
        misses = sorted(draw(st.lists(st.floats(0, count, width=32), min_size=size, max_size=size)), reverse=True)
        curves.append(np.array([[0.0, count], *zip(slots, misses, strict=True)], np.float32))
    return counts, curves


def missed(slots: tuple[int, ...], counts: list[int], curves: list[np.ndarray]) -> float:
    hulls = [np.array(lower_hull(curve, count)) for curve, count in zip(curves, counts, strict=True)]
    return sum(float(np.interp(s, hull[:, 0], hull[:, 1])) for s, hull in zip(slots, hulls, strict=True))


@given(layers())
def test_the_hull_is_convex_and_lies_under_the_curve(drawn: tuple[list[int], list[np.ndarray]]) -> None:
    for count, curve in zip(*drawn, strict=True):
        hull = np.array(lower_hull(curve, count))
        assert hull[0, 0] == 0 and hull[-1].tolist() == [count, 0]
        slopes = np.diff(hull[:, 1]) / np.diff(hull[:, 0])
        assert (np.diff(slopes) > -1e-6 * np.abs(slopes[:-1]) - 1e-9).all()
        assert (np.interp(curve[:, 0], hull[:, 0], hull[:, 1]) <= curve[:, 1] + 1e-4).all()
        corners = {tuple(map(float, point)) for point in curve} | {(float(count), 0.0)}
        assert {tuple(point) for point in hull.tolist()} <= corners


def test_without_slots_a_token_misses_what_its_first_window_holds() -> None:
    assert lower_hull(np.array([[4, 3], [6, 1]], np.float32), 10) == [(0, 4), (6, 1), (10, 0)]
    with pytest.raises(ValueError, match="without points"):
        lower_hull(np.empty((0, 2), np.float32), 10)


@given(layers(), st.floats(0, 1.2), st.integers(1, 9))
def test_slots_are_used_up_and_no_layer_gets_more_than_it_has(
    drawn: tuple[list[int], list[np.ndarray]], share: float, unit: int
) -> None:
    counts, curves = drawn
    total = int(share * sum(counts))
    slots = split_by_gain(total, counts, unit, curves)
    assert all(0 <= s <= c and (s % unit == 0 or s == c) for s, c in zip(slots, counts, strict=True))
    left = total - sum(slots)
    steps = [min(unit, c - s) for s, c in zip(slots, counts, strict=True) if s < c]
    assert left >= 0 and all(left < step for step in steps)
    if unit == 1:
        assert sum(slots) == min(total, sum(counts)) >= sum(split_slots(total, counts, 1))
    assert slots == split_by_gain(total, counts, unit, [curve.copy() for curve in curves])


@given(layers(), st.floats(0, 1))
def test_it_never_loses_to_slots_in_proportion(drawn: tuple[list[int], list[np.ndarray]], share: float) -> None:
    counts, curves = drawn
    total = int(share * sum(counts))
    by_gain = missed(split_by_gain(total, counts, 1, curves), counts, curves)
    assert by_gain <= missed(split_slots(total, counts, 1), counts, curves) + 1e-4


@given(layers(most=6), st.integers(0, 24))
def test_no_other_split_misses_less(drawn: tuple[list[int], list[np.ndarray]], total: int) -> None:
    counts, curves = drawn[0][:3], drawn[1][:3]
    best = min(
        missed(slots, counts, curves)
        for slots in product(*(range(count + 1) for count in counts))
        if sum(slots) <= total
    )
    assert missed(split_by_gain(total, counts, 1, curves), counts, curves) <= best + 1e-4


def test_a_layer_that_gains_more_gets_more_and_of_equals_the_lowest() -> None:
    steep, flat = np.array([[0, 8], [2, 1]], np.float32), np.array([[0, 8], [9, 7]], np.float32)
    assert split_by_gain(2, [10, 10], 1, [flat, steep]) == (0, 2)
    assert split_by_gain(3, [10, 10], 1, [steep, steep]) == (2, 1)
    assert split_by_gain(20, [10, 10], 4, [flat, flat]) == (10, 10)
    assert split_by_gain(6, [10, 10], 4, [flat, steep]) == (0, 4)
    assert split_by_gain(10, [10, 6], 4, [flat, steep]) == (4, 6), "the last two slots are a shorter unit"


@given(layers(), st.floats(0, 1.2), st.integers(1, 9), st.data())
def test_floors_come_first_where_all_of_them_fit(
    drawn: tuple[list[int], list[np.ndarray]], share: float, unit: int, data: st.DataObject
) -> None:
    counts, curves = drawn
    total, floors = int(share * sum(counts)), data.draw(st.lists(st.integers(0, 20), min_size=4, max_size=4))
    floors = floors[: len(counts)]
    slots = split_by_gain(total, counts, unit, curves, floors)
    assert sum(slots) <= total or slots == tuple(counts)
    in_units = [min(count, -(-floor // unit) * unit) for count, floor in zip(counts, floors, strict=True)]
    if sum(in_units) <= total:
        assert all(s >= floor for s, floor in zip(slots, in_units, strict=True))
        assert unit > 1 or sum(slots) == min(total, sum(counts))
    else:
        assert slots == split_by_gain(total, counts, unit, curves)


def test_beyond_the_floors_slots_go_where_they_save_most() -> None:
    steep, flat = np.array([[0, 8], [2, 1]], np.float32), np.array([[0, 8], [9, 7]], np.float32)
    assert split_by_gain(5, [10, 10], 1, [flat, steep], [3, 0]) == (3, 2)
    assert split_by_gain(2, [10, 10], 1, [flat, steep], [3, 0]) == (0, 2), "too little for the floors"
