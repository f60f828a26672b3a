"""Experts of gpt-oss as published: gate and up are one matrix whose outputs alternate, in MXFP4 or turned and plain.

A layer of them in place of mlx-lm's, which cuts and copies such tensors; an expert's bytes stay as they are in the
file. Needs mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .mlx_compat import SwitchLinear
from .mlx_fused import Piece

SORTED = 64  # pairs from which on they are sorted by expert, as mlx-lm does
MATRICES = ("gate_up_proj", "down_proj")
ENDS = {"": "weight", "_blocks": "weight", "_scales": "scales", "_bias": "bias"}  # in the file, and here


class TurnedSwitchLinear(SwitchLinear):
    """Products with matrices that are stored input by input: weight (count, inputs, outputs)."""

    def __init__(self, input_dims: int, output_dims: int, num_experts: int):
        super().__init__(input_dims, output_dims, num_experts, bias=True)
        self.weight = self.weight.swapaxes(-1, -2)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = mx.gather_mm(x, self["weight"], rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2)


class InterleavedGLU(nn.Module):
    """x (..., d), indices (..., k) -> (..., k, d), as mlx-lm's SwitchGLU; turned: how the matrices are stored."""

    def __init__(self, dims: int, hidden: int, count: int, activation: nn.Module, turned: bool):
        super().__init__()
        linear = TurnedSwitchLinear if turned else SwitchLinear
        self.gate_up_proj = linear(dims, 2 * hidden, count)
        self.down_proj = linear(hidden, dims, count)
        self.activation = activation

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        shape, x, inverse = indices.shape, mx.expand_dims(x, (-2, -3)), None
        sort = indices.size >= SORTED
        if sort:
            flat = indices.flatten()
            order = mx.argsort(flat)
            inverse = mx.argsort(order)
            x, indices = x.flatten(0, -3)[order // shape[-1]], flat[order]
        both = self.gate_up_proj(x, indices, sorted_indices=sort)
        x = self.down_proj(self.activation(both[..., 1::2], both[..., ::2]), indices, sorted_indices=sort)
        if inverse is not None:
            x = mx.unflatten(x[inverse], 0, shape)
        return x.squeeze(-2)


def take_interleaved(
    model: Any, config: Mapping[str, Any], weights: dict[str, mx.array]
) -> tuple[dict[str, mx.array], dict[str, Piece]]:
    """The experts' tensors by their names in a layer of `InterleavedGLU`, taken out of `weights`, and where they lie;
    the model has such layers then. Nothing where the file has another form, or not all layers this one."""
    if config.get("model_type") != "gpt_oss":
        return {}, {}
    found: dict[str, mx.array] = {}
    pieces: dict[str, Piece] = {}
    for index, layer in enumerate(model.layers):
        place = f"model.layers.{index}.mlp.experts."
        coded = f"{place}{MATRICES[0]}_blocks" in weights
        ends = ("_blocks", "_scales", "_bias") if coded else ("", "_bias")
        names = {f"{place}{matrix}{end}": f"{place}{matrix}.{ENDS[end]}" for matrix in MATRICES for end in ends}
        if not weights.keys() >= names.keys():
            return {}, {}
        for name, new in names.items():
            array = weights[name]
            pieces[new] = Piece(name, tuple(array.shape), 1, 0)
            found[new] = array.view(mx.uint32).flatten(-2) if name.endswith("_blocks") else array
        experts = layer.mlp.experts
        count, hidden, dims = experts.gate_proj.weight.shape
        layer.mlp.experts = InterleavedGLU(dims, hidden, count, experts.activation, turned=not coded)
    for piece in pieces.values():
        del weights[piece.source]
    return found, pieces
