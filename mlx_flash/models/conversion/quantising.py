"""Quantising during a conversion: rows of bundles and of the dense part become codes, scales and biases.

Works on rows in memory; reading and writing is the converter's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_flash.engine.numerics.affine import AffineRows, quantise
from mlx_flash.engine.numerics.casting import to_float32
from mlx_flash.engine.storage.bundle import Layout, Quantisation
from mlx_flash.engine.storage.bundle_weights import VIEWS
from mlx_flash.engine.storage.writer import HashedFile
from mlx_flash.errors import ConfigError
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.quantisation import check_quantisation, coded_shapes, takes

DENSE_BITS_KEPT = 16


class Loss:
    """How much weights change that are quantised again."""

    def __init__(self) -> None:
        self._squares, self._errors = 0.0, 0.0

    def add(self, values: np.ndarray, rows: AffineRows) -> None:
        wide = np.empty(rows.shape, np.float32)
        rows.widen(wide)
        self._squares += float(np.square(values).sum(dtype=np.float64))
        self._errors += float(np.square(wide - values).sum(dtype=np.float64))

    @property
    def share(self) -> float:
        """Root mean square of the differences over that of the weights."""
        return (self._errors / self._squares) ** 0.5 if self._squares else 0.0


@dataclass(frozen=True)
class Encoder:
    """How weights of `dtype` become codes; dense: None keeps the dense part as it is; loss: counts what it costs."""

    dtype: str
    bundles: Quantisation
    dense: Quantisation | None
    loss: Loss | None = None

    def encode(self, block: np.ndarray, layout: Layout, what: str) -> np.ndarray:
        """Bundles of plain rows, raw (n, at least 3 * d), as records (n, stride) uint8 of the quantised `layout`.
        Raises ConfigError, naming `what`, for numbers that are not finite."""
        out = np.zeros((len(block), layout.stride), np.uint8)
        for index, matrix in enumerate(layout.matrices):
            rows = block[:, index * layout.dim : (index + 1) * layout.dim]
            for name, items in zip(layout.parts_of(matrix), self.rows(rows, self.bundles, what), strict=True):
                begin = layout.offset(name)
                out[:, begin : begin + layout.part(name).nbytes] = items.view(np.uint8)
        return out

    def rows(self, raw: np.ndarray, quantisation: Quantisation, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw rows (n, d) as codes, scales and biases."""
        values = to_float32(np.ascontiguousarray(raw), self.dtype)
        if not np.isfinite(values).all():
            raise ConfigError(f"{what} has numbers that are not finite, which cannot be quantised")
        found = quantise(values, quantisation.bits, quantisation.group_size, self.dtype)
        if self.loss is not None:
            scales, biases = (each.view(VIEWS[self.dtype]) for each in found[1:])
            self.loss.add(values, AffineRows(found[0], scales, biases, quantisation.bits))
        return found

    def coded(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The resident tensors that are quantised."""
        return [name for name, shape in shapes.items() if self.dense is not None and takes(shape, self.dense)]

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape on disk of each of the tensors that stay resident."""
        coded = self.coded(shapes)
        found = dict(shapes) if self.dense is None else coded_shapes(shapes, dict.fromkeys(coded, self.dense))
        return {name: ("uint32" if name in coded else self.dtype, shape) for name, shape in found.items()}


def check_options(bits: int, group_size: int, dense_bits: int | None) -> tuple[Quantisation, Quantisation | None]:
    """How bundles and the dense part are quantised; raises ConfigError for settings that are not known."""
    bundles = check_quantisation(bits, group_size, "--q-bits and --q-group-size")
    bits = bits if dense_bits is None else dense_bits
    if bits == DENSE_BITS_KEPT:
        return bundles, None
    return bundles, check_quantisation(bits, group_size, "--dense-bits (4, 8, or 16 to keep it)")


def make_encoder(
    spec: ModelSpec, dtype: str, bits: int, group_size: int, dense_bits: int | None, measured: bool = False
) -> Encoder:
    """Raises ConfigError for settings that are not known, or that the model's shapes cannot take."""
    bundles, dense = check_options(bits, group_size, dense_bits)
    if spec.dim % group_size:
        fitting = [size for size in (32, 64, 128) if spec.dim % size == 0]
        way_out = f"use --q-group-size {' or '.join(map(str, fitting))}" if fitting else "it cannot be quantised"
        raise ConfigError(
            f"--q-group-size {group_size}: the rows of this model have {spec.dim} items, which are no whole groups; "
            f"{way_out}"
        )
    return Encoder(dtype, bundles, dense, Loss() if measured else None)


class Matrix:
    """A matrix of the dense part, written row by row: codes at once, then all scales, then all biases."""

    def __init__(self, encoder: Encoder, columns: int, name: str):
        self.encoder, self.columns, self.name = encoder, columns, name
        self._scales: list[np.ndarray] = []
        self._biases: list[np.ndarray] = []

    def write(self, file: HashedFile, raw: np.ndarray) -> None:
        """The next rows, raw items back to back."""
        assert self.encoder.dense is not None
        rows = raw.reshape(-1, self.columns)
        codes, scales, biases = self.encoder.rows(rows, self.encoder.dense, f"tensor {self.name!r}")
        self._scales.append(scales)
        self._biases.append(biases)
        file.write(codes.data)

    def finish(self, file: HashedFile) -> None:
        for some in (*self._scales, *self._biases):
            file.write(some.data)
