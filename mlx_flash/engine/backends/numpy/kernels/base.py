"""The arithmetic that decoding spends its time in, behind a few functions, and which of two sets of them runs.

Weights stay in their storage dtype: float32, float16, or bfloat16 as uint16 bit patterns; sums are fp32 in an order
that depends on nothing but the ids. Knows arrays, rows and blocks; neither slabs, files nor models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from mlx_flash.engine.backends.decoder_base import Activations, Attention
from mlx_flash.engine.numerics.affine import AffineBundles, AffineRows
from mlx_flash.engine.system.executor import Executor

Weights = Any  # np.ndarray or AffineRows: which of them is known when a kernel runs


@dataclass(frozen=True)
class EarlySums:
    """Blocks that are summed as soon as their scalars are computed: sums[b] (d,) becomes what `add_blocks` would add
    for the scalars spans[b, 0] to spans[b, 1]. down (count, d); spans (blocks, 2) integers; sums (blocks, d) fp32."""

    down: np.ndarray
    spans: np.ndarray
    sums: np.ndarray


class Kernels(Protocol):
    """One set of kernels; results are bit-identical within a set, for Numba also at every number of threads.

    A weight array is (count, n) float32, float16, uint16 (bfloat16) or int8 whose rows are contiguous, any distance
    apart; or `AffineRows` whose codes, scales and biases are such arrays.
    """

    name: str

    @property
    def executor(self) -> Executor | None:
        """Makes system calls on threads that need no Python, if the set has such threads."""

    @property
    def threads(self) -> int:
        """How many threads work on one call; the plain set takes any number and uses one."""

    @threads.setter
    def threads(self, count: int) -> None: ...

    def dots(self, w: Weights, rows: np.ndarray | None, x: np.ndarray) -> np.ndarray:
        """`w[r] . x` for r in `rows` (None: all). w (count, n), x (n,) fp32 -> (len(rows),) fp32."""

    def low_rank(
        self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray
    ) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
        """Begins, on x (n,) fp32, what the returned function gives: `step * (b @ (a @ x)) + bias`, (count,) fp32.
        a (r, n), b (count, r), alike in dtype; bias (count,) fp32. The arrays must stay as they are."""

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
        """lead * follow of each of `rows` (None: all), (len(rows),) fp32; zero where lead is.

        lead: `given` (len(rows),), or acts[0](first[r] . x + bias), zero up to the magnitude `cutoff`. follow:
        acts[1](second[r] . x), or 1 without `second`. first, second (count, n), alike in dtype and strides; x (n,) and
        bias (len(rows),) fp32; acts: "relu", "silu" or "".
        """

    def begin_neurons(
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
        early: EarlySums | None = None,
    ) -> Callable[[], np.ndarray]:
        """Start `neurons`; the function returned waits for the result and returns it. The arguments must stay as they
        are until then. early: sums to compute as well, whose `down` has the dtype and strides of `first`."""

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
        """Add to y[segments[b]], for each block b ascending, the sum over i in starts[b]..starts[b+1], ascending, of
        `h[i] * sources[source[i]][rows[i]]`. A block's sum starts from zero. `total` gives what y comes to.

        sources: weight arrays (., d); source (None: the first), rows (m,) integers; h (m,) fp32; starts (blocks + 1,)
        and segments (blocks,) integers; y (SEGMENTS, d) fp32, zeros at first. others: sums (n, d) of more blocks, from
        `begin_neurons`, and which of them are these blocks, whose sums are replaced; all n are added, and `segments`
        is of all n.
        """

    def total(self, y: np.ndarray, like: Weights | None) -> np.ndarray:
        """The segments' sums y (SEGMENTS, d) added pairwise, (d,) fp32. like: any weights that were summed, None for
        groups of neurons: a set may keep the columns of y in an order that suits them."""

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
        """`neurons` of all rows, added to y as `add_blocks` does, by blocks of `block` rows; returns them, (count,)
        fp32. down (count, d). The same bits as `neurons` and `add_blocks` give."""

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
        """`neurons` of all neurons of these bundles, (len(rows), neurons) fp32."""

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
        """`add_blocks` of bundles of neurons, h (m, neurons): the sum of bundle i is that of its neurons."""

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x / rms(x) * weight over the last axis. x (..., n), weight (n,) fp32 -> (..., n) fp32."""

    def attention(self, layer: Attention, memory: Activations) -> Callable[[], None] | None:
        """One layer's attention for one token, in one call: it adds to memory.x what attention gives for its norm, puts
        its norm into memory.h, and the token's keys and values into the cache. All arrays must stay where they are.
        None where the set has no such thing."""


def load(numba: bool | None = None) -> Kernels:
    """The Numba set or the plain NumPy one; None: Numba where it can be imported. Compiles at the first call of each
    kernel. Raises ImportError if Numba is asked for and missing."""
    if numba is None:
        try:
            return load(True)
        except ImportError:  # not installed, or not made for this NumPy
            return load(False)
    module, name = ("compiled", "CompiledKernels") if numba else ("plain", "PlainKernels")
    kernels: Kernels = getattr(import_module(f"{__package__}.{module}"), name)()
    return kernels


def add_dense(kernels: Kernels, down: Weights, h: np.ndarray, y: np.ndarray, block: int, segments: np.ndarray) -> None:
    """Add h[i] down[i] of all rows to y, by blocks of `block` rows; the rows of zeros are not touched. See
    `Kernels.add_blocks`."""
    rows = np.flatnonzero(h)
    if len(rows):
        first, last = rows[0] // block, rows[-1] // block
        starts = np.concatenate([[0], np.searchsorted(rows, np.arange(first + 1, last + 1) * block), [len(rows)]])
        kernels.add_blocks([down], None, rows, h[rows], starts, segments[first : last + 1], y)


def activate(name: str, values: np.ndarray) -> np.ndarray:
    """The activation, in place; "" is none. values: contiguous fp32."""
    if name == "relu":
        return np.maximum(values, np.float32(0), out=values)
    if name != "silu":
        if name:
            raise ValueError(f"unknown activation {name!r}; known: relu, silu")
        return values
    divisor = np.negative(values)
    with np.errstate(over="ignore"):  # exp(-x) may be inf: x / inf is 0, as it should be
        np.exp(divisor, out=divisor)
    divisor += np.float32(1)
    return np.divide(values, divisor, out=values)


def widen(w: Weights, out: np.ndarray) -> None:
    """Write weights, in whatever storage dtype, into `out`, fp32 of the same shape. Exact, but for codes, whose
    products and sums are rounded to fp32."""
    if isinstance(w, AffineRows):
        w.widen(out)
    elif w.dtype == np.uint16:
        np.left_shift(w, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, w)


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Write fp32 `values` into `out` of a storage dtype, rounding to the nearest, ties to even."""
    if out.dtype == np.uint16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        # Rounding up may carry a NaN's payload into infinity: keep it a quiet NaN.
        out[...] = np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
    else:
        with np.errstate(over="ignore"):
            out[...] = values
