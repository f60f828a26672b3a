"""Copies between slabs: every byte that both hold, and none else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.engine.residency.slab_copy import clip_targets, copy_rows
from mlx_flash.engine.storage.reader import Target


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_copies_carry_every_byte_that_both_slabs_hold(left: list[int], right: list[int]) -> None:
    rng = np.random.default_rng(0)
    size = min(sum(left), sum(right))

    def slab(widths: list[int]) -> list[Target]:
        starts = np.concatenate([[0], np.cumsum(widths)])
        return [
            Target(int(at), rng.integers(0, 255, (5, w)).astype(np.uint8))
            for at, w in zip(starts, widths, strict=False)
        ]

    source, target = slab(left), slab(right)
    copy_rows(source, np.array([4, 0]), target, np.array([1, 3]))

    def whole(targets: list[Target], row: int) -> bytes:
        return b"".join(t.rows[row].tobytes() for t in targets)[:size]

    assert whole(target, 1) == whole(source, 4) and whole(target, 3) == whole(source, 0)


def test_clipping_leaves_out_the_first_bytes() -> None:
    rows = np.arange(12, dtype=np.uint8).reshape(1, 12)
    clipped = clip_targets([Target(0, rows[:, :4]), Target(4, rows[:, 4:])], 6)
    assert [(t.offset, t.rows.tolist()) for t in clipped] == [(6, [[6, 7, 8, 9, 10, 11]])]
