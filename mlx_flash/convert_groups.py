"""`convert` of checkpoints that are quantised already: groups of neurons become bundles, byte for byte; or, if asked
for, all is made numbers again, for bundles of single neurons.

The scales of `down` are shared by `group_size` neurons, so that many make a bundle. Nothing is computed for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .affine import AffineRows
from .casting import from_float32
from .errors import ConfigError
from .models.families import ModelSpec
from .models.quantised import coded_names, coded_shapes, read_quantisation
from .source import DTYPE_OF, READ_ALIGN, Source, Tensor, read_buffer, safetensors_header
from .storage.header import TensorInfo
from .storage.layout import ITEM_BYTES, Layout, Quantisation, layer_header
from .storage.weights import VIEWS
from .storage.writer import HashedFile

BLOCK_BYTES = 8 << 20
TAGS = DTYPE_OF | {"U32": "uint32"}
QUANTISATION = ("quantization", "quantization_config")


def wanted_shapes(source: Source, spec: ModelSpec, quantisation: Quantisation) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a quantised checkpoint must have. Raises ConfigError for FFNs that cannot be
    cut into groups."""
    for layer, shape in enumerate(spec.layers):
        if shape.intermediate % quantisation.group_size or spec.dim % quantisation.group_size:
            raise ConfigError(
                f"{source.folder}: layer {layer} has {shape.intermediate} neurons of {spec.dim} items, which are no "
                f"whole groups of {quantisation.group_size}"
            )
    resident = spec.resident_shapes()
    found = coded_shapes(resident, coded_names(resident, source.tensors), quantisation)
    return found | coded_shapes(spec.ffn_shapes(), spec.ffn_shapes(), quantisation)


def scales_dtype(source: Source, spec: ModelSpec) -> str:
    """The dtype of the FFNs' scales. Raises ConfigError if there are several, or codes that are none."""
    found = set()
    for name in spec.ffn_shapes():
        module = name.removesuffix(".weight")
        tags = [source.tensors[f"{module}.{field}"].info.dtype for field in ("weight", "scales", "biases")]
        if tags[0] != "U32" or tags[1] != tags[2] or tags[1] not in DTYPE_OF:
            raise ConfigError(f"{name!r} is {tags[0]} with scales of {tags[1]} and biases of {tags[2]}, not quantised")
        found.add(DTYPE_OF[tags[1]])
    if len(found) > 1:
        raise ConfigError(f"{source.folder} mixes scales of {' and '.join(sorted(found))} in its FFNs")
    return found.pop()


def stored_dtype(source: Source, name: str) -> str:
    """A resident tensor's dtype; raises ConfigError for one that is not known."""
    tag = source.tensors[name].info.dtype
    if tag not in TAGS:
        raise ConfigError(f"tensor {name!r} is {tag}; known: {', '.join(TAGS)}")
    return TAGS[tag]


class GroupPipeline:
    """Writes layers as groups, and the resident tensors as they are. stored: their dtypes and shapes."""

    def __init__(self, source: Source, spec: ModelSpec, stored: Mapping[str, tuple[str, tuple[int, ...]]]):
        self.source, self.spec, self.stored = source, spec, stored
        self._memory = read_buffer(0)

    def layer(self, file: HashedFile, layout: Layout, index: int) -> None:
        """One layer's file, groups ascending; the codes of one `down` are in memory."""
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
        """model.safetensors: the tensors that are no bundles, under their names."""
        dtypes = {name: dtype for name, (dtype, _) in self.stored.items()}
        file.write(safetensors_header({name: shape for name, (_, shape) in self.stored.items()}, dtypes, self.stored))
        for name in self.stored:
            total = self.source.tensors[name].info.nbytes
            for start in range(0, total, BLOCK_BYTES):
                file.write(self._read(name, start, min(BLOCK_BYTES, total - start)).data)
        file.close()

    def finish(self) -> None:
        """All is written."""

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
    """A quantised checkpoint as if it were one of numbers, in the dtype of its scales."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.quantisation = read_quantisation(self.config)
        self.config = {key: value for key, value in self.config.items() if key not in QUANTISATION}
        self._coded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def open_tensors(self) -> None:
        super().open_tensors()
        assert self.quantisation is not None
        stored = self.tensors
        self.tensors = dict(stored)
        for name in coded_names(stored, stored):
            module = name.removesuffix(".weight")
            fields = stored[name], stored[module + ".scales"], stored[module + ".biases"]
            rows, columns = fields[0].info.shape[0], fields[1].info.shape[1] * self.quantisation.group_size
            tag = fields[1].info.dtype
            size = rows * columns * ITEM_BYTES[stored_dtype(self, module + ".scales")]
            info = TensorInfo(name, tag, (rows, columns), fields[0].info.offset, size)
            self._coded[name] = fields
            self.tensors[name] = Tensor(fields[0].path, info)
            del self.tensors[module + ".scales"], self.tensors[module + ".biases"]

    def read(self, name: str, start: int, count: int, memory: np.ndarray) -> np.ndarray:
        """See `Source.read`; what was quantised is computed, in memory of its own."""
        if name not in self._coded:
            return super().read(name, start, count, memory)
        assert self.quantisation is not None
        dtype, columns = self.dtype(name), self.tensors[name].info.shape[1]
        row = columns * ITEM_BYTES[dtype]
        first, last = start // row, -(-(start + count) // row)
        codes, scales, biases = (self._rows(tensor, first, last) for tensor in self._coded[name])
        wide = np.empty((last - first, columns), np.float32)
        AffineRows(codes, scales, biases, self.quantisation.bits).widen(wide)
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
