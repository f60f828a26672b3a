"""The layout of bundles: the parts of a bundle, and its place in its layer's file. Knows no models or backends.

A layer's file is plain safetensors: one U8 tensor "bundles" [count, stride], header padded so that data
starts at 16 KiB, and bundle i at 16 KiB + i * stride. A neuron's parts lie back to back: gate row, up row, down column
(no gate in a plain FFN). The stride is the bundle rounded up to 512 bytes, so that direct I/O can read any bundle ("LLM
in a flash", section 3.2, row-column bundling).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlx_flash.errors import FormatError

from .header import TensorInfo, read_header
from .json_file import format_error

FORMAT_VERSION = 1
QUANTISED_VERSION = 2  # an older release must not try to read these
MIXED_VERSION = 3  # quantised otherwise than to 4 or 8 bits, alike in all matrices: the same
ALIGN = 512
DATA_START = 16384
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "uint8": 1}
MAX_COUNT = (1 << 31) - 1  # ids are int32 in the residency
MAX_PART_ITEMS = 1 << 40
MAX_NEURONS = 256  # of a bundle: whole blocks of the sum
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)  # that `convert -q` writes, and that the numpy backend computes with
WORD_BITS = 32
AFFINE = "affine"
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
SCALE_ONLY_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # MLX's other modes: bits, group size


@dataclass(frozen=True)
class Quantisation:
    """One of MLX's formats: `group_size` consecutive items of a row share a scale, and in the affine mode a bias; an
    item is a code of `bits` in 32-bit words, the first item in the lowest bits, without gaps between items."""

    bits: int
    group_size: int
    mode: str = AFFINE

    @property
    def known(self) -> bool:
        """Whether this is one of MLX's formats."""
        if self.mode == AFFINE:
            return self.bits in AFFINE_BITS and self.group_size in GROUP_SIZES
        return SCALE_ONLY_MODES.get(self.mode) == (self.bits, self.group_size)

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays that are stored with the codes."""
        return ("scales", "biases") if self.mode == AFFINE else ("scales",)

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size} ({self.mode})"

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        return found if self.mode == AFFINE else found | {"mode": self.mode}

    def words(self, items: int) -> int:
        """32-bit words that hold the codes of so many items."""
        return items * self.bits // WORD_BITS

    def groups(self, items: int) -> int:
        return items // self.group_size


@dataclass(frozen=True)
class Part:
    """One tensor's share of a bundle: `length` items of `dtype`."""

    name: str
    dtype: str
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """The parts of each bundle of one layer, and how many bundles there are.

    quantisation: where the weights are codes: matrix `gate` is then the parts `gate` (uint32 codes), `gate.scales` and
    `gate.biases`. neurons: per bundle; with more than one, `down` is quantised along them: its codes are d rows of
    `neurons` items, and a row has one scale and one bias.

    codings: of each matrix, where they are not all quantised alike; None for one that is not quantised. `down` then
    has d rows of `neurons` items too, quantised or not, and `quantisation` is None.
    """

    parts: tuple[Part, ...]
    count: int
    quantisation: Quantisation | None = None
    neurons: int = 1
    codings: tuple[Quantisation | None, ...] = ()

    @property
    def coded(self) -> bool:
        """Whether any matrix is quantised."""
        return self.quantisation is not None or any(self.codings)

    @property
    def grouped(self) -> bool:
        """Whether a bundle's `down` is d rows of its neurons, and not one row of d items per neuron."""
        return self.neurons > 1 or bool(self.codings)

    @property
    def version(self) -> int:
        """The least format version of a checkpoint that holds such bundles."""
        if not self.coded and not self.grouped:
            return FORMAT_VERSION
        alike = self.quantisation
        if alike is None or alike.mode != AFFINE or alike.bits not in BITS:
            return MIXED_VERSION
        return QUANTISED_VERSION if self.neurons in (1, alike.group_size) else MIXED_VERSION

    def coding(self, matrix: str) -> Quantisation | None:
        """How a matrix is quantised; None if it is not."""
        return self.codings[self.matrices.index(matrix)] if self.codings else self.quantisation

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the matrices: gate, up and down, or some of them."""
        return tuple(part.name for part in self.parts if "." not in part.name)

    def parts_of(self, matrix: str) -> list[str]:
        """The names of the parts that hold a matrix' share."""
        return [part.name for part in self.parts if part.name.partition(".")[0] == matrix]

    def matrix_bytes(self, matrix: str) -> int:
        return sum(self.part(name).nbytes for name in self.parts_of(matrix))

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic: that of the weights, or of their scales. In the modes without biases the scales
        are bytes, and MLX computes in the dtype of its input: usually bfloat16, which is returned then."""
        return next((part.dtype for part in self.parts if part.dtype not in ("uint32", "uint8")), "bfloat16")

    @property
    def dim(self) -> int:
        """The width of a neuron's rows, in items."""
        first = self.parts[0]
        coded = self.coding(first.name)
        return (first.length if coded is None else first.length * WORD_BITS // coded.bits) // self.neurons

    @property
    def bundle_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @cached_property
    def stride(self) -> int:
        return -(-self.bundle_bytes // ALIGN) * ALIGN

    @property
    def file_bytes(self) -> int:
        return DATA_START + self.count * self.stride

    def offset(self, name: str) -> int:
        """Where part `name` begins within a bundle, in bytes."""
        at = 0
        for part in self.parts:
            if part.name == name:
                return at
            at += part.nbytes
        raise KeyError(name)

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def segments(self, names: Collection[str]) -> list[tuple[int, int]]:
        """The (offset, nbytes) in a bundle that these parts take, ascending; neighbours are one segment."""
        unknown = set(names) - {part.name for part in self.parts}
        if unknown:
            raise KeyError(sorted(unknown)[0])
        found: list[tuple[int, int]] = []
        at = 0
        for part in self.parts:
            if part.name in names:
                if found and sum(found[-1]) == at:
                    found[-1] = (found[-1][0], found[-1][1] + part.nbytes)
                else:
                    found.append((at, part.nbytes))
            at += part.nbytes
        return found

    def to_json(self) -> dict[str, Any]:
        """This layout as config.json holds it."""
        parts = [{"name": part.name, "dtype": part.dtype, "length": part.length} for part in self.parts]
        found: dict[str, Any] = {"count": self.count, "stride": self.stride, "parts": parts}
        if self.codings:
            pairs = zip(self.matrices, self.codings, strict=True)
            found["quantization"] = {name: None if coded is None else coded.to_json() for name, coded in pairs}
            found["neurons"] = self.neurons
        elif self.quantisation is not None:
            found["quantization"] = self.quantisation.to_json()
            found["neurons"] = self.neurons
        return found

    @classmethod
    def from_json(cls, value: Any) -> Layout:
        """The layout that `to_json` wrote; raises FormatError naming the field for anything else."""
        coded = isinstance(value, dict) and "quantization" in value
        _need_fields(
            value, "a layout", {"count", "stride", "parts"} | ({"quantization", "neurons"} if coded else set())
        )
        if not isinstance(value["parts"], list) or not value["parts"]:
            raise format_error("layout", f"has the parts {str(value['parts'])[:80]}, which is no list of at least one")
        layout = cls(tuple(_part(entry) for entry in value["parts"]), _size(value["count"], "count", MAX_COUNT))
        if coded:
            layout = _quantised(layout, value["quantization"], value["neurons"])
        names = [part.name for part in layout.parts]
        if len(set(names)) != len(names):
            raise format_error("layout", f"names a part twice: {', '.join(names)[:200]}")
        if type(value["stride"]) is not int or value["stride"] != layout.stride:
            raise format_error("layout", f"has the stride {str(value['stride'])[:40]}, its parts need {layout.stride}")
        return layout


def quantised(layout: Layout, quantisation: Quantisation, neurons: int = 1) -> Layout:
    """The layout of the same weights as codes, `neurons` of them to a bundle. Raises FormatError where the shapes
    cannot be quantised so."""
    return with_codings(layout, [quantisation] * len(layout.parts), neurons)


def with_codings(layout: Layout, codings: Sequence[Quantisation | None], neurons: int) -> Layout:
    """A plain layout's weights, each matrix as codes or (None) as it is, `neurons` to a bundle. Raises FormatError
    where the shapes cannot be quantised so."""
    dim = layout.dim
    if layout.count % neurons:
        raise FormatError(f"{layout.count} neurons are no whole bundles of {neurons}")
    parts = []
    for plain, coded in zip(layout.parts, codings, strict=True):
        if coded is None:
            parts.append(Part(plain.name, plain.dtype, neurons * dim))
            continue
        if dim % coded.group_size and (plain.name != "down" or neurons == 1):
            size = coded.group_size
            raise FormatError(
                f"rows of {dim} items are no whole groups of {size}; choose a group size that divides {dim}"
            )
        if plain.name == "down" and neurons > 1 and neurons % coded.group_size:
            raise FormatError(f"{neurons} neurons are no whole groups of {coded.group_size}")
        parts.append(Part(plain.name, "uint32", coded.words(neurons * dim)))
        dtype = plain.dtype if coded.mode == AFFINE else "uint8"
        parts += [Part(f"{plain.name}.{field}", dtype, coded.groups(neurons * dim)) for field in coded.fields]
    count = layout.count // neurons
    if all(coded == codings[0] for coded in codings) and (codings[0] is not None or neurons == 1):
        return Layout(tuple(parts), count, codings[0], neurons)
    return Layout(tuple(parts), count, None, neurons, tuple(codings))


def bundle_kinds(layouts: Sequence[Layout]) -> tuple[list[int], list[Layout]]:
    """The kind of each layer, and the first layout of each kind. Layers are of one kind if their layouts differ at
    most in the number of bundles."""
    firsts: list[Layout] = []
    kinds = []
    for layout in layouts:
        alike = (k for k, first in enumerate(firsts) if replace(layout, count=first.count) == first)
        kind = next(alike, len(firsts))
        if kind == len(firsts):
            firsts.append(layout)
        kinds.append(kind)
    return kinds, firsts


def layer_file(layer: int) -> str:
    """Name of a layer's file, relative to the checkpoint."""
    return f"flash/layer-{layer:03d}.safetensors"


def layer_header(layout: Layout) -> bytes:
    """The first DATA_START bytes of a layer's file: safetensors header, its JSON padded with spaces."""
    shape = [layout.count, layout.stride]
    tensor = {"dtype": "U8", "shape": shape, "data_offsets": [0, layout.count * layout.stride]}
    text = json.dumps({"bundles": tensor}, separators=(",", ":")).encode()
    return (DATA_START - 8).to_bytes(8, "little") + text.ljust(DATA_START - 8)


def check_layer_file(path: str | os.PathLike[str], layout: Layout) -> None:
    """Check header and size of a layer's file against its layout. Raises FormatError, or ReadError."""
    tensors = read_header(path)
    expected = TensorInfo("bundles", "U8", (layout.count, layout.stride), DATA_START, layout.count * layout.stride)
    if tensors == {"bundles": expected}:
        return
    wanted = f'"bundles" U8 {list(expected.shape)} at byte {DATA_START}'
    found = ", ".join(f'"{t.name[:40]}" {t.dtype} {list(t.shape)} at byte {t.offset}' for t in tensors.values())
    raise format_error(os.fspath(path), f"holds {found[:300] or 'no tensor'}, its layout says {wanted}")


def _need_fields(value: Any, what: str, fields: set[str]) -> None:
    if not isinstance(value, dict) or set(value) != fields:
        found = ", ".join(map(str, value))[:200] if isinstance(value, dict) else str(value)[:80]
        raise format_error(what, f"needs exactly the fields {', '.join(sorted(fields))}, not {found}")


def _size(value: Any, what: str, largest: int) -> int:
    if type(value) is not int or not 1 <= value <= largest:  # `type`, because True is an int too
        raise format_error("layout", f"has the {what} {str(value)[:40]}, which is not a number from 1 to {largest}")
    return value


def _quantised(layout: Layout, value: Any, neurons: Any) -> Layout:
    """A JSON layout with its quantisation; raises FormatError if its parts are not codes of that kind."""
    matrices = layout.matrices
    if isinstance(value, dict) and "bits" not in value:
        _need_fields(value, "a quantisation", set(matrices))
        codings = [None if value[name] is None else _coding(value[name]) for name in matrices]
    else:
        codings = [_coding(value)] * len(matrices)
    if type(neurons) is not int or not 1 <= neurons <= MAX_NEURONS:
        raise format_error("layout", f"has {str(neurons)[:20]} neurons to a bundle; known: 1 to {MAX_NEURONS}")
    wrong = format_error("layout", "is quantised, but its parts are not codes, scales and biases of the same weights")
    dtypes = _number_types(layout, matrices, codings)
    alike = codings[0] is not None and all(coded == codings[0] for coded in codings)
    found = replace(
        layout, quantisation=codings[0] if alike else None, neurons=neurons, codings=() if alike else tuple(codings)
    )
    if dtypes is None or found.dim < 1:
        raise wrong
    plain = Layout(tuple(Part(n, d, found.dim) for n, d in zip(matrices, dtypes, strict=True)), found.count * neurons)
    try:
        wanted = with_codings(plain, codings, neurons)
    except FormatError as error:
        raise format_error("layout", f"is quantised, but {error}") from None
    if wanted != found:
        raise wrong
    return found


def _number_types(layout: Layout, matrices: Sequence[str], codings: Sequence[Quantisation | None]) -> list[str] | None:
    """The dtype of each matrix' numbers: of its scales, or its own. None where one is no dtype of numbers."""
    dtypes = {part.name: part.dtype for part in layout.parts}
    found = []
    for name, coded in zip(matrices, codings, strict=True):
        if coded is not None and coded.mode != AFFINE:
            found.append("bfloat16")  # of no part
            continue
        dtype = dtypes.get(name if coded is None else f"{name}.scales")
        if dtype is None or dtype in ("uint32", "uint8"):
            return None
        found.append(dtype)
    return found


def _coding(value: Any) -> Quantisation:
    mode = value.get("mode", AFFINE) if isinstance(value, dict) else AFFINE
    _need_fields(value, "a quantisation", {"bits", "group_size"} | ({"mode"} if mode != AFFINE else set()))
    bits, size = value["bits"], value["group_size"]
    if type(bits) is not int or type(size) is not int or not Quantisation(bits, size, str(mode)).known:
        kind = f"{str(bits)[:20]} bits in groups of {str(size)[:20]} ({str(mode)[:20]})"
        raise format_error("layout", f"is quantised to {kind}, which is not known")
    return Quantisation(bits, size, mode)


def _part(value: Any) -> Part:
    _need_fields(value, "a part", {"name", "dtype", "length"})
    if not isinstance(value["name"], str) or not value["name"]:
        raise format_error("layout", f"has a part named {str(value['name'])[:40]!r}, which is not a name")
    if not isinstance(value["dtype"], str) or value["dtype"] not in ITEM_BYTES:
        raise format_error(f"part {value['name'][:40]!r}", f"has the unknown dtype {str(value['dtype'])[:40]!r}")
    return Part(value["name"], value["dtype"], _size(value["length"], "part length", MAX_PART_ITEMS))
