"""Experts whose gate and up projections stay one matrix, as neither is a run of bytes in the published files.

gpt-oss (outputs alternate, in MXFP4 or turned and plain), Llama 4 and Qwen3-VL-MoE (turned). A layer of them stands in
place of mlx-lm's, which cuts, turns and copies such tensors. Needs mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat import SwitchLinear
from .fused_experts import Piece

SORTED = 64  # pairs from which on they are sorted by expert, as mlx-lm does
MATRICES = ("gate_up_proj", "down_proj")
ENDS = {"": "weight", "_blocks": "weight", "_scales": "scales", "_bias": "bias"}  # in the file, and here


@dataclass(frozen=True)
class Joined:
    """A family's tensors: what their names begin with in the file and in mlx-lm's model, where {i} is the layer; the
    layer's modules on the way to the switch layer; whether gate and up alternate and whether experts have biases."""

    stored: str
    place: str
    modules: tuple[str, str]
    alternate: bool = False
    biases: bool = False


_GPT_OSS = "model.layers.{i}.mlp.experts."
_LLAMA4 = "language_model.model.layers.{i}.feed_forward.experts."
_QWEN = ("model.language_model.layers.{i}.mlp.experts.", "language_model.model.layers.{i}.mlp.switch_mlp.")
JOINED: Mapping[str, Joined] = {
    "gpt_oss": Joined(_GPT_OSS, _GPT_OSS, ("mlp", "experts"), alternate=True, biases=True),
    "llama4": Joined(_LLAMA4, _LLAMA4, ("feed_forward", "experts")),
    "qwen3_vl_moe": Joined(*_QWEN, ("mlp", "switch_mlp")),
}


class TurnedSwitchLinear(SwitchLinear):
    """Products with matrices that are stored input by input: weight (count, inputs, outputs)."""

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, bias: bool):
        super().__init__(input_dims, output_dims, num_experts, bias)
        self.weight = self.weight.swapaxes(-1, -2)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = mx.gather_mm(x, self["weight"], rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


class JoinedGLU(nn.Module):
    """x (..., d), indices (..., k) -> (..., k, d), as mlx-lm's SwitchGLU `like`, whose sizes and activation it takes.

    turned: how the matrices are stored."""

    def __init__(self, like: Any, form: Joined, turned: bool):
        super().__init__()
        count, hidden, dims = like.gate_proj.weight.shape
        linear = TurnedSwitchLinear if turned else SwitchLinear
        self.gate_up_proj = linear(dims, 2 * hidden, count, form.biases)
        self.down_proj = linear(hidden, dims, count, form.biases)
        self.activation, self._alternate = like.activation, form.alternate

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        shape, x, inverse = indices.shape, mx.expand_dims(x, (-2, -3)), None
        sort = indices.size >= SORTED
        if sort:
            flat = indices.flatten()
            order = mx.argsort(flat)
            inverse = mx.argsort(order)
            x, indices = x.flatten(0, -3)[order // shape[-1]], flat[order]
        both = self.gate_up_proj(x, indices, sorted_indices=sort)
        gate, up = (both[..., ::2], both[..., 1::2]) if self._alternate else mx.split(both, 2, axis=-1)
        x = self.down_proj(self.activation(up, gate), indices, sorted_indices=sort)
        if inverse is not None:
            x = mx.unflatten(x[inverse], 0, shape)
        return x.squeeze(-2)


def take_joined(
    model: Any, config: Mapping[str, Any], weights: dict[str, mx.array]
) -> tuple[dict[str, mx.array], dict[str, Piece]]:
    """The experts' tensors by their names in a layer of `JoinedGLU`, taken out of `weights`, and where they lie; the
    model has such layers then. Nothing where the file has another form, or not all layers this one."""
    found: dict[str, mx.array] = {}
    pieces: dict[str, Piece] = {}
    layers: list[tuple[Any, JoinedGLU]] = []
    form = JOINED.get(str(config.get("model_type")))
    if form is None:
        return {}, {}
    for index, layer in enumerate(model.layers):
        block = getattr(layer, form.modules[0])
        switch, stored = block.get(form.modules[1]), form.stored.format(i=index)
        if switch is None:
            continue  # a layer without experts
        coded = f"{stored}{MATRICES[0]}_blocks" in weights
        ends = [*(("_blocks", "_scales") if coded else ("",)), *(("_bias",) if form.biases else ())]
        names = {stored + each + end: f"{form.place}{each}.{ENDS[end]}" for each in MATRICES for end in ends}
        if not weights.keys() >= names.keys():
            return {}, {}
        for name, new in names.items():
            array = weights[name]
            pieces[new.format(i=index)] = Piece(name, tuple(array.shape), 1, 0)
            found[new.format(i=index)] = array.view(mx.uint32).flatten(-2) if name.endswith("_blocks") else array
        layers.append((block, JoinedGLU(switch, form, turned=not coded)))
    for block, joined in layers:
        setattr(block, form.modules[1], joined)
    for piece in pieces.values():
        del weights[piece.source]
    return found, pieces
