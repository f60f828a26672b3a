"""Rounding between dtypes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.numerics.casting import cast, from_float32, to_float32

HALVES = st.integers(0, 0xFFFF) | st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])  # ties, and next to them


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0xFFFF), HALVES), min_size=1, max_size=20))
def test_bfloat16_is_the_nearest_even(halves: list[tuple[int, int]]) -> None:
    values = np.array([high << 16 | low for high, low in halves], "<u4").view("<f4")
    values = values[np.isfinite(values)]
    got = to_float32(from_float32(values, "bfloat16"), "bfloat16")
    below = (values.view("<u4") >> 16).astype("<u4")
    candidates = np.stack([((below + step) << 16).view("<f4") for step in (0, 1)]).astype(np.float64)
    candidates[np.isinf(candidates)] = np.copysign(2.0**128, candidates[np.isinf(candidates)])
    exact = values.astype(np.float64)
    distance = np.abs(candidates - exact)
    even = np.where(below % 2 == 0, 0, 1)
    pick = np.where(distance[0] == distance[1], even, distance.argmin(axis=0))
    want = candidates[pick, np.arange(len(values))]
    want[np.abs(want) >= 2.0**128] *= np.inf
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_nan_stays_nan() -> None:
    raw = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000], "<u4")
    got = to_float32(cast(raw, "float32", "bfloat16", "x"), "bfloat16")
    assert np.isnan(got[:3]).all() and got[3] == np.inf
