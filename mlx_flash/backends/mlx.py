"""Bundles in MLX arrays and the arithmetic on them, on whatever device MLX runs. Needs mlx; knows no model or file.

Every product has a shape that the selection alone decides (blocks of ids, groups of selected ids), never where rows lie
or how many are resident: on one device the same bits come out at every budget (DESIGN 2). Run on Linux CPU only; what
is said of Metal was read off MLX's source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ConfigError
from ..storage.layout import Layout
from ..storage.reader import Target
from .base import BLOCK, FFNSpec, Widths

Unary = Callable[[mx.array], mx.array]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
STORAGE = {4: mx.uint32, 2: mx.uint16}
PAGE = 16384  # Metal rounds an allocation up to this
SCALAR_ROWS = 64  # selected rows are padded to whole groups of this many, so that a row's product has one shape
PIECE = 8 * BLOCK  # rows gathered at once in decode: bounds the copy that a gather makes
LAZY_BYTES = 32 << 20  # temporaries that prefill leaves to MLX before it waits for them
FUSED_HEAD_DIMS = (64, 80, 128)  # attention without a matrix of scores, on a GPU


@dataclass(frozen=True)
class Activation:
    """`alone(g)`, and `times(g, u)` = alone(g) * u in one kernel."""

    alone: Unary
    times: Callable[[mx.array, mx.array], mx.array]


def _relu(gate: mx.array) -> mx.array:
    return mx.maximum(gate, 0)


def _fused(alone: Unary) -> Activation:
    return Activation(alone, mx.compile(lambda gate, up: alone(gate) * up, shapeless=True))


ACTIVATIONS = {"silu": _fused(nn.silu), "relu": _fused(_relu)}


def available() -> bool:
    """Whether MLX has a GPU here: Metal or CUDA."""
    return bool(mx.metal.is_available() or mx.cuda.is_available())


class MlxSlab:
    """One contiguous array per part, shape (rows, length); `targets` write through its memory.

    unfinished: for a slab of gate rows, what the layer's last pass left to be evaluated (see MlxPass.gate).
    """

    def __init__(self, layout: Layout, rows: int, parts: Sequence[str]):
        self.rows = rows
        self.nbytes = slab_bytes(layout, rows, parts)
        self.parts: dict[str, mx.array] = {}
        self.unfinished: list[mx.array] = []
        targets = []
        for name in parts:
            part = layout.part(name)
            dtype = DTYPES[part.dtype]
            if rows == 0:
                self.parts[name] = mx.zeros((0, part.length), dtype)
                targets.append(Target(layout.offset(name), np.empty((0, part.nbytes), np.uint8)))
                continue
            # Integers: the buffer protocol has no bfloat16. Viewed whole, once: a view of a slice would copy.
            raw = mx.zeros((rows, part.length), STORAGE[dtype.size])
            typed = raw.view(dtype)
            mx.eval(raw, typed)
            memory = np.frombuffer(raw, np.uint8)  # type: ignore[call-overload]
            self.parts[name] = typed
            targets.append(Target(layout.offset(name), memory.reshape(rows, part.nbytes)))
        self.targets = tuple(targets)


def slab_bytes(layout: Layout, rows: int, parts: Sequence[str]) -> int:
    """Bytes that a slab's arrays take, each rounded up to whole pages as Metal does."""
    return sum(-(-rows * layout.part(name).nbytes // PAGE) * PAGE for name in parts)


@dataclass
class Found:
    """Selected ids whose scalars are on their way: h (T, at least n), its first n columns for ids (n,)."""

    ids: np.ndarray
    slab: MlxSlab
    rows: np.ndarray
    scalars: mx.array


@dataclass
class Sum:
    """The terms added so far. One token: a list of partials, summed at the end in one operation of fixed shape;
    more tokens: a running sum, so that a prompt's partials are not all alive at once."""

    partials: list[mx.array] = field(default_factory=list)  # each (n, 1, d) float32
    running: mx.array | None = None  # (T, d) float32

    def add(self, partial: mx.array) -> None:
        """partial (n, T, d); n > 1 for one token only."""
        partial = partial.astype(mx.float32)
        if partial.shape[1] == 1:
            self.partials.append(partial)
        else:
            self.running = partial[0] if self.running is None else self.running + partial[0]

    def arrays(self) -> list[mx.array]:
        return self.partials + ([] if self.running is None else [self.running])

    def total(self, shape: tuple[int, ...]) -> mx.array:
        if self.running is not None:
            return self.running
        if not self.partials:
            return mx.zeros(shape, mx.float32)
        return mx.concatenate(self.partials).sum(axis=0)


class MlxPass:
    """One layer's FFN on x (..., d); T is the product of the leading axes.

    Lazy: rows that `dense` and `down` were given are in use until `settle`, or until the layer's next `gate`.
    """

    def __init__(self, spec: FFNSpec, x: mx.array):
        if spec.activation not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {spec.activation!r}; the mlx backend knows {', '.join(ACTIVATIONS)}")
        self._spec, self._activation = spec, ACTIVATIONS[spec.activation]
        self._shape, self._dtype = x.shape, x.dtype
        # MLX casts the operands of a product to a common type: of x and a slab only x may be the one that is cast.
        dtype = DTYPES[spec.layout.parts[0].dtype]
        self._x = x.reshape(-1, x.shape[-1]).astype(dtype)  # (T, d)
        self._sum = Sum()
        self._next_id = 0
        self._lazy_bytes = 0
        self._gates: mx.array | None = None  # (T, count)
        self._gate_slab: MlxSlab | None = None
        self._found: list[Found] = []
        self._rest: tuple[mx.array, mx.array] | None = None  # h (T, m), down rows (m, d) of an unfilled group

    @property
    def _one_token(self) -> bool:
        return self._x.shape[0] == 1

    def gate(self, slab: MlxSlab) -> np.ndarray:
        """Ids (n,) int32, ascending, that fire for any token; `slab` holds the first part of all `count` bundles."""
        spec = self._spec
        name, count = spec.first, spec.layout.count
        product = self._x @ slab.parts[name][:count].T
        self._gates = self._lead(product, spec.up_bias)
        fires = mx.any(self._gates != 0, axis=0)
        # After this the caller overwrites slots, so nothing may still read them. When mlx-lm generates, x comes from
        # a token that was sampled from the last pass's output, which is therefore done although mlx-lm runs one step
        # ahead: `unfinished` costs nothing. It is not so when a caller feeds known tokens without evaluating (x of
        # layer l then needs earlier layers only), hence the list. Metal: writes made after this call are seen by
        # command buffers committed later, and those of this pass are.
        mx.eval(fires, *slab.unfinished)
        slab.unfinished, self._gate_slab = [], slab
        return np.flatnonzero(np.array(fires)).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: MlxSlab, rows: np.ndarray) -> None:
        """Start computing h of `ids` (n,), which lie in `rows` (n,) of `slab`."""
        if not len(ids):
            return
        pieces = []
        for begin, end in _pieces(len(ids), PIECE if self._one_token else SCALAR_ROWS):
            index = _padded(rows[begin:end])
            if self._gates is not None:
                scalars = mx.take(self._gates, _padded(ids[begin:end]), axis=1)
            else:
                bias = self._spec.up_bias
                bias = None if bias is None else mx.take(bias, _padded(ids[begin:end]))
                scalars = self._lead(self._selected(slab, self._spec.first, index), bias)
            if self._spec.second is not None:
                scalars = scalars * self._follows(self._selected(slab, self._spec.second, index))
            pieces.append(scalars)
            if end < len(ids) and self._one_token:
                mx.eval(scalars)  # so many rows are copied piece by piece, not all at once
        found = Found(ids, slab, rows, pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1))
        mx.async_eval(found.scalars)  # runs while the caller waits for a read
        self._found.append(found)

    def _selected(self, slab: MlxSlab, part: str, index: mx.array) -> mx.array:
        """x times the rows `index` (n,) of a part, (T, n), in groups of one shape."""
        taken = mx.take(slab.parts[part], index, axis=0)
        groups = taken.reshape(-1, SCALAR_ROWS, taken.shape[-1])
        return self._products(groups).swapaxes(0, 1).reshape(len(self._x), -1)

    def _lead(self, product: mx.array, bias: mx.array | None) -> mx.array:
        """What the leading part's products become: activation, unless it is the second part's, and cut."""
        if bias is not None:
            product = product + bias
        if not (self._spec.gated and self._spec.first == "up"):
            product = self._activation.alone(product)
        return mx.where(mx.abs(product) > self._spec.cutoff, product, 0) if self._spec.cutoff else product

    def _follows(self, product: mx.array) -> mx.array:
        """What the second part's products become."""
        return self._activation.alone(product) if self._spec.second == "gate" else product

    def down(self) -> None:
        """Add the terms of the ids given to `scalars` since the last `down`; they follow all earlier ones."""
        found, self._found = self._found, []
        if not found:
            return
        ids = np.concatenate([each.ids for each in found])
        order = np.argsort(ids)
        self._follow(int(ids[order[0]]), int(ids[order[-1]]) + 1)
        starts = np.cumsum([0] + [each.scalars.shape[1] for each in found[:-1]])
        columns = np.concatenate([start + np.arange(len(each.ids)) for start, each in zip(starts, found, strict=True)])
        scalars = found[0].scalars if len(found) == 1 else mx.concatenate([f.scalars for f in found], axis=1)
        scalars = mx.take(scalars, mx.array(columns[order].astype(np.uint32)), axis=1)
        for begin, end in _pieces(len(ids), PIECE if self._one_token else BLOCK):
            self._add_selected(scalars[:, begin:end], _gather(found, order[begin:end]))
            if end < len(ids) and self._one_token:
                self.settle()

    def dense(self, slab: MlxSlab, first_row: int, first_id: int, count: int, h: np.ndarray | None = None) -> None:
        """Add ids `first_id..first_id+count` from consecutive rows, one product per BLOCK ids (one token: batched)."""
        self._follow(first_id, first_id + count)
        whole = count // BLOCK
        step = max(whole, 1) if self._one_token else 1
        found = []
        for block in range(0, whole, step):
            found.append(self._add_blocks(slab, first_row + block * BLOCK, first_id + block * BLOCK, step, BLOCK))
        if count % BLOCK:
            found.append(self._add_blocks(slab, first_row + whole * BLOCK, first_id + whole * BLOCK, 1, count % BLOCK))
        if h is not None:
            h[...] = np.array(mx.concatenate(found, axis=1).astype(mx.float32))

    def settle(self) -> None:
        """When it returns, nothing pending reads any slab."""
        mx.eval(self._unfinished())
        self._lazy_bytes = 0

    def result(self) -> mx.array:
        """The FFN's output, shape and dtype of x."""
        if self._rest is not None:
            scalars, down = self._rest
            self._sum.add(scalars[None] @ down[None])
            self._rest = None
        if self._gate_slab is not None:
            self._gate_slab.unfinished = self._unfinished()
        total = self._sum.total(self._x.shape)
        if self._spec.down_bias is not None:
            total = total + self._spec.down_bias.astype(mx.float32)
        return total.astype(self._dtype).reshape(self._shape)

    def _unfinished(self) -> list[mx.array]:
        return self._sum.arrays() + [each.scalars for each in self._found] + list(self._rest or ())

    def _follow(self, first_id: int, end_id: int) -> None:
        # Terms out of order would give other bits, silently.
        if first_id < self._next_id:
            raise ValueError(f"ids are added in ascending order: {first_id} came after {self._next_id - 1}")
        self._next_id = end_id

    def _products(self, blocks: mx.array) -> mx.array:
        """blocks (n, m, d) -> x . row, (n, T, m).

        x stands on the left and is broadcast: the other way round MLX folds n into the rows of one product, whose
        kernel then depends on n. For T > 1 on Metal the kernel depends on n in any case: callers pass n = 1.
        """
        return self._x[None] @ blocks.swapaxes(1, 2)

    def _add_blocks(self, slab: MlxSlab, row: int, first_id: int, blocks: int, length: int) -> mx.array:
        """Add `blocks` times `length` ids that begin at `row`; returns their scalars (T, blocks * length)."""
        rows = blocks * length

        def part(name: str) -> mx.array:
            return slab.parts[name][row : row + rows].reshape(blocks, length, -1)

        if self._spec.gated and not self._spec.cutoff:
            scalars = self._activation.times(self._products(part("gate")), self._products(part("up")))
        else:
            bias = self._spec.up_bias
            bias = None if bias is None else bias[first_id : first_id + rows].reshape(blocks, 1, length)
            scalars = self._lead(self._products(part(self._spec.first)), bias)
            if self._spec.second is not None:
                scalars = scalars * self._follows(self._products(part(self._spec.second)))
        self._sum.add(scalars @ part("down"))
        self._lazy_bytes += _block_bytes(self._x.shape[1], self._x.dtype.size, len(self._x))
        if not self._one_token and self._lazy_bytes > LAZY_BYTES:
            self.settle()
        return scalars.swapaxes(0, 1).reshape(len(self._x), rows)

    def _add_selected(self, scalars: mx.array, down: mx.array) -> None:
        """h (T, n) times rows (n, d), by groups of BLOCK consecutive selected ids; keeps what fills no group.

        The groups run on through several `down`s, so they do not depend on how the ids were dealt out to them.
        """
        if self._rest is not None:
            scalars = mx.concatenate([self._rest[0], scalars], axis=1)
            down = mx.concatenate([self._rest[1], down])
        groups = scalars.shape[1] // BLOCK
        whole = groups * BLOCK
        step = max(groups, 1) if self._one_token else 1
        for group in range(0, groups, step):
            part = slice(group * BLOCK, (group + step) * BLOCK)
            left = scalars[:, part].reshape(len(self._x), step, BLOCK).swapaxes(0, 1)
            self._sum.add(left @ down[part].reshape(step, BLOCK, -1))
        self._rest = (scalars[:, whole:], down[whole:]) if whole < scalars.shape[1] else None


def _pieces(count: int, step: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def _padded(index: np.ndarray) -> mx.array:
    """Indices (n,) as uint32, the first one repeated up to whole groups of SCALAR_ROWS."""
    padded = np.full(-(-len(index) // SCALAR_ROWS) * SCALAR_ROWS, index[0], np.uint32)
    padded[: len(index)] = index
    return mx.array(padded)


def _gather(found: list[Found], order: np.ndarray) -> mx.array:
    """Down rows (n, d) of positions `order` in the concatenation of `found`."""
    rows = np.concatenate([each.rows for each in found]).astype(np.uint32)[order]
    slabs = list({id(each.slab): each.slab for each in found}.values())
    if len(slabs) == 1:
        return mx.take(slabs[0].parts["down"], mx.array(rows), axis=0)
    source = np.concatenate([np.full(len(e.ids), slabs.index(e.slab)) for e in found])[order]
    # Slab by slab, then back into the order of ids.
    by_slab = np.argsort(source, kind="stable")
    taken = [
        mx.take(slab.parts["down"], mx.array(rows[source == number]), axis=0)
        for number, slab in enumerate(slabs)
        if (source == number).any()
    ]
    if len(taken) == 1:
        return taken[0]
    return mx.take(mx.concatenate(taken), mx.array(np.argsort(by_slab).astype(np.uint32)), axis=0)


def _block_bytes(dim: int, item: int, tokens: int) -> int:
    """Temporaries of one block in prefill: gate, up and h (T, BLOCK), the partial in both types, the running sum."""
    return tokens * (3 * BLOCK * item + dim * (item + 8))


def cache_limit_bytes(dim: int) -> int:
    """What MLX may keep of freed buffers for a model of this width: 16 fp32 arrays of 256 tokens. By default it keeps
    them up to its memory limit, which is the machine's, on top of the budget; none at all would make it allocate
    anew in every layer."""
    return 16 * 256 * dim * 4


class MlxBackend:
    """Slabs in memory that MLX allocates, written through; passes on MLX's default device."""

    name = "mlx"

    def slab(self, layout: Layout, rows: int, parts: Sequence[str]) -> MlxSlab:
        """Zeroed memory for `rows` bundles, these parts of each; rows may be 0. Hold it as long as its arrays."""
        return MlxSlab(layout, rows, parts)

    def slab_bytes(self, layout: Layout, rows: int, parts: Sequence[str]) -> int:
        """Bytes that `slab` takes."""
        return slab_bytes(layout, rows, parts)

    def ffn(self, spec: FFNSpec, x: mx.array) -> MlxPass:
        """Begin one FFN on x (..., d). Raises ConfigError for an activation that is not known."""
        return MlxPass(spec, x)

    def predictor(
        self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray
    ) -> Callable[[mx.array], np.ndarray]:
        """See `base.Backend.predictor`; int8 until it is used, products in fp32."""
        inner, outer, offset = mx.array(a), mx.array(b), mx.array(bias)
        mx.eval(inner, outer, offset)

        def logits(x: mx.array) -> np.ndarray:
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            found = (rows @ inner.astype(mx.float32).T) @ outer.astype(mx.float32).T
            return np.array(mx.max(found, axis=0) * step + offset)

        return logits

    def shift(self, y: mx.array, offset: np.ndarray) -> mx.array:
        """y (..., d) plus offset (d,), in y's dtype."""
        return (y.astype(mx.float32) + mx.array(offset)).astype(y.dtype)

    def to_numpy(self, x: mx.array) -> np.ndarray:
        """x as fp32 in host memory."""
        return np.array(x.astype(mx.float32))

    def prefill_scratch_bytes(self, layout: Layout, widths: Widths, chunk: int, context: int) -> int:
        """An upper bound of what a prefill of `chunk` tokens takes beyond weights, slabs and KV cache: temporaries
        as if fp32, and the freed buffers that MLX keeps. A decoding step's copies of selected rows are covered too."""
        dim, chunk = widths.dim, min(chunk, context)
        block = _block_bytes(dim, 4, chunk)
        ffn = min(-(-widths.intermediate // BLOCK) * block, LAZY_BYTES + block)
        fused = available() and widths.head_dim in FUSED_HEAD_DIMS
        item = layout.parts[0].nbytes // layout.parts[0].length
        scores = 0 if fused else 2 * item * widths.heads * chunk * context
        activations = 4 * chunk * (5 * dim + 5 * widths.qkv_rows)
        copies = 2 * min(PIECE, layout.count) * sum(part.nbytes for part in layout.parts[-2:])
        return max(max(ffn, scores) + activations, copies) + cache_limit_bytes(dim)
