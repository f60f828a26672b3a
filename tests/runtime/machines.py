"""Made-up machines, and what a made-up model asks of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mlx_flash.runtime.machine import KERNELS, Machine, ReadRate
from mlx_flash.runtime.planning.cost_model import PIECE
from mlx_flash.runtime.planning.demand import Demand, LayerDemand

DEPTHS, SIZES = (1, 4, 16, 64, 256), (4096, 16384, 65536, PIECE)


def machine(
    overhead_s: float = 100e-6,
    row_rate: float = 2e9,
    read_s: float = 10e-6,
    cpu_s: float = 0.0,
    buffered: float | None = None,
    noise: np.ndarray | None = None,
    scale: float = 1.0,
    compute: float = 1.0,
    **fields: Any,
) -> Machine:
    """A disk that answers after `overhead_s`, begins a read every `read_s` and moves `row_rate` bytes a second; reads
    through the page cache take `buffered` times as long."""

    def rate(nbytes: int, depth: int, scattered: bool) -> float:
        busy = nbytes / row_rate + (read_s if scattered else 0.0)
        return nbytes / max(busy, (overhead_s + busy) / depth)

    kinds = [(n, d, scattered) for n in SIZES for d in DEPTHS for scattered in (True, False)]
    factors = np.ones(len(kinds)) if noise is None else noise
    reads = [
        ReadRate(*kind, True, float(rate(*kind) * f * scale), cpu_s) for kind, f in zip(kinds, factors, strict=True)
    ]
    if buffered is not None:
        reads += [replace(read, direct=False, bytes_per_s=read.bytes_per_s / buffered) for read in reads]
    kernels = {name: 10e9 * compute for name in KERNELS}
    known = {"kernels": kernels, "matmul_flops": 100e9 * compute, "layer_s": {"all": 1e-5, "selected": 1e-4}}
    about = {"device": "disk", "host": "here", "cores": 2, "when": "2025-01-01T00:00:00", "reader": "AioReader"}
    made = Machine(reads=tuple(reads), memory_bytes_per_s=10e9, **{**about, **known, **fields})
    made.check()
    return made


NOISE = st.lists(st.floats(0.5, 2.0), min_size=40, max_size=40).map(np.array)


def wanted(selector: str = "predictor", missed: float = 0.025, slots: float = 0.5, **fields: Any) -> Demand:
    """Three layers of a model of width 1024 in 16 bits, a tenth of the bundles asked for."""
    layers = []
    for count in (1024, 2048, 4096):
        asked = float(count) if selector == "all" else 0.1 * count
        capacity = int(slots * count) // 256 * 256
        misses = float(count - capacity) if selector == "all" else missed * count
        layers.append(LayerDemand(count, capacity, 8 << 20, 0, 1 << 20, asked, asked, misses, 0.5, 0.8))
    known: dict[str, Any] = {"head_bytes": 64 << 20, "kv_bytes": 4096, "chunk": 256, **fields}
    return Demand(selector, "bfloat16", tuple(layers), 6144, 6144, 2048, 4096, **known)
