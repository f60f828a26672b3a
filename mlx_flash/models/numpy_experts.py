"""A mixture of experts as downloaded, on our own decoder: where its experts lie in the files, and how tokens choose.

Families and names are in `mixtures`; what computes is the backend's. Nothing is loaded before `start`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Widths
from ..backends.kernels import activate
from ..backends.numpy import COUNTED_THREADS, NumpyBackend
from ..backends.numpy_experts import PARTS, ExpertPass, ExpertSlab, expert_scratch_bytes
from ..errors import FormatError
from ..selection.router import RouterSelector
from ..storage.extents import LayerExtents
from ..storage.layout import ITEM_BYTES, Layout, Part, TensorInfo
from ..storage.pinned import DTYPES, load_tensors
from .decoder import FFN, Decoder, Layer
from .mixtures import MixtureSpec, read_mixture

Tensors = Mapping[str, tuple[Path, TensorInfo]]
IGNORED = (".rotary_emb.inv_freq",)  # what old checkpoints also hold, computed anew


@dataclass
class ExpertDecoder:
    """A mixture whose experts have not been read, nor anything else.

    extents, top_k, kinds: per layer that has experts: where they are, how many a token uses, and a number that layers
    with equal experts share. dtype: of the experts, and of the KV cache.
    """

    spec: MixtureSpec
    tensors: Tensors
    extents: list[LayerExtents]
    dtype: str

    @property
    def top_k(self) -> list[int]:
        return [self.spec.top_k] * len(self.extents)

    @property
    def kinds(self) -> list[int]:
        return [0] * len(self.extents)

    @property
    def dense_bytes(self) -> int:
        return sum(self.tensors[name][1].nbytes for name in self.spec.resident_shapes())

    @property
    def page_bytes(self) -> int:
        """At most so much is lost to rounding slabs up to pages."""
        return 4096 * (len(self.extents) + 1)

    def slot_bytes(self, layer: int) -> int:
        return self.extents[layer].layout.stride

    def kv_bytes(self, tokens: int, chunk: int) -> int:
        return self.spec.kv_items_per_token * ITEM_BYTES[self.dtype] * tokens

    def scratch_bytes(self, chunk: int, context: int) -> int:
        """Most bytes that a prefill of `chunk` tokens takes beyond weights, slabs and KV cache."""
        spec, tokens = self.spec, min(chunk, context)
        layer = spec.layers[0]
        rows = (layer.heads + 2 * layer.kv_heads) * spec.head_dim
        dense = 0 if all(spec.experts) else 3 * 4 * tokens * layer.intermediate
        widths = Widths(spec.dim, layer.intermediate, rows, spec.head_dim, layer.heads)
        experts = expert_scratch_bytes(tokens, spec.dim, spec.width, spec.top_k, COUNTED_THREADS)
        layout = self.extents[0].layout
        return NumpyBackend().prefill_scratch_bytes(layout, widths, chunk, context) + experts + dense

    def slab(self, layer: int, rows: int) -> ExpertSlab | None:
        """Memory for `rows` experts of a layer."""
        return ExpertSlab(self.extents[layer].layout, self.spec.part_shapes(), rows) if rows else None

    def start(self, make_selector: Callable[[int], RouterSelector], context: int) -> Decoder:
        """The model, its dense part in memory and its experts behind the selectors. Raises FormatError, ReadError."""
        selectors = [make_selector(layer) for layer in range(len(self.extents))]
        backend: Any = selectors[0].shared.backend
        tensors = load_tensors(self.tensors, self.spec.resident_shapes(), backend.from_bytes)
        decoder = Decoder(self.spec, backend, tensors, self.dtype, context)
        waiting = iter(selectors)
        for index, count in enumerate(self.spec.experts):
            ffn: FFN = ExpertFFN(decoder, index, next(waiting)) if count else DenseFFN(decoder, index)
            decoder.layers.append(Layer(decoder, index, ffn))
        return decoder


class ExpertFFN:
    """One layer's router and experts."""

    def __init__(self, decoder: Decoder, index: int, selector: RouterSelector):
        assert isinstance(decoder.spec, MixtureSpec)
        self.spec, self.backend, self.selector = decoder.spec, decoder.backend, selector
        self.router = decoder.weight("router", index)[0]

    def route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (T, d) -> the experts chosen (T, k), best first, and their weights (T, k) fp32."""
        scores = self.backend.linear(x, self.router, None)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : self.spec.top_k]
        weights = np.take_along_axis(scores, chosen, axis=1)
        if self.spec.normalise:
            weights /= weights.sum(axis=1, keepdims=True)
        return chosen, weights

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (T, d) -> (T, d): an expert's weights are read once for all tokens."""
        chosen, weights = self.route(x)
        work = ExpertPass(self.backend, self.spec.activation, x, chosen)
        for group in self.selector.groups(chosen, self.selector.shared.is_decode(x)):
            work.add(group.ids, group.rows, group.slab)
        return work.result(weights)


class DenseFFN:
    """A layer without experts: its FFN is resident."""

    def __init__(self, decoder: Decoder, index: int):
        self.backend, self.activation = decoder.backend, decoder.spec.activation
        self.gate, self.up, self.down = (decoder.weight(role, index)[0] for role in PARTS)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        h = activate(self.activation, self.backend.linear(x, self.gate, None))
        h *= self.backend.linear(x, self.up, None)
        return self.backend.linear(h, self.down, None)


def open_experts(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> ExpertDecoder:
    """Where the experts of a folder lie, of a family that our decoder runs.

    tensors: every tensor of the folder's files, checked. config: its config.json. Raises ConfigError for one that is
    not known, FormatError for tensors that are not the model's.
    """
    spec = read_mixture(config, {name: info.shape for name, (_, info) in tensors.items()})
    used = set(spec.resident_shapes()) | {"lm_head.weight"}
    for name, shape in spec.resident_shapes().items():
        _check(folder, name, shape, tensors)
    extents = [_extents(folder, spec, layer, tensors, used) for layer in spec.sparse]
    strays = sorted(name for name in tensors.keys() - used if not name.endswith(IGNORED))
    if strays:
        raise FormatError(
            f"{folder}: {len(strays)} tensors are not those of a {spec.mixture.title}: {strays[0][:80]!r}"
        )
    dtypes = sorted({part.dtype for each in extents for part in each.layout.parts})
    if len(dtypes) > 1:
        raise FormatError(f"{folder}: its experts are {' and '.join(dtypes)}; convert the model to one precision")
    return ExpertDecoder(spec, tensors, extents, dtypes[0])


def _extents(folder: Path, spec: MixtureSpec, layer: int, tensors: Tensors, used: set[str]) -> LayerExtents:
    """Where a layer's experts are: stacked, or each in tensors of its own. Adds the tensors' names to `used`."""
    count, paths = spec.experts[layer], []
    parts, files, offsets = [], [], []
    for name, (rows, columns) in spec.part_shapes().items():
        stacked = spec.stacked_name(layer, name)
        names = [stacked] if stacked in tensors else [spec.single_name(layer, name, e) for e in range(count)]
        shape = (count, rows, columns) if stacked in tensors else (rows, columns)
        found = [_check(folder, each, shape, tensors) for each in names]
        used.update(names)
        dtypes = {info.dtype for _, info in found}
        if len(dtypes) > 1:
            raise FormatError(f"{folder}: the experts of {names[0]!r} are {' and '.join(sorted(dtypes))}, not alike")
        part = Part(name, DTYPES[found[0][1].dtype], rows * columns)
        repeat, step = (count, part.nbytes) if stacked in tensors else (1, 0)
        paths += [path for path, _ in found if path not in paths]
        files.append([paths.index(path) for path, _ in found * repeat])
        offsets.append([info.offset + e * step for e, (_, info) in enumerate(found * repeat)])
        parts.append(part)
    layout = Layout(tuple(parts), count)
    return LayerExtents(tuple(paths), layout, np.array(files, np.int64), np.array(offsets, np.int64))


def _check(folder: Path, name: str, shape: tuple[int, ...], tensors: Tensors) -> tuple[Path, TensorInfo]:
    """The tensor, which must have this shape and a floating dtype. Raises FormatError."""
    if name not in tensors:
        raise FormatError(f"{folder} lacks the tensor {name!r}, which its config.json asks for")
    path, info = tensors[name]
    if tuple(info.shape) != shape or info.dtype not in DTYPES:
        raise FormatError(f"{path}: {name!r} is {info.dtype} {list(info.shape)}; the config asks for {list(shape)}")
    return path, info
