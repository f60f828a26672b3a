"""Conversion of checkpoints that are quantised already: groups of neurons become bundles, copied byte for byte.

The scales of `down` are shared by `group_size` neurons, so a bundle is that many neurons. With `requantise` the weights
are made numbers again, for bundles of single neurons.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlx_flash.engine.numerics.casting import from_float32
from mlx_flash.engine.storage.bundle import AFFINE, ITEM_BYTES, Layout, Part, Quantisation, layer_header, with_codings
from mlx_flash.engine.storage.bundle_weights import VIEWS, wide_codes
from mlx_flash.engine.storage.header import TensorInfo
from mlx_flash.engine.storage.writer import HashedFile
from mlx_flash.errors import ConfigError
from mlx_flash.models.specs.config_reader import family_of, read_spec
from mlx_flash.models.specs.dense_families import DENSE
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.quantisation import check_no_small_floats, find_codings, plain_shapes, read_quantisation
from mlx_flash.models.specs.source import DTYPE_OF, READ_ALIGN, Source, Tensor, read_buffer, safetensors_header

BLOCK_BYTES = 8 << 20
TAGS = DTYPE_OF | {"U32": "uint32", "U8": "uint8"}
QUANTISATION = ("quantization", "quantization_config")
PLAIN_NEURONS = 64  # at most, to a bundle where no scales say how many belong together

Codings = Mapping[str, Quantisation]


def known_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices, where the config gives them. Codes of one shape can be several matrices' shapes."""
    if family_of(source.config) in DENSE:
        return {}
    spec = read_spec(source.config, source.shapes)
    return spec.resident_shapes() | spec.ffn_shapes()


def group_layouts(source: Source, spec: ModelSpec, codings: Codings) -> tuple[Layout, ...]:
    """The layers' bundles: as many neurons as share `down`'s scales. Raises ConfigError for FFNs that cannot be cut
    into groups."""
    sizes = []
    for layer in range(len(spec.layers)):
        refs = spec.ffn_sources(layer)
        turned = [role for role, ref in refs.items() if ref.transposed]
        if turned != ["down"]:
            raise ConfigError(
                f"{source.folder}: the FFNs of {spec.table.title} are stored the other way round, and quantised they "
                "cannot be cut into groups; use the original checkpoint"
            )
        coded = codings.get(refs["down"].name)
        sizes.append(None if coded is None else coded.group_size)
    usual = max((size for size in sizes if size), default=PLAIN_NEURONS)
    layouts = []
    for layer, size in enumerate(sizes):
        count, refs = spec.layers[layer].intermediate, spec.ffn_sources(layer)
        neurons = size or (usual if count % usual == 0 else math.gcd(count, PLAIN_NEURONS))
        matrices = [part.name for part in spec.layout(layer, "float32").parts]
        each = [codings.get(refs[name].name) for name in matrices]
        parts = tuple(
            Part(name, _numbers(source, refs[name].name, coded), spec.dim)
            for name, coded in zip(matrices, each, strict=True)
        )
        layouts.append(with_codings(Layout(parts, count), each, neurons))
    return tuple(layouts)


def _numbers(source: Source, name: str, coded: Quantisation | None) -> str:
    """The dtype of an FFN's matrix, or of its scales; bfloat16 where the scales are codes too. Raises ConfigError for
    tensors that are not quantised as config.json says."""
    if coded is None:
        return source.dtype(name)
    if coded.mode != AFFINE:
        return "bfloat16"
    module = name.removesuffix(".weight")
    codes, scales, biases = (source.tensors[f"{module}.{field}"].info.dtype for field in ("weight", "scales", "biases"))
    if codes != "U32" or scales != biases or scales not in DTYPE_OF:
        raise ConfigError(f"{name!r} is {codes} with scales of {scales} and biases of {biases}, not quantised")
    return DTYPE_OF[scales]


def numbers_dtype(source: Source, spec: ModelSpec, layouts: Sequence[Layout]) -> str:
    """The dtype to compute in: that of the FFNs' scales, or where the scales are codes, the most frequent one among the
    resident tensors that are numbers."""
    found = {part.dtype for layout in layouts for part in layout.parts if part.dtype in DTYPE_OF.values()}
    if found:
        return max(sorted(found), key=lambda dtype: ITEM_BYTES[dtype])
    return usual_dtype(source)


def usual_dtype(source: Source) -> str:
    """The most frequent dtype among the tensors that are numbers; bfloat16 where there are none."""
    tags = Counter(tensor.info.dtype for tensor in source.tensors.values() if tensor.info.dtype in DTYPE_OF)
    return DTYPE_OF[tags.most_common(1)[0][0]] if tags else "bfloat16"


def stored_dtype(source: Source, name: str) -> str:
    """A resident tensor's dtype; raises ConfigError for one that is not known."""
    tag = source.tensors[name].info.dtype
    if tag not in TAGS:
        raise ConfigError(f"tensor {name!r} is {tag}; known: {', '.join(TAGS)}")
    return TAGS[tag]


class GroupPipeline:
    """Writes layers as groups of neurons, and the resident tensors unchanged. stored: their dtypes and shapes."""

    def __init__(self, source: Source, spec: ModelSpec, stored: Mapping[str, tuple[str, tuple[int, ...]]]):
        self.source, self.spec, self.stored = source, spec, stored
        self._memory = read_buffer(0)

    def layer(self, file: HashedFile, layout: Layout, index: int) -> None:
        """Write one layer's file, groups ascending. The codes of its `down` are in memory meanwhile."""
        file.write(layer_header(layout))
        refs = self.spec.ffn_sources(index)
        down = self._down(layout, refs["down"].name)
        step = max(1, BLOCK_BYTES // layout.stride)
        for first in range(0, layout.count, step):
            count = min(step, layout.count - first)
            out = np.zeros((count, layout.stride), np.uint8)
            for matrix in layout.matrices:
                for name in layout.parts_of(matrix):
                    part, at = layout.part(name), layout.offset(name)
                    mine = out[:, at : at + part.nbytes]
                    if matrix == "down":
                        items = np.ascontiguousarray(down[name][:, first : first + count].swapaxes(0, 1))
                        mine[...] = items.reshape(count, -1).view(np.uint8)
                    else:
                        row = part.nbytes // layout.neurons
                        begin = refs[matrix].first_row * row + first * part.nbytes
                        mine[...] = self._read(_field(refs[matrix].name, name), begin, mine.size).reshape(mine.shape)
            file.write(out.data)
        file.close()

    def _down(self, layout: Layout, tensor: str) -> dict[str, np.ndarray]:
        """Codes, scales and biases of the whole matrix by groups of columns, (d, count, items of a group)."""
        found = {}
        for name in layout.parts_of("down"):
            part = layout.part(name)
            raw = self._read(_field(tensor, name), 0, layout.count * part.nbytes)
            found[name] = raw.view(VIEWS[part.dtype]).reshape(layout.dim, layout.count, -1).copy()
        return found

    def resident(self, file: HashedFile) -> None:
        """Write model.safetensors: the resident tensors, under their names."""
        dtypes = {name: dtype for name, (dtype, _) in self.stored.items()}
        file.write(safetensors_header({name: shape for name, (_, shape) in self.stored.items()}, dtypes, self.stored))
        for name in self.stored:
            total = self.source.tensors[name].info.nbytes
            for start in range(0, total, BLOCK_BYTES):
                file.write(self._read(name, start, min(BLOCK_BYTES, total - start)).data)
        file.close()

    def finish(self) -> None:
        """Nothing is left to write."""

    def _read(self, name: str, start: int, count: int) -> np.ndarray:
        """Good until the next read."""
        if self._memory.size < count + 2 * READ_ALIGN:
            self._memory = read_buffer(count)
        return np.ascontiguousarray(self.source.read(name, start, count, self._memory))


def _field(tensor: str, part: str) -> str:
    """The tensor that holds a part: `x.weight` for `gate`, `x.scales` for `gate.scales`."""
    _, dot, field = part.partition(".")
    return tensor.removesuffix("weight") + field if dot else tensor


class Dequantised(Source):
    """A quantised checkpoint, read as numbers in the dtype of its scales."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.entries = read_quantisation(self.config)
        self.config = {key: value for key, value in self.config.items() if key not in QUANTISATION}
        self._coded: dict[str, tuple[Quantisation, list[Tensor]]] = {}

    def open_tensors(self) -> None:
        super().open_tensors()
        stored, usual = self.tensors, usual_dtype(self)
        infos = {name: tensor.info for name, tensor in stored.items()}
        check_no_small_floats(infos)
        codings = find_codings(self.entries, infos, known_shapes(self))
        shapes = plain_shapes(infos, codings)
        self.tensors = {}
        for name, shape in shapes.items():
            coded = codings.get(name)
            if coded is None:
                self.tensors[name] = stored[name]
                continue
            module = name.removesuffix(".weight")
            fields = [stored[name], *(stored[f"{module}.{field}"] for field in coded.fields)]
            tags = {name: tag for tag, name in DTYPE_OF.items()}
            tag = fields[1].info.dtype if coded.mode == AFFINE else tags[usual]
            if tag not in DTYPE_OF:
                raise ConfigError(f"tensor '{module}.scales' is {tag}; known: {', '.join(DTYPE_OF)}")
            size = math.prod(shape) * ITEM_BYTES[DTYPE_OF[tag]]
            self._coded[name] = coded, fields
            self.tensors[name] = Tensor(fields[0].path, TensorInfo(name, tag, shape, fields[0].info.offset, size))

    def read(self, name: str, start: int, count: int, memory: np.ndarray) -> np.ndarray:
        """See `Source.read`. Rows that are quantised are widened, into new memory."""
        if name not in self._coded:
            return super().read(name, start, count, memory)
        coded, fields = self._coded[name]
        dtype, columns = self.dtype(name), self.tensors[name].info.shape[1]
        row = columns * ITEM_BYTES[dtype]
        first, last = start // row, -(-(start + count) // row)
        wide = wide_codes([self._rows(tensor, first, last) for tensor in fields], coded)
        items = from_float32(wide, dtype).reshape(-1).view(np.uint8)
        return items[start - first * row : start - first * row + count]

    def _rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        info = tensor.info
        row = info.nbytes // info.shape[0]
        stored, self.tensors = self.tensors, {info.name: tensor}
        try:
            raw = super().read(info.name, first * row, (last - first) * row, read_buffer((last - first) * row))
        finally:
            self.tensors = stored
        return np.ascontiguousarray(raw).view(VIEWS[TAGS[info.dtype]]).reshape(last - first, -1)
