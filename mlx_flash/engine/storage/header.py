"""The header of a safetensors file: what tensors are in it, and whether it tells the truth about the file.

Knows no models and no layouts; reads only the header, never tensor data.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flash.errors import ReadError

from .json_file import format_error, load_json_object

# Bits per item: safetensors has dtypes narrower than a byte.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: dtype as spelled there ("F32", "BF16"), `offset` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in file order, after checking that they fill it exactly.

    Raises FormatError for a file that is truncated, oversized, or whose header lies; ReadError if the system
    cannot read it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise format_error(path, f"has {len(prefix)} bytes, too short for a header")
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES:
                problem = f"claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are legal"
                raise format_error(path, problem)
            if 8 + header_bytes > file_bytes:
                raise format_error(path, f"claims a header of {header_bytes} bytes, but the file has {file_bytes}")
            text = file.read(header_bytes)
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) < header_bytes:
        raise format_error(path, f"ended within its header, after {8 + len(text)} bytes")
    return _parse(path, text, 8 + header_bytes, file_bytes)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The free text of a file whose header `read_header` accepts."""
    with open(path, "rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    metadata = load_json_object(Path(path), text).get("__metadata__")
    return dict(metadata or {})


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # `type`, because True is an int too


def _parse(path: Path, text: bytes, data_start: int, file_bytes: int) -> dict[str, TensorInfo]:
    entries = load_json_object(path, text, strict=True)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise format_error(path, "has a __metadata__ that is not a table of strings")
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    at = data_start
    for tensor in tensors:
        if tensor.offset != at:
            problem = "overlaps the one before it" if tensor.offset < at else "leaves a hole before it"
            raise format_error(path, f"tensor {tensor.name[:80]!r} begins at byte {tensor.offset} and {problem} ({at})")
        at += tensor.nbytes
    if at != file_bytes:
        problem = "truncated" if file_bytes < at else "too long"
        raise format_error(path, f"is {problem}: it has {file_bytes} bytes, its header describes {at}")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    label = f"tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise format_error(path, f"{label} does not have exactly the fields dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise format_error(path, f"{label} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise format_error(path, f"{label} has the shape {str(shape)[:80]}, which is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise format_error(path, f"{label} has the data_offsets {str(offsets)[:80]}, which are not two positions")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    if bits % 8 or end - begin != bits // 8:
        raise format_error(
            path,
            f"{label} ({dtype} {str(shape)[:80]}) takes {str(bits)[:40]} bits, not bytes {begin} to {end}",
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, end - begin)
