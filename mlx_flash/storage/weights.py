"""Bytes of bundles as numbers: what a matrix' share of them holds, in fp32. Knows layouts and arrays, no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import AffineBundles, AffineRows
from ..casting import RAW, to_float32
from .layout import Layout

VIEWS = {"uint32": np.uint32, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def wide_rows(raw: np.ndarray, layout: Layout, matrix: str) -> np.ndarray:
    """A matrix' rows of n bundles, (n * neurons, d) fp32. raw (n, layout.matrix_bytes(matrix)) uint8, contiguous."""
    if layout.quantisation is None:
        dtype = layout.part(matrix).dtype
        return to_float32(raw.view(RAW[dtype]), dtype)
    fields, at = [], 0
    for name in layout.parts_of(matrix):
        part = layout.part(name)
        fields.append(np.ascontiguousarray(raw[:, at : at + part.nbytes]).view(VIEWS[part.dtype]))
        at += part.nbytes
    coded = coded_rows(fields, layout, matrix)
    if isinstance(coded, AffineBundles):
        return coded.widen()
    out = np.empty(coded.shape, np.float32)
    coded.widen(out)
    return out


def coded_rows(fields: Sequence[np.ndarray], layout: Layout, matrix: str) -> AffineRows | AffineBundles:
    """A matrix' codes, scales and biases of n bundles, each (n, length) with contiguous rows, as weights: views."""
    assert layout.quantisation is not None
    bits = layout.quantisation.bits
    if layout.neurons == 1:
        return AffineRows(fields[0], fields[1], fields[2], bits)
    turned = matrix == "down"
    rows = layout.dim if turned else layout.neurons
    codes, scales, biases = (field.reshape(len(field), rows, field.shape[1] // rows) for field in fields)
    return AffineBundles(codes, scales, biases, bits, turned)
