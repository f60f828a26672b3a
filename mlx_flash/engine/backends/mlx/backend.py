"""One layer's FFN in MLX arrays, on the device that MLX runs on. Needs mlx; knows no model or file.

The shape of every product depends on the selection alone (blocks of ids, groups of selected ids), not on where rows lie
or how many are resident. So one device gives the same bits at every budget. This was run on Linux's CPU
only; comments about Metal come from MLX's source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_flash.engine.backends.base import BLOCK, FFNSpec, Predictor, Widths
from mlx_flash.engine.storage.bundle import ITEM_BYTES, Layout
from mlx_flash.errors import ConfigError

from .group_pass import MlxGroupPass, scratch_bytes
from .rows import MlxRows
from .slab import (
    DTYPES,
    SCALAR_ROWS,
    Found,
    Lagging,
    MlxSlab,
    gather,
    has_gpu,
    is_run,
    padded,
    pieces,
    runs,
    slab_bytes,
    window,
)
from .terms import ACTIVATIONS, Sum

# Rows per product when one token's terms are summed: with 256 MLX's CPU takes up to twice as long in bfloat16. Layers
# of fewer than MANY neurons keep blocks of 256, because there starting an operation costs more than its arithmetic.
DOWN_ROWS, MANY = 64, 4 * BLOCK
PIECE = 8 * BLOCK  # rows gathered at once in decode, twice: bounds the copy that a gather makes
LAZY_BYTES = 32 << 20  # temporaries that prefill leaves to MLX before it waits for them
FUSED_HEAD_DIMS = (64, 80, 128)  # attention without a matrix of scores, on a GPU


def available() -> bool:
    """Whether MLX has a GPU here: Metal or CUDA."""
    return has_gpu()


class MlxPass:
    """One layer's FFN on x (..., d); T is the product of the leading axes.

    Lazy: rows that `dense` and `down` were given are in use until `settle`, or until the layer's next `gate`.
    """

    def __init__(self, spec: FFNSpec, x: mx.array):
        self._spec, self._activation = spec, ACTIVATIONS[spec.activation]
        self._shape, self._dtype = x.shape, x.dtype
        # MLX casts the operands of a product to a common type: of x and a slab only x may be the one that is cast.
        dtype = DTYPES[spec.layout.dtype]
        self._x = x.reshape(1, -1, x.shape[-1]).astype(dtype)  # (1, T, d)
        self._tokens: int = self._x.shape[1]
        self._one_token = self._tokens == 1
        self._down_rows = DOWN_ROWS if self._one_token and spec.layout.count >= MANY else BLOCK
        self._sum, self._segments = Sum(), spec.segments
        self._segment = 0  # of the terms that are being added
        self._next_id = 0
        self._lazy_bytes = 0
        self._gates: mx.array | None = None  # (1, T, count)
        self._gate_slab: MlxSlab | None = None
        self._found: list[Found] = []
        self._rest: tuple[mx.array, MlxRows] | None = None  # h (1, T, m), down rows (1, m, d) of an unfilled group
        self._rest_in_place = False  # the rows are a slab's own

    def gate(self, slab: MlxSlab) -> np.ndarray:
        """Ids (n,) int32, ascending, that fire for any token; `slab` holds the first part of all `count` bundles."""
        spec = self._spec
        product = slab.view(spec.first, 0, 1, spec.layout.count, across=True).product(self._x)
        self._gates = self._lead(product, spec.biases[spec.first])
        fires = mx.any(self._gates != 0, axis=(0, 1))
        # After this the caller overwrites slots, so nothing may still read them. When mlx-lm generates, x comes from
        # a token that was sampled from the last pass's output, which is therefore done although mlx-lm runs one step
        # ahead: `unfinished` costs nothing. It is not so when a caller feeds known tokens without evaluating (x of
        # layer l then needs earlier layers only), hence the list. Metal: writes made after this call are seen by
        # command buffers committed later, and those of this pass are.
        mx.eval(fires, *slab.unfinished)
        slab.unfinished, self._gate_slab = [], slab
        return np.flatnonzero(np.array(fires)).astype(np.int32)

    def scalars(self, ids: np.ndarray, slab: MlxSlab, rows: np.ndarray, late: np.ndarray | None = None) -> None:
        """Start to compute h of `ids` (n,), which lie in `rows` (n,) of `slab`."""
        if not len(ids):
            return
        run = self._one_token and is_run(rows)
        where = window(rows, run, slab.rows) if self._one_token else None
        if where is None:
            scalars = self._gathered_scalars(ids, slab, rows)
        else:
            scalars = self._scalars_in_place(ids, slab, rows - where[0], *where)
        self._found.append(Found(ids, slab, rows, scalars, run))
        # Runs while the caller waits for a read. Where `prompt` or `static` have all their rows in a prefix of the
        # slots nothing is read, and a step stays one graph from the first layer to the last.
        whole_step = run and self._gates is None and (len(ids) < slab.rows or len(ids) == self._spec.layout.count)
        if not whole_step:
            mx.async_eval(scalars)

    def _gathered_scalars(self, ids: np.ndarray, slab: MlxSlab, rows: np.ndarray) -> mx.array:
        """h (1, T, at least n), of copies of the rows."""
        made: list[mx.array] = []
        lagging = Lagging()
        for begin, end in pieces(len(ids), PIECE if self._one_token else SCALAR_ROWS):
            products = partial(self._selected, slab, mx.array(padded(rows[begin:end])))
            made.append(self._scalars(padded(ids[begin:end]), products))
            if end < len(ids) and self._one_token:
                lagging.start([made[-1]])
        return made[0] if len(made) == 1 else mx.concatenate(made, axis=2)

    def _scalars_in_place(self, ids: np.ndarray, slab: MlxSlab, columns: np.ndarray, low: int, high: int) -> mx.array:
        """h (1, 1, n), from the products of all the rows low..high, of which `columns` (n,) are wanted."""
        index = None if is_run(columns) else mx.array(columns.astype(np.uint32))

        def product(name: str) -> mx.array:
            products = self._in_window(slab, name, low, high)
            return products[..., : len(ids)] if index is None else mx.take(products, index, axis=2)

        return self._scalars(ids, product)

    def _scalars(self, ids: np.ndarray, product: Callable[[str], mx.array]) -> mx.array:
        """h of ids (n,), where `product(part)` gives x . row of theirs, (1, T, n)."""
        spec = self._spec

        def bias(part: str) -> mx.array | None:
            whole = spec.biases[part]
            return None if whole is None else mx.take(whole, mx.array(ids.astype(np.uint32)))

        if self._gates is None and spec.first == "gate" and not spec.cutoff:
            return self._activation.times(_plus(product("gate"), bias("gate")), _plus(product("up"), bias("up")))
        if self._gates is not None:
            scalars = mx.take(self._gates, mx.array(ids.astype(np.uint32)), axis=2)
        else:
            scalars = self._lead(product(spec.first), bias(spec.first))
        return scalars if spec.second is None else scalars * self._follows(product(spec.second), bias(spec.second))

    def _selected(self, slab: MlxSlab, index: mx.array, part: str) -> mx.array:
        """x times copies of the rows `index` (n,) of a part, (1, T, n), in groups of one shape."""
        taken = slab.taken(part, index, len(index) // SCALAR_ROWS, across=True)
        return self._joined(taken.product(self._x))

    def _in_window(self, slab: MlxSlab, part: str, low: int, high: int) -> mx.array:
        """x times the rows low..high of a part where they lie, (1, 1, at least high - low), in groups of that shape."""
        groups = -(-(high - low) // SCALAR_ROWS)
        if low + groups * SCALAR_ROWS <= slab.rows:
            return self._joined(slab.view(part, low, groups, SCALAR_ROWS, across=True).product(self._x))
        # The slab ends within a group: its last rows, of which some have been in the group before.
        whole, last = (groups - 1) * SCALAR_ROWS, slab.rows - SCALAR_ROWS
        end = slab.view(part, last, 1, SCALAR_ROWS, across=True).product(self._x)[..., low + whole - last :]
        if not whole:
            return end
        begin = self._joined(slab.view(part, low, groups - 1, SCALAR_ROWS, across=True).product(self._x))
        return mx.concatenate([begin, end], axis=2)

    def _joined(self, products: mx.array) -> mx.array:
        """(n, T, m) as (1, T, n * m)."""
        return (products if self._one_token else products.swapaxes(0, 1)).reshape(1, self._tokens, -1)

    def _lead(self, product: mx.array, bias: mx.array | None) -> mx.array:
        """The leading part, from its products: bias, activation (unless that is the second part's) and cut-off."""
        product = _plus(product, bias)
        if not (self._spec.gated and self._spec.first == "up"):
            product = self._activation.alone(product)
        return mx.where(mx.abs(product) > self._spec.cutoff, product, 0) if self._spec.cutoff else product

    def _follows(self, product: mx.array, bias: mx.array | None) -> mx.array:
        """The second part, from its products: bias, and activation if it is the gate."""
        product = _plus(product, bias)
        return self._activation.alone(product) if self._spec.second == "gate" else product

    def down(self) -> None:
        """Add the terms of the ids given to `scalars` since the last `down`; they follow all earlier ones."""
        found, self._found = self._found, []
        if not found:
            return
        ids = found[0].ids if len(found) == 1 else np.concatenate([each.ids for each in found])
        order = np.argsort(ids)
        self._follow(int(ids[order[0]]), int(ids[order[-1]]) + 1)
        segments = self._segments[ids[order] // BLOCK]
        self._enter(int(segments[0]))
        if len(found) == 1 and found[0].run and self._rest is None and order[0] == 0 and is_run(order):
            for begin, end in runs(segments):
                self._enter(int(segments[begin]))
                row = int(found[0].rows[0]) + begin
                self._add_run(found[0].scalars[..., begin:end], found[0].slab, row, segments[begin:end])
            return
        starts = np.cumsum([0] + [each.scalars.shape[2] for each in found[:-1]])
        columns = np.concatenate([start + np.arange(len(each.ids)) for start, each in zip(starts, found, strict=True)])
        scalars = found[0].scalars if len(found) == 1 else mx.concatenate([f.scalars for f in found], axis=2)
        scalars = mx.take(scalars, mx.array(columns[order].astype(np.uint32)), axis=2)
        lagging = Lagging()
        for begin, end in pieces(len(ids), PIECE if self._one_token else BLOCK):
            down = gather(found, order[begin:end])
            for first, last in runs(segments[begin:end]):
                self._enter(int(segments[begin + first]))
                part = down if last - first == end - begin else down.rows(slice(first, last), 1)
                self._add_selected(scalars[..., begin + first : begin + last], part)
            if end < len(ids) and self._one_token:
                lagging.start(self._unfinished())

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
            h[...] = np.array(mx.concatenate([self._joined(some) for some in found], axis=2)[0].astype(mx.float32))

    def settle(self) -> None:
        """When it returns, nothing pending reads any slab."""
        if self._rest_in_place and self._rest is not None:
            scalars, down = self._rest
            self._rest = scalars, down.copy()
        self._rest_in_place = False
        mx.eval(self._unfinished())
        self._lazy_bytes = 0

    def result(self) -> mx.array:
        """The FFN's output, shape and dtype of x."""
        self._add_rest()
        if self._gate_slab is not None:
            self._gate_slab.unfinished = self._unfinished()
        total = self._sum.total(self._shape)
        if self._spec.down_bias is not None:
            total = total + self._spec.down_bias.astype(mx.float32)
        return total.astype(self._dtype).reshape(self._shape)

    def _unfinished(self) -> list[mx.array]:
        rest = [] if self._rest is None else [self._rest[0], *self._rest[1].arrays]
        return [*self._sum.arrays(), *(each.scalars for each in self._found), *rest]

    def _follow(self, first_id: int, end_id: int) -> None:
        # Terms out of order would give other bits, silently.
        if first_id < self._next_id:
            raise ValueError(f"ids are added in ascending order: {first_id} came after {self._next_id - 1}")
        self._next_id = end_id

    def _enter(self, segment: int) -> None:
        """Terms of `segment` come next: the last group of the one before is summed as it is."""
        if segment != self._segment:
            self._add_rest()
            self._segment = segment

    def _add_blocks(self, slab: MlxSlab, row: int, first_id: int, blocks: int, length: int) -> mx.array:
        """Add `blocks` times `length` ids that begin at `row`; returns their scalars (blocks, T, length)."""
        rows = blocks * length
        segments = self._segments[first_id // BLOCK :][:blocks]

        def product(name: str) -> mx.array:
            return slab.view(name, row, blocks, length, across=True).product(self._x)

        def bias(part: str) -> mx.array | None:
            whole = self._spec.biases[part]
            return None if whole is None else whole[first_id : first_id + rows].reshape(blocks, 1, length)

        first, second = self._spec.first, self._spec.second
        if self._spec.gated and not self._spec.cutoff:
            scalars = self._activation.times(_plus(product("gate"), bias("gate")), _plus(product("up"), bias("up")))
        else:
            scalars = self._lead(product(first), bias(first))
            if second is not None:
                scalars = scalars * self._follows(product(second), bias(second))
        self._add_rest()
        self._segment = int(segments[-1])
        if self._one_token:
            self._add_run(scalars.reshape(1, 1, rows), slab, row, np.repeat(segments, length))
            self._add_rest()
            return scalars
        self._sum.add(slab.view("down", row, blocks, length).product(scalars), segments)
        self._lazy_bytes += _block_bytes(self._x.shape[2], self._x.dtype.size, self._tokens)
        if self._lazy_bytes > LAZY_BYTES:
            self.settle()
        return scalars

    def _add_run(self, scalars: mx.array, slab: MlxSlab, row: int, segments: np.ndarray) -> None:
        """One token's h (1, 1, n) of these segments times the slab's rows row..: the groups of `_add_selected`, nothing
        is copied."""
        count = scalars.shape[2]
        groups, whole = count // self._down_rows, count - count % self._down_rows
        if groups:
            left = scalars[..., :whole].reshape(groups, 1, -1)
            products = slab.view("down", row, groups, self._down_rows).product(left)
            self._sum.add(products, segments[: whole : self._down_rows])
        if whole < count:
            self._rest = scalars[..., whole:], slab.view("down", row + whole, 1, count - whole)
            self._rest_in_place = True

    def _add_rest(self) -> None:
        if self._rest is not None:
            self._sum.add(self._rest[1].product(self._rest[0]), np.array([self._segment]))
            self._rest = None

    def _add_selected(self, scalars: mx.array, down: MlxRows) -> None:
        """h (1, T, n) times rows (1, n, d), by groups of so many consecutive selected ids; keeps what fills no group.

        The groups of a segment run on through several `down`s, so they do not depend on how the ids were dealt out to
        them.
        """
        if self._rest is not None:
            scalars = mx.concatenate([self._rest[0], scalars], axis=2)
            down = self._rest[1].followed_by(down)
        rows, count = self._down_rows, scalars.shape[2]
        groups, whole = count // rows, count - count % rows
        step = max(groups, 1) if self._one_token else 1
        for group in range(0, groups, step):
            part = slice(group * rows, (group + step) * rows)
            left = scalars[..., part].reshape(self._tokens, step, rows).swapaxes(0, 1)
            self._sum.add(down.rows(part, step).product(left), np.full(step, self._segment))
        self._rest = (scalars[..., whole:], down.rows(slice(whole, None), 1)) if whole < count else None
        self._rest_in_place = False


def _plus(product: mx.array, bias: mx.array | None) -> mx.array:
    return product if bias is None else product + bias


def _block_bytes(dim: int, item: int, tokens: int) -> int:
    """Temporaries of one block in prefill: gate, up and h (T, BLOCK), the partial in both types, the running sum."""
    return tokens * (3 * BLOCK * item + dim * (item + 8))


def cache_limit_bytes(dim: int) -> int:
    """How many bytes of freed buffers MLX may keep for a model of this width: 16 fp32 arrays of 256 tokens. By default
    it keeps as many as the machine's memory allows, on top of the budget. With none it would allocate again in every
    layer."""
    return 16 * 256 * dim * 4


class MlxBackend:
    """Slabs in memory that MLX allocates, written through; passes on MLX's default device."""

    name, compiles, executor, lazy = "mlx", False, None, True

    def slab(self, layout: Layout, rows: int, parts: Sequence[str]) -> MlxSlab:
        """Zeroed memory for `rows` bundles, these parts of each; rows may be 0. Hold it as long as its arrays."""
        return MlxSlab(layout, rows, parts)

    def slab_bytes(self, layout: Layout, rows: int, parts: Sequence[str]) -> int:
        """Bytes that `slab` takes."""
        return slab_bytes(layout, rows, parts)

    def ffn(self, spec: FFNSpec, x: mx.array) -> MlxPass | MlxGroupPass:
        """Begin one FFN on x (..., d). Raises ConfigError for an activation that is not known."""
        if spec.activation not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {spec.activation!r}; the mlx backend knows {', '.join(ACTIVATIONS)}")
        return MlxGroupPass(spec, x) if spec.layout.grouped else MlxPass(spec, x)

    def predictor(self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray) -> Predictor:
        """See `base.Backend.predictor`; int8 until it is used, products in fp32."""
        inner, outer, offset = mx.array(a), mx.array(b), mx.array(bias)
        mx.eval(inner, outer, offset)

        def begin(x: mx.array) -> Callable[[], np.ndarray]:
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            found = (rows @ inner.astype(mx.float32).T) @ outer.astype(mx.float32).T
            logits = mx.max(found, axis=0) * step + offset
            mx.async_eval(logits)
            return lambda: np.array(logits)

        return begin

    def shift(self, y: mx.array, offset: np.ndarray) -> mx.array:
        """y (..., d) plus offset (d,), in y's dtype."""
        return (y.astype(mx.float32) + mx.array(offset)).astype(y.dtype)

    def to_numpy(self, x: mx.array) -> np.ndarray:
        """x as fp32 in host memory."""
        return np.array(x.astype(mx.float32))

    def prefill_scratch_bytes(self, layout: Layout, widths: Widths, chunk: int, context: int) -> int:
        """An upper bound of what a prefill of `chunk` tokens takes beyond weights, slabs and KV cache: temporaries
        as if fp32, and the freed buffers that MLX keeps. A decoding step's copies of selected rows are covered too."""
        dim, chunk, block = widths.dim, min(chunk, context), _block_bytes(widths.dim, 4, min(chunk, context))
        # Where a segment ends within what MLX is given at once, it works on two: five more (T, BLOCK) were measured, on
        # Python 3.14, which frees a block's arrays later, eight.
        sums = 4 * chunk * ((Sum.LIVE - 1) * dim + 11 * BLOCK)
        ffn = min(-(-widths.intermediate // BLOCK) * block, LAZY_BYTES + block) + sums
        fused = available() and widths.head_dim in FUSED_HEAD_DIMS
        item = ITEM_BYTES[layout.dtype]
        scores = 0 if fused else 2 * item * widths.heads * chunk * context
        activations = 4 * chunk * (5 * dim + 5 * widths.qkv_rows)
        copies = 2 * min(PIECE, layout.count) * sum(part.nbytes for part in layout.parts)  # two pieces at once
        if layout.grouped:
            ffn, copies = scratch_bytes(layout, chunk, item), 0
        return max(max(ffn, scores) + activations, copies) + cache_limit_bytes(dim)
