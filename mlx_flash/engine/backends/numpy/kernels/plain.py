"""The kernels in plain NumPy, for machines without Numba: several times slower.

Terms are added in the same order as in the compiled set; dot products are not, so the two agree to 1e-5. BLAS is not
used, since its order of sums changes with the number of rows. `einsum` sums a row in the same way wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import add_pairwise
from mlx_flash.engine.backends.decoder_base import Activations, Attention
from mlx_flash.engine.numerics.affine import AffineBundles

from .base import EarlySums, Weights, activate, add_dense, widen

ROWS = 256  # widened at a time


class PlainKernels:
    """See `base.Kernels`."""

    name, executor = "plain", None
    threads = 1

    def dots(self, w: Weights, rows: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        count = len(w) if rows is None else len(rows)
        out = np.empty(count, np.float32)
        scratch = np.empty((min(ROWS, count), w.shape[1]), np.float32)
        for begin in range(0, count, ROWS):
            end = min(begin + ROWS, count)
            widen(w[begin:end] if rows is None else w[rows[begin:end]], scratch[: end - begin])
            np.einsum("ij,j->i", scratch[: end - begin], x, out=out[begin:end])
        return out

    def low_rank(
        self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray
    ) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
        def begin(x: np.ndarray) -> Callable[[], np.ndarray]:
            out = self.dots(b, None, self.dots(a, None, x))
            out *= np.float32(step)
            out += bias
            return lambda: out

        return begin

    def neurons(
        self,
        first: Weights | None,
        second: Weights | None,
        rows: np.ndarray | None,
        x: np.ndarray,
        *,
        given: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
    ) -> np.ndarray:
        if given is None:
            assert first is not None
            lead = self.dots(first, rows, x)
            if bias is not None:
                lead += bias
            activate(acts[0], lead)
            if cutoff:
                lead[np.abs(lead) <= np.float32(cutoff)] = 0
        else:
            lead = given.copy()
        if second is not None:
            kept = np.flatnonzero(lead)
            lead[kept] *= activate(acts[1], self.dots(second, kept if rows is None else rows[kept], x))
        return lead

    def begin_neurons(
        self,
        *parts: Any,
        early: EarlySums | None = None,
        **options: Any,
    ) -> Callable[[], np.ndarray]:
        h = self.neurons(*parts, **options)
        if early is not None:
            rows = np.arange(len(h)) if parts[2] is None else parts[2]
            for (begin, end), total in zip(early.spans, early.sums, strict=True):
                kept = np.arange(begin, end)[h[begin:end] != 0]
                _sum_rows([early.down], np.zeros(len(kept), np.int64), rows[kept], h[kept], total)
        return lambda: h

    def add_blocks(
        self,
        sources: Sequence[Weights],
        source: np.ndarray | None,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        segments: np.ndarray,
        y: np.ndarray,
        others: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        source = np.zeros(len(rows), np.int64) if source is None else source
        blocks = len(starts) - 1
        sums, which = (np.empty((blocks, y.shape[1]), np.float32), np.arange(blocks)) if others is None else others
        for block, into in enumerate(which):
            here = slice(starts[block], starts[block + 1])
            _sum_rows(sources, source[here], rows[here], h[here], sums[into])
        for segment, found in zip(segments, sums, strict=True):
            y[segment] += found

    def total(self, y: np.ndarray, like: Weights | None) -> np.ndarray:
        found: np.ndarray = add_pairwise(y)
        return found

    def dense(
        self,
        first: Weights,
        second: Weights | None,
        down: Weights,
        x: np.ndarray,
        y: np.ndarray,
        block: int,
        segments: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
    ) -> np.ndarray:
        h = self.neurons(first, second, None, x, bias=bias, acts=acts, cutoff=cutoff)
        add_dense(self, down, h, y, block, segments)
        return h

    def group_neurons(
        self,
        first: AffineBundles,
        second: AffineBundles | None,
        rows: np.ndarray,
        x: np.ndarray,
        *,
        acts: tuple[str, str] = ("", ""),
        cutoff: float = 0.0,
    ) -> np.ndarray:
        out = np.empty((len(rows), first.neurons), np.float32)
        for mine, row in zip(out, rows, strict=True):
            np.einsum("ij,j->i", first[row : row + 1].widen(), x, out=mine)
            activate(acts[0], mine)
            if cutoff:
                mine[np.abs(mine) <= np.float32(cutoff)] = 0
            if second is not None:
                mine *= activate(acts[1], np.einsum("ij,j->i", second[row : row + 1].widen(), x))
        return out

    def add_groups(
        self,
        sources: Sequence[AffineBundles],
        source: np.ndarray,
        rows: np.ndarray,
        h: np.ndarray,
        starts: np.ndarray,
        segments: np.ndarray,
        y: np.ndarray,
    ) -> None:
        for begin, end, segment in zip(starts[:-1], starts[1:], segments, strict=True):
            total = np.zeros_like(y[0])
            for at in range(begin, end):
                neurons = sources[source[at]][rows[at] : rows[at] + 1].widen()
                total += np.einsum("i,ij->j", h[at], neurons)
            y[segment] += total

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        mean = np.mean(np.square(x), axis=-1, keepdims=True)
        out: np.ndarray = x / np.sqrt(mean + np.float32(eps))
        out *= weight
        return out

    def attention(self, layer: Attention, memory: Activations) -> None:
        """None: see `base.Kernels`."""


def _sum_rows(
    sources: Sequence[np.ndarray], source: np.ndarray, rows: np.ndarray, h: np.ndarray, total: np.ndarray
) -> None:
    """total (d,) = the sum of h[i] * sources[source[i]][rows[i]]."""
    wide = np.empty((len(rows), len(total)), np.float32)
    for index, w in enumerate(sources):
        mine = np.flatnonzero(source == index)
        found = np.empty((len(mine), len(total)), np.float32)
        widen(w[rows[mine]], found)
        wide[mine] = found
    # Row by row: elementwise over d, so neither alignment nor the number of rows changes the order.
    total[:] = 0
    for weight, row in zip(h, wide, strict=True):
        total += weight * row
