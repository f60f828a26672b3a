"""Reads the weights of a checkpoint's FFNs, a layer at a time in fp32."""

from __future__ import annotations

import numpy as np

from mlx_flash.engine.numerics.casting import RAW, to_float32
from mlx_flash.engine.storage.bundle import DATA_START
from mlx_flash.engine.storage.bundle_weights import wide_rows
from mlx_flash.engine.storage.reader import LayerFile
from mlx_flash.errors import ReadError
from mlx_flash.runtime.planning.neuron_plan import NeuronPlan

from .neuron_statistics import FfnWeights

BLOCK_BUNDLES = 1024


def layer_weights(plan: NeuronPlan, layer: int) -> FfnWeights:
    """A layer's FFN in fp32. Raises ReadError."""
    spec, parts = plan.spec, read_parts(plan.checkpoint.layer_files[layer])
    bias = _resident(plan, spec.name("up", layer) + ".bias") if spec.ffn_bias else None
    first, second = (parts["gate"], parts["up"]) if spec.gated else (parts["up"], None)
    return FfnWeights(first, second, parts["down"], bias, spec.kernel_activation, spec.layers[layer].cutoff)


def read_parts(file: LayerFile) -> dict[str, np.ndarray]:
    """All of a layer's bundles in fp32, (count, d) by matrix. Raises ReadError."""
    layout = file.layout
    parts = {name: np.empty((layout.count, layout.dim), np.float32) for name in layout.matrices}
    try:
        with open(file.path, "rb") as opened:
            opened.seek(DATA_START)
            for begin in range(0, layout.count, BLOCK_BUNDLES):
                count = min(BLOCK_BUNDLES, layout.count - begin)
                data = np.fromfile(opened, np.uint8, count * layout.stride)
                if data.size != count * layout.stride:
                    raise ReadError(f"{file.path} is too short for its layout; download or convert it again")
                bundles = data.reshape(count, layout.stride)
                for name in layout.matrices:
                    first = layout.offset(name)
                    raw = np.ascontiguousarray(bundles[:, first : first + layout.matrix_bytes(name)])
                    parts[name][begin : begin + count] = wide_rows(raw, layout, name)
    except OSError as error:
        raise ReadError(f"cannot read {file.path}: {error.strerror or error}") from error
    return parts


def _resident(plan: NeuronPlan, name: str) -> np.ndarray:
    path, info = plan.checkpoint.resident_tensors()[name]
    with open(path, "rb") as file:
        file.seek(info.offset)
        raw = np.frombuffer(file.read(info.nbytes), RAW[plan.dtype])
    return to_float32(raw, plan.dtype).reshape(info.shape)
