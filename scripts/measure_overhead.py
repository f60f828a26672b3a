"""The cost of store, slots and selector when everything is resident: decoding speed beside plain arrays.

    python scripts/measure_overhead.py --model FLASH --csv FILE [--rounds 7] [--tokens 8]

The same decoder (numpy backend) with and without them, in one process, in turn, on the same tokens: gate, up and down
of the plain one are three arrays per layer, as any program would hold them, and its FFN is two kernel calls. Takes
twice the model's size in memory. Asked: at most 5 % more time per token; the logits must be the same bits.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mlx_flash
from mlx_flash.engine.backends.base import BLOCK, SEGMENTS
from mlx_flash.engine.backends.numpy.backend import DTYPES
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.models.numpy.decoder import Decoder, build

PROMPT = (5, 17, 99)


class PlainFFN:
    """act(gate.x) * (up.x) times down, over one layer's resident arrays (count, d)."""

    def __init__(self, kernels: Any, parts: dict[str, np.ndarray], activation: str):
        self.kernels, self.parts, self.activation = kernels, parts, activation
        count = len(parts["down"])
        self.ids, self.starts = np.arange(count), np.array([*range(0, count, BLOCK), count])
        blocks = len(self.starts) - 1
        self.segments = np.arange(blocks) * SEGMENTS // blocks

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        for token, out in zip(x, y, strict=True):
            gate, up, down = (self.parts[name] for name in ("gate", "up", "down"))
            h = self.kernels.neurons(gate, up, None, np.ascontiguousarray(token), acts=(self.activation, ""))
            sums = np.zeros((SEGMENTS, len(out)), np.float32)
            self.kernels.add_blocks([down], None, self.ids, h, self.starts, self.segments, sums)
            out[:] = self.kernels.total(sums, down)
        return y


def plain_decoder(plan: Any) -> Decoder:
    """The same decoder, its FFN weights in plain arrays; it has no store, so prompts go token by token."""
    checkpoint, backend = plan.checkpoint, plan.backend

    def make_ffn(layer: int, up_bias: Any = None, down_bias: Any = None) -> Callable[[np.ndarray], np.ndarray]:
        layout = checkpoint.layouts[layer]
        parts, ids = {}, np.arange(layout.count)
        with open_reader([checkpoint.layer_files[layer]]) as reader:
            for part in layout.parts:
                rows = np.empty((layout.count, part.nbytes), np.uint8)
                reader.submit(0, ids, ids, [Target(layout.offset(part.name), rows)]).wait()
                parts[part.name] = rows.view(DTYPES[part.dtype])
        return PlainFFN(backend.kernels, parts, plan.spec.activation)

    return build(checkpoint, plan.spec, backend, make_ffn, plan.dtype, plan.context)


def decode(model: Decoder, tokens: int) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, logits) of each of `tokens` forced tokens; a prompt of single tokens goes before."""
    cache = model.make_cache()
    for token in PROMPT:
        model([token], cache)
    for number in range(tokens):
        begin = time.perf_counter()
        logits = model([100 + number], cache)
        yield time.perf_counter() - begin, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="flash checkpoint with a gated FFN")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    everything = 1 << 45
    flash, _ = mlx_flash.load(options.model, memory=everything, select="all", backend="numpy", max_context=512)
    contestants = {"plain arrays": plain_decoder(flash.flash.plan), "mlx_flash": flash}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with options.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["machine", "what", "round", "s_per_token"])
        for number in range(options.rounds + 1):
            logits = {}
            for name in sorted(contestants, reverse=bool(number % 2)):
                found = list(decode(contestants[name], options.tokens))
                logits[name] = np.array([row for _, row in found])
                if number:  # the first round compiles, loads and warms
                    seconds[name].append(statistics.median(s for s, _ in found))
                    writer.writerow([platform.node(), name, number, f"{seconds[name][-1]:.6g}"])
            if not (logits["plain arrays"] == logits["mlx_flash"]).all():
                raise SystemExit("the two give different logits")
    ours, plain = (statistics.median(seconds[name]) for name in ("mlx_flash", "plain arrays"))
    print(f"plain arrays {plain:.4f} s, mlx_flash {ours:.4f} s per token: {ours / plain - 1:+.1%} (at most +5 %)")


if __name__ == "__main__":
    main()
