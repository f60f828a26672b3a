"""Captures the input of every FFN while the model runs once over a text; a file per layer.

Runs on either backend within a memory budget; an interrupted capture goes on where it stopped. Knows no statistics.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.config import FlashConfig
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.runtime.run import NeuronRun

from .workspace import DAMAGE

SAVE_EVERY = 8  # windows


class FfnInputs:
    """The FFN inputs of every layer, float16 (N, d) on disk, of the first `windows_done` windows of the text.

    float16 takes half the disk space; it changes the sign only of gates within 0.05 % of zero.
    """

    def __init__(self, folder: Path, layers: int, tokens: int, dim: int):
        self.folder, self.shape, self.layers = folder, (tokens, dim), layers
        self.state = folder / "inputs.json"
        try:
            self.windows_done = int(json.loads(self.state.read_text())["windows_done"])
            self.arrays = [np.lib.format.open_memmap(self.path(layer), mode="r+") for layer in range(layers)]
            if any(array.shape != self.shape or array.dtype != np.float16 for array in self.arrays):
                raise ValueError("the arrays of another text")
        except DAMAGE:  # nothing there yet, or damaged
            self.windows_done = 0
            self.arrays = [
                np.lib.format.open_memmap(self.path(layer), mode="w+", dtype=np.float16, shape=self.shape)
                for layer in range(layers)
            ]

    def path(self, layer: int) -> Path:
        return self.folder / f"inputs-{layer:03d}.npy"

    def save(self, windows_done: int) -> None:
        """Flush the arrays, so that they survive an interrupt."""
        for array in self.arrays:
            array.flush()
        self.windows_done = windows_done
        partial = self.state.with_suffix(".partial")
        partial.write_text(json.dumps({"windows_done": windows_done}))
        partial.replace(self.state)


def capture(
    model: Path, config: FlashConfig, windows: Sequence[Sequence[int]], inputs: FfnInputs, progress: bool = False
) -> str:
    """Run windows of token ids through the whole model, and store every FFN input; returns the backend's name."""
    plan = plan_checkpoint(model, config, calibrated=False, loads=True)
    run = NeuronRun(plan)
    at = [sum(len(window) for window in windows[: inputs.windows_done])] * inputs.layers

    def make_ffn(layer: int, *biases: Any) -> Any:
        ffn = run.make_ffn(layer, *biases)

        def watched(x: Any) -> Any:
            rows = plan.backend.to_numpy(x).reshape(-1, x.shape[-1])
            np.clip(rows, -65504, 65504, out=inputs.arrays[layer][at[layer] : at[layer] + len(rows)], casting="unsafe")
            at[layer] += len(rows)
            return ffn(x)

        return watched

    try:
        loaded = plan.models.build(plan.checkpoint, plan.spec, plan.backend, make_ffn, plan.dtype, plan.context)
        loaded.flash = run
        left = range(inputs.windows_done, len(windows))
        for index in tqdm(left, desc="capture", unit="window", disable=not progress, file=sys.stderr):
            for _ in run.forced(loaded, windows[index], ()):
                pass
            if (index + 1) % SAVE_EVERY == 0 or index + 1 == len(windows):
                inputs.save(index + 1)
    finally:
        run.close()
    return plan.backend_name
