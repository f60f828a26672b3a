"""A mixture of experts as downloaded, on our own decoder: where its experts lie in the files, and its routers.

Families and names are in specs/mixtures.py; the backend computes. Nothing is loaded before `start`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import Slab, Widths
from mlx_flash.engine.backends.decoder_base import ExpertBackend
from mlx_flash.engine.numerics.affine import AffineRows
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.bundle import BITS, GROUP_SIZES, ITEM_BYTES, WORD_BITS, Layout, Part, Quantisation
from mlx_flash.engine.storage.extents import LayerExtents
from mlx_flash.engine.storage.header import TensorInfo
from mlx_flash.engine.storage.resident_tensors import DTYPES, load_tensors
from mlx_flash.errors import FormatError
from mlx_flash.models.specs.mixtures import MixtureSpec, read_mixture

from .decoder import FFN, Decoder, Layer

Tensors = Mapping[str, tuple[Path, TensorInfo]]
FLOAT_TAGS = ("F32", "F16", "BF16")
FLOATS = ("float32", "float16", "bfloat16")
IGNORED = (".rotary_emb.inv_freq",)  # what old checkpoints also hold, computed anew


@dataclass
class ExpertDecoder:
    """A mixture of experts whose files were checked; nothing has been loaded until `start`.

    extents, top_k, kinds: per layer with experts: where they are, how many a token uses, and a number that is the same
    for layers with equal experts. dtype: of the experts, and of the KV cache.
    """

    spec: MixtureSpec
    backend: ExpertBackend
    tensors: Tensors
    extents: list[LayerExtents]
    shapes: dict[str, tuple[int, ...]]
    dtype: str

    note = None  # for the user, about the checkpoint: the mlx backend has some

    @property
    def top_k(self) -> list[int]:
        return [self.spec.top_k] * len(self.extents)

    @property
    def kinds(self) -> list[int]:
        return [0] * len(self.extents)

    @property
    def foresees(self) -> bool:
        """Whether the next layer's choice can be guessed."""
        return len(self.extents) > 1

    @property
    def dense_bytes(self) -> int:
        return sum(self.tensors[name][1].nbytes for name in self.shapes)

    @property
    def page_bytes(self) -> int:
        """The most bytes that rounding slabs up to pages costs."""
        return mmap.PAGESIZE * (len(self.extents) + 1)

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
        experts = self.backend.expert_scratch_bytes(tokens, spec.dim, spec.width, spec.top_k)
        layout = self.extents[0].layout
        return self.backend.prefill_scratch_bytes(layout, widths, chunk, context) + experts + dense

    def slab(self, layer: int, rows: int) -> Slab | None:
        """Memory for `rows` experts of a layer; None for none."""
        return self.backend.expert_slab(self.extents[layer].layout, self.spec.part_shapes(), rows) if rows else None

    def start(self, make_selector: Callable[[int], RouterSelector], context: int) -> Decoder:
        """The model, its dense part in memory and its experts behind the selectors. Raises FormatError, ReadError."""
        selectors = [make_selector(layer) for layer in range(len(self.extents))]
        tensors = load_tensors(self.tensors, self.shapes, self.backend.from_bytes)
        for name, shape in self.spec.resident_shapes().items():
            _, scales, biases = affine_tensors(name)
            if scales in tensors:
                bits = WORD_BITS * tensors[name].shape[1] // shape[1]
                tensors[name] = AffineRows(tensors[name], tensors.pop(scales), tensors.pop(biases), bits)
        decoder = Decoder(self.spec, self.backend, tensors, self.dtype, context)
        waiting = iter(selectors)
        for index, count in enumerate(self.spec.experts):
            ffn: FFN = (
                ExpertFFN(decoder, self.backend, index, next(waiting))
                if count
                else DenseFFN(decoder, self.backend, index)
            )
            decoder.layers.append(Layer(decoder, index, ffn))
        return decoder


class ExpertFFN:
    """One layer's router and experts."""

    def __init__(self, decoder: Decoder, backend: ExpertBackend, index: int, selector: RouterSelector):
        assert isinstance(decoder.spec, MixtureSpec)
        self.spec, self.backend, self.selector = decoder.spec, backend, selector
        self.router = decoder.matrix("router", index)[0]
        if selector.look_ahead is not None:
            router = self.router
            selector.look_ahead.add_router(selector.layer, lambda x: backend.linear(x, router, None)[0])

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
        work = self.backend.expert_pass(self.spec.activation, x, chosen)
        for group in self.selector.groups(chosen, self.selector.shared.is_decode(x), x):
            work.add(group.ids, group.rows, group.slab)
        return work.result(weights)


class DenseFFN:
    """A layer without experts: its FFN is resident."""

    def __init__(self, decoder: Decoder, backend: ExpertBackend, index: int):
        self.backend, self.activation = backend, decoder.spec.activation
        self.gate, self.up, self.down = (decoder.matrix(role, index)[0] for role in ("gate", "up", "down"))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        h = self.backend.activate(self.activation, self.backend.linear(x, self.gate, None))
        h *= self.backend.linear(x, self.up, None)
        return self.backend.linear(h, self.down, None)


def open_experts(folder: Path, tensors: Tensors, config: Mapping[str, Any], backend: ExpertBackend) -> ExpertDecoder:
    """Where the experts of a folder lie, of a family that our decoder runs.

    tensors: every tensor of the folder's files, checked. config: its config.json. Raises ConfigError for one that is
    not known, FormatError for tensors that are not the model's.
    """
    spec = read_mixture(config, {name: info.shape for name, (_, info) in tensors.items()})
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.resident_shapes().items():
        shapes |= _check(folder, name, shape, tensors)
    used = shapes.keys() | set(affine_tensors("lm_head.weight"))
    extents = [_extents(folder, spec, layer, tensors, used) for layer in spec.sparse]
    strays = sorted(name for name in tensors.keys() - used if not name.endswith(IGNORED))
    if strays:
        raise FormatError(
            f"{folder}: {len(strays)} tensors are not those of a {spec.mixture.title}: {strays[0][:80]!r}"
        )
    if len({each.layout.parts for each in extents}) > 1:
        raise FormatError(f"{folder}: its layers hold experts of different precisions; convert the model to one")
    parts = extents[0].layout.parts
    dtypes = sorted({part.dtype for part in parts if part.dtype in FLOATS})
    gate, up = ([(part.dtype, part.length) for part in parts if part.name.startswith(name)] for name in ("gate", "up"))
    if len(dtypes) > 1 or gate != up:
        raise FormatError(f"{folder}: an expert's parts differ in precision; convert the model to one")
    return ExpertDecoder(spec, backend, tensors, extents, shapes, dtypes[0])


def _extents(folder: Path, spec: MixtureSpec, layer: int, tensors: Tensors, used: set[str]) -> LayerExtents:
    """Where a layer's experts are: stacked, or each in tensors of its own. Adds the tensors' names to `used`."""
    count, paths = spec.experts[layer], []
    parts, files, offsets = [], [], []
    for matrix, (rows, columns) in spec.part_shapes().items():
        stacked = spec.stacked_name(layer, matrix)
        together = stacked in tensors
        names = [stacked] if together else [spec.single_name(layer, matrix, e) for e in range(count)]
        lead = (count,) if together else ()
        shapes = [list(_check(folder, name, (*lead, rows, columns), tensors).items()) for name in names]
        for each in zip(*shapes, strict=False):  # the weights, or their codes, their scales, their biases
            found = [tensors[name] for name, _ in each]
            used.update(name for name, _ in each)
            kinds = {(info.dtype, info.shape) for _, info in found}
            if len(kinds) > 1 or len({len(shape) for shape in shapes}) > 1:
                raise FormatError(f"{folder}: the experts of {names[0]!r} are not all stored alike")
            part = Part(_part_name(matrix, each[0][0]), DTYPES[found[0][1].dtype], rows * each[0][1][-1])
            repeat, step = (count, part.nbytes) if together else (1, 0)
            paths += [path for path, _ in found if path not in paths]
            files.append([paths.index(path) for path, _ in found * repeat])
            offsets.append([info.offset + e * step for e, (_, info) in enumerate(found * repeat)])
            parts.append(part)
    layout = Layout(tuple(parts), count)
    return LayerExtents(tuple(paths), layout, np.array(files, np.int64), np.array(offsets, np.int64))


def _part_name(matrix: str, tensor: str) -> str:
    """gate for its weights or codes, gate.scales, gate.biases"""
    kind = tensor.rpartition(".")[2]
    return matrix if kind == "weight" else f"{matrix}.{kind}"


def affine_tensors(name: str) -> tuple[str, str, str]:
    """The tensors of a matrix `x.weight` where it is quantised: codes, scales, biases."""
    module = name.removesuffix("weight")
    return name, module + "scales", module + "biases"


def _check(folder: Path, name: str, shape: tuple[int, ...], tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk of what holds a tensor of this shape: itself, or its codes, scales and biases in MLX's
    affine format. Raises FormatError."""
    if name not in tensors:
        raise FormatError(f"{folder} lacks the tensor {name!r}, which its config.json asks for")
    _, scales, biases = affine_tensors(name)
    wanted: dict[str, tuple[int, ...]] = {name: shape}
    kinds: dict[str, tuple[str, ...]] = {name: FLOAT_TAGS}
    if scales in tensors and biases in tensors and len(shape) > 1:
        columns, words, groups = shape[-1], tensors[name][1].shape[-1], tensors[scales][1].shape[-1]
        known = [
            Quantisation(bits, size)
            for bits in BITS
            for size in GROUP_SIZES
            if (words, groups) == (columns * bits / WORD_BITS, columns / size)
        ]
        if not known:
            raise FormatError(f"{folder}: {name!r} has {words} words and {groups} groups for {columns} columns")
        wanted = {name: (*shape[:-1], words), scales: (*shape[:-1], groups), biases: (*shape[:-1], groups)}
        kinds = {name: ("U32",), scales: FLOAT_TAGS, biases: FLOAT_TAGS}
    for each, size in wanted.items():
        path, info = tensors[each]
        if tuple(info.shape) != size or info.dtype not in kinds[each]:
            raise FormatError(f"{path}: {each!r} is {info.dtype} {list(info.shape)}; the config asks for {list(size)}")
    return wanted
