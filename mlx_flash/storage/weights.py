"""Bytes of bundles as numbers: what a matrix' share of them holds, in fp32. Knows layouts and arrays, no files."""

from __future__ import annotations

import numpy as np

from ..affine import AffineRows
from ..casting import RAW, to_float32
from .layout import Layout

VIEWS = {"uint32": np.uint32, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def wide_rows(raw: np.ndarray, layout: Layout, matrix: str) -> np.ndarray:
    """A matrix' rows (n, d) fp32 of n bundles of one neuron each. raw (n, layout.matrix_bytes(matrix)) uint8,
    contiguous."""
    if layout.quantisation is None:
        dtype = layout.part(matrix).dtype
        return to_float32(raw.view(RAW[dtype]), dtype)
    fields, at = [], 0
    for name in layout.parts_of(matrix):
        part = layout.part(name)
        fields.append(np.ascontiguousarray(raw[:, at : at + part.nbytes]).view(VIEWS[part.dtype]))
        at += part.nbytes
    rows = AffineRows(*fields, layout.quantisation.bits)
    out = np.empty(rows.shape, np.float32)
    rows.widen(out)
    return out
