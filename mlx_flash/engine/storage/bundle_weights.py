"""The weights in the bytes of bundles, as fp32 or as quantised arrays. Knows layouts and arrays, no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_flash.engine.numerics import microscaling
from mlx_flash.engine.numerics.affine import AffineBundles, AffineRows
from mlx_flash.engine.numerics.casting import RAW, to_float32

from .bundle import AFFINE, Layout, Quantisation

VIEWS = {
    **{"uint32": np.uint32, "uint8": np.uint8},
    **{"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16},
}


def wide_codes(fields: Sequence[np.ndarray], coded: Quantisation) -> np.ndarray:
    """Codes (rows, words), scales and, if there are any, biases (rows, groups) as numbers (rows, n) fp32."""
    if coded.mode != AFFINE:
        return microscaling.widen(fields[0], fields[1], coded.mode)
    rows = AffineRows(fields[0], fields[1], fields[2], coded.bits)
    out = np.empty(rows.shape, np.float32)
    rows.widen(out)
    return out


def wide_rows(raw: np.ndarray, layout: Layout, matrix: str) -> np.ndarray:
    """A matrix' rows of n bundles, (n * neurons, d) fp32. raw (n, layout.matrix_bytes(matrix)) uint8, contiguous."""
    coded = layout.coding(matrix)
    turned = matrix == "down" and layout.grouped
    rows = len(raw) * (layout.dim if turned else layout.neurons)
    if coded is None:
        dtype = layout.part(matrix).dtype
        wide = to_float32(raw.view(RAW[dtype]), dtype).reshape(rows, -1)
    else:
        fields, at = [], 0
        for name in layout.parts_of(matrix):
            part = layout.part(name)
            fields.append(np.ascontiguousarray(raw[:, at : at + part.nbytes]).view(VIEWS[part.dtype]).reshape(rows, -1))
            at += part.nbytes
        wide = wide_codes(fields, coded)
    if not turned:
        return wide
    return wide.reshape(len(raw), layout.dim, layout.neurons).swapaxes(1, 2).reshape(-1, layout.dim)


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
