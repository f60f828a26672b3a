"""The numpy backend: an FFN's arithmetic on slots, and a decoder's, in fp32.

Weights stay in their storage dtype; what decoding spends its time in is in `kernels`. Prefill widens small blocks and
uses BLAS, always with the same shapes, so that results depend on neither budget nor slots. Knows no files, no models.
Used by one thread at a time; one FFN pass is finished before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from mlx_flash.engine.backends.base import BLOCK, FFNSpec, Predictor, Widths
from mlx_flash.engine.backends.decoder_base import Activations, Attention
from mlx_flash.engine.backends.numpy.kernels import base as kernels
from mlx_flash.engine.backends.numpy.kernels.base import Weights
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.bundle_weights import VIEWS

from .decode_pass import BlockSums, DecodePass
from .expert_pass import NumpyExpertPass, NumpyExpertSlab, expert_scratch_bytes
from .group_pass import GroupDecode, GroupPrefill
from .prefill_pass import TILE_COLUMNS, PrefillPass, SegmentTree
from .prefill_pass import TILE_ROWS as PREFILL_ROWS
from .slab import NumpySlab, slab_bytes
from .tiles import Scratch, Tiles

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # that kernels multiply
TILE_ROWS = 256  # of weights, widened for one product
# A budget must not depend on how many cores a machine has: what further threads take counts as the libraries', as
# BLAS's own buffers do.
COUNTED_THREADS = 2


class NumpyBackend:
    """See `decoder_base.ExpertBackend`. T tokens, H heads of size hd; activations are fp32.

    numba: as in `kernels.base.load`.
    """

    name, lazy = "numpy", False

    def __init__(self, numba: bool | None = None):
        self.kernels = kernels.load(numba)
        self.compiles, self.executor = self.kernels.name == "numba", self.kernels.executor
        self.tiles = Tiles()
        self._sums = BlockSums()

    @property
    def threads(self) -> int:
        """Threads that one kernel or product uses."""
        return self.kernels.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self.kernels.threads = self.tiles.threads = count

    def slab(self, layout: Layout, rows: int, parts: Sequence[str]) -> NumpySlab:
        """Memory for `rows` bundles, these parts of each: a run of the layout's, else ValueError."""
        return NumpySlab(layout, rows, parts)

    def slab_bytes(self, layout: Layout, rows: int, parts: Sequence[str]) -> int:
        """Bytes that `slab` would take, in whole pages."""
        return slab_bytes(layout, rows, parts)

    def ffn(self, spec: FFNSpec, x: np.ndarray) -> DecodePass | PrefillPass | GroupDecode:
        """Begin one FFN on x (T, d)."""
        if spec.layout.neurons > 1:
            return GroupDecode(self.kernels, spec, x) if len(x) == 1 else GroupPrefill(self.tiles, spec, x)
        if len(x) == 1:
            return DecodePass(self.kernels, spec, x, self._sums)
        return PrefillPass(self.tiles, spec, x)

    def predictor(self, a: np.ndarray, b: np.ndarray, step: float, bias: np.ndarray) -> Predictor:
        """See `base.Backend.predictor`."""
        low_rank = self.kernels.low_rank(a, b, step, bias)

        def begin(x: np.ndarray) -> Callable[[], np.ndarray]:
            tokens = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
            if len(tokens) == 1:
                return low_rank(tokens[0])
            return lambda: np.max([low_rank(token)() for token in tokens], axis=0)

        return begin

    def shift(self, y: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """y (T, d) plus offset (d,)."""
        return y + offset

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        """x itself: activations are fp32 here."""
        return x

    def from_bytes(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The weights in these bytes, a view. raw (nbytes,) uint8; dtype: as in `VIEWS`."""
        return raw.view(VIEWS[dtype]).reshape(shape)

    def to_float32(self, w: Weights) -> np.ndarray:
        """Weights as fp32: themselves, or a widened copy."""
        if isinstance(w, np.ndarray) and w.dtype == np.float32:
            return w
        out = np.empty(w.shape, np.float32)
        kernels.widen(w, out)
        return out

    def linear(self, x: np.ndarray, w: Weights, bias: np.ndarray | None = None) -> np.ndarray:
        """x (T, n), w (rows, n), bias (rows,) -> (T, rows)."""
        if len(x) == 1:
            out = self.kernels.dots(w, None, np.ascontiguousarray(x[0]))[None]
        else:
            out = np.empty((len(x), len(w)), np.float32)

            def tile(scratch: Scratch, k: int) -> None:
                rows = slice(k * TILE_ROWS, (k + 1) * TILE_ROWS)
                np.matmul(x, scratch.wide(w[rows]).T, out=out[:, rows])

            self.tiles.each(-(-len(w) // TILE_ROWS), tile)
        if bias is not None:
            out += self.to_float32(bias)
        return out

    def embed(self, w: Weights, ids: np.ndarray) -> np.ndarray:
        """Rows `ids` (T,) of w (V, d) -> (T, d)."""
        return self.to_float32(w[np.asarray(ids)])

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x (..., n), weight (n,) -> (..., n): x / rms(x) * weight."""
        return self.kernels.norm(x, self.to_float32(weight), eps)

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
        """x (..., n), weight and bias (n,) -> (..., n)."""
        out = x - np.mean(x, axis=-1, keepdims=True)
        out /= np.sqrt(np.mean(np.square(out), axis=-1, keepdims=True) + np.float32(eps))
        out *= self.to_float32(weight)
        out += self.to_float32(bias)
        return out

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Rotary positions, half-split. x (T, H, hd), cos and sin (T, hd/2) -> (T, H, hd)."""
        half = x.shape[-1] // 2
        a, b, cos, sin = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
        out = np.empty(x.shape, np.float32)
        np.subtract(a * cos, b * sin, out=out[..., :half])
        np.add(b * cos, a * sin, out=out[..., half:])
        return out

    def new_cache(self, kv_heads: int, context: int, head_dim: int, dtype: str) -> np.ndarray:
        """Keys or values of one layer, zeroed: (kv_heads, context, head_dim) in a storage dtype."""
        return np.zeros((kv_heads, context, head_dim), DTYPES[dtype])

    def store(self, cache: np.ndarray, start: int, values: np.ndarray) -> None:
        """Write values (T, kv_heads, hd) at positions start.., rounded to nearest even."""
        kernels.narrow(values.transpose(1, 0, 2), cache[:, start : start + len(values)])

    def attend(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int, window: int | None = None
    ) -> np.ndarray:
        """Causal attention: query t, at position start + t, sees keys 0..start + t, or the last `window` of them.
        q (T, H, hd); keys, values (kv_heads, context, hd), head h uses h // (H / kv_heads) -> (T, H, hd)."""
        tokens, heads, size = q.shape
        end, group = start + tokens, heads // len(keys)
        first = 0 if window is None else max(0, start + 1 - window)
        keys, values, start, end = keys[:, first:], values[:, first:], start - first, end - first
        later = np.triu(np.ones((tokens, tokens), bool), 1)
        earlier = None if window is None else np.tri(tokens, end, start - window, dtype=bool)
        out = np.empty(q.shape, np.float32)

        def attend_head(scratch: Scratch, head: int) -> None:
            scores = scratch.get("scores", (tokens, end))
            np.matmul(q[:, head] * np.float32(size**-0.5), scratch.wide(keys[head // group, :end]).T, out=scores)
            scores[:, start:][later] = -np.inf
            if earlier is not None:
                scores[earlier] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            total = scores.sum(axis=1, keepdims=True)
            out[:, head] = (scores @ scratch.wide(values[head // group, :end])) / total

        self.tiles.each(heads, attend_head)
        return out

    def attention(self, layer: Attention, memory: Activations) -> Callable[[], None] | None:
        """See `kernels.base.Kernels.attention`."""
        return self.kernels.attention(layer, memory)

    def decode(self, step: Callable[[], None]) -> None:
        """Run what `attention` gave."""
        step()

    def products(self) -> AbstractContextManager[None]:
        """Within, prompts run fastest: see `Tiles.products`."""
        return self.tiles.products()

    def activate(self, name: str, values: np.ndarray) -> np.ndarray:
        """See `ExpertBackend.activate`."""
        return kernels.activate(name, values)

    def expert_slab(self, layout: Layout, shapes: Mapping[str, tuple[int, int]], rows: int) -> NumpyExpertSlab:
        """Memory for `rows` experts of matrices of these shapes."""
        return NumpyExpertSlab(layout, shapes, rows)

    def expert_pass(self, activation: str, x: np.ndarray, chosen: np.ndarray) -> NumpyExpertPass:
        """Begin one layer's experts on x (T, d); chosen (T, k)."""
        return NumpyExpertPass(self.kernels, self.tiles, activation, x, chosen)

    def expert_scratch_bytes(self, tokens: int, dim: int, width: int, top_k: int) -> int:
        """Most bytes that an expert pass over so many tokens takes beyond slabs."""
        return expert_scratch_bytes(tokens, dim, width, top_k, COUNTED_THREADS)

    def prefill_scratch_bytes(self, layout: Layout, widths: Widths, chunk: int, context: int) -> int:
        """Most bytes that a prefill of `chunk` tokens takes beyond weights, slabs and KV cache; `layout` is not looked
        at, everything is fp32 here. BLAS's own buffers, and those of more than two threads, belong to the libraries."""
        dim, tokens = widths.dim, min(chunk, context)
        wide = 4 * max(TILE_ROWS * max(dim, widths.qkv_rows), context * widths.head_dim)
        products = 4 * tokens * (PREFILL_ROWS + min(TILE_COLUMNS, dim) + context + 3 * widths.head_dim)
        ffn = 4 * tokens * (2 * BLOCK + (1 + SegmentTree.LIVE) * dim)
        activations = 4 * tokens * (5 * dim + 5 * widths.qkv_rows) + 2 * tokens * tokens
        rotations = 8 * context * widths.head_dim
        return COUNTED_THREADS * (wide + products) + ffn + activations + rotations + (1 << 20)
