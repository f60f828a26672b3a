"""Blocks of ids, and the spans of a step whose bundles do not all have slots."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.engine.backends.base import BLOCK
from mlx_flash.engine.selection.context import blocks
from mlx_flash.engine.selection.sparse import overflow_spans


@given(st.integers(1, 5 * BLOCK), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_spans_cover_every_position_once_at_block_borders(
    count: int, density: float, missing: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = np.flatnonzero(rng.random(count) < density)
    overflow = np.flatnonzero(rng.random(len(ids)) < missing)
    spans = list(overflow_spans(ids, overflow, BLOCK))
    if not len(overflow):
        assert spans == []
        return
    assert spans[0].first == 0 and spans[-1].last == len(ids)
    for left, right in zip(spans, spans[1:], strict=False):
        assert left.last == right.first
        assert ids[left.last - 1] // BLOCK < ids[right.first] // BLOCK
    assert np.concatenate([s.overflow for s in spans]).tolist() == overflow.tolist()
    for span in spans:
        assert len(span.overflow) <= BLOCK
        assert ((span.overflow >= span.first) & (span.overflow < span.last)).all()


def test_blocks_cut_at_fixed_borders() -> None:
    assert list(blocks(0, 2 * BLOCK + 1, BLOCK)) == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 1)]
    assert list(blocks(BLOCK, BLOCK, BLOCK)) == []
