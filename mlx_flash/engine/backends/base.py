"""What a backend supplies for FFNs: memory for bundles and the arithmetic on them. Speaks ids, rows and bytes, never
files.

A further backend implements `Slab`, `FFNPass` and `Backend`; for our own decoder to run on it, also
`decoder_base.DecoderBackend`. tests/engine/backends/third_backend.py is the smallest example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np

from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.system.executor import Executor

# An FFN's sum over its neurons is a fixed tree, so its bits depend on nothing but which neurons are in it.
# Each block of BLOCK ids is summed by itself, ids ascending. A layer's blocks are cut into SEGMENTS runs, each of which
# adds up its blocks, ascending, from zero. The segments' sums are added pairwise: `add_pairwise`.
BLOCK = 256
SEGMENTS = 8


def block_of(layout: Layout) -> int:
    """Bundles of a layout that make up a block of BLOCK neurons."""
    return BLOCK // layout.neurons


def block_segments(layout: Layout) -> np.ndarray:
    """The segment of each of a layer's blocks, (blocks,) int64, ascending, read-only. The segments' lengths differ by
    one block at most; where there are fewer blocks than segments, some segments are empty and their sums zero."""
    return _segments(-(-layout.count // block_of(layout)))


@cache
def _segments(blocks: int) -> np.ndarray:
    found = np.arange(blocks, dtype=np.int64) * SEGMENTS // blocks
    found.flags.writeable = False  # every pass over such a layer gets this array
    return found


def add_pairwise(sums: Any) -> Any:
    """((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) of the segments' sums (SEGMENTS, ...), a backend's array."""
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return sums[0]


@dataclass(frozen=True)
class FFNSpec:
    """What one FFN computes: `act(gate.x + gate_bias) * (up.x + up_bias)` or, not gated, `act(up.x + up_bias)`, times
    `down`, plus `down_bias`.

    lead: the part that `FFNPass.gate` computes and cuts, "gate" (with the activation) or "up" (without it in a gated
    FFN; "" is the one that the activation is applied to). cutoff: what the lead gives counts as zero up to this
    magnitude (FATReLU, CATS).
    """

    layout: Layout
    activation: str
    gated: bool
    up_bias: Any = None  # (count,) backend array, or None
    down_bias: Any = None  # (d,) backend array, or None
    cutoff: float = 0.0
    lead: str = ""
    gate_bias: Any = None  # (count,) backend array, or None

    @cached_property
    def first(self) -> str:
        """The part that is computed first and decides which neurons are active."""
        return self.lead or ("gate" if self.gated else "up")

    @cached_property
    def second(self) -> str | None:
        """The part that the first one is multiplied with, None where there is none."""
        return {"gate": "up", "up": "gate"}[self.first] if self.gated else None

    @cached_property
    def biases(self) -> dict[str | None, Any]:
        """The biases of "gate" and "up", backend arrays (count,) or None; no part, None, has none."""
        return {"gate": self.gate_bias, "up": self.up_bias, None: None}

    @cached_property
    def segments(self) -> np.ndarray:
        """The segment of each of the layer's blocks, see `block_segments`."""
        return block_segments(self.layout)


Fired = Callable[[], np.ndarray]  # -> (n,) bool
Predictor = Callable[[Any], Callable[[], np.ndarray]]  # begins; what it returns gives logits (count,) fp32


@dataclass(frozen=True)
class Widths:
    """The sizes that prefill scratch depends on, in items, each the largest over the layers."""

    dim: int
    intermediate: int
    qkv_rows: int
    head_dim: int
    heads: int


class Slab(Protocol):
    """Preallocated memory for `rows` bundles; `targets` are the byte views that a reader fills."""

    rows: int
    nbytes: int

    @property
    def targets(self) -> tuple[Target, ...]: ...


OwnSlab = Any  # a slab that the same backend made, whose arrays it knows


class FFNPass(Protocol):
    """One layer's FFN on one input. Blocks are given in ascending order; the order in which bundles become resident
    changes nothing."""

    def gate(self, slab: OwnSlab) -> np.ndarray:
        """Compute the leading part of all `count` rows of `slab`, keep it, and return the ids for which it is not
        zero for any token, ascending, int32."""

    def scalars(self, ids: np.ndarray, slab: OwnSlab, rows: np.ndarray, late: np.ndarray | None = None) -> Fired | None:
        """Begin to compute h of these ids, which lie in `rows` of `slab`; any order gives the same bits. Without `gate`
        before it, `slab` holds the leading part too. Returns a function that says which of them fired, to be called
        after `down`; None where finding out would cost time.

        late: given with a pass's first ids, which then ascend: all further ids that `scalars` will get before `down`.
        Blocks without any of these may be summed at once.
        """

    def down(self) -> None:
        """Add h_i d_i of all ids given to `scalars` since the last `down`, block by block. Their rows may be
        overwritten after `settle`, or once the layer's next `gate` has returned."""

    def dense(self, slab: OwnSlab, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        """Add the terms of ids `first_id..first_id+count`, whole blocks in consecutive rows, all parts there.
        h (T, count * neurons per bundle) fp32, if given, receives their scalars."""

    def settle(self) -> None:
        """When it returns, nothing pending reads any slab: rows may be overwritten."""

    def result(self) -> Any:
        """The FFN's output, shaped as its input."""


class Backend(Protocol):
    """Memory and arithmetic of one device."""

    name: str
    compiles: bool  # whether Numba is there, and used
    lazy: bool  # computes when results are asked for, so that asking which neurons fired costs a wait per layer

    @property
    def executor(self) -> Executor | None:
        """Makes a reader's system calls, on threads that need no Python; None where there are none."""

    def slab(self, layout: Layout, rows: int, parts: Sequence[str]) -> Slab:
        """Memory for `rows` bundles, these parts of each (in layout order), zeroed."""

    def slab_bytes(self, layout: Layout, rows: int, parts: Sequence[str]) -> int:
        """Bytes that `slab` would take."""

    def ffn(self, spec: FFNSpec, x: Any) -> FFNPass:
        """Begin one FFN on `x`, whose last axis is d."""

    def predictor(self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray) -> Predictor:
        """A low-rank predictor: x (..., d) -> (count,) fp32, the largest `step * (b @ (a @ x)) + bias` over the
        tokens. a (r, d), b (count, r) int8, bias (count,) fp32."""

    def shift(self, y: Any, offset: np.ndarray) -> Any:
        """y (..., d) plus offset (d,) fp32, in y's dtype."""

    def to_numpy(self, x: Any) -> np.ndarray:
        """Activations of a backend's model as fp32 in host memory, same shape."""

    def prefill_scratch_bytes(self, layout: Layout, widths: Widths, chunk: int, context: int) -> int:
        """Most bytes that a prefill of `chunk` tokens takes beyond weights, slabs and KV cache. `layout` is that of
        the largest layer."""
