"""Relufy small models on text that they write themselves: perplexity and exact zeros before, right after, recovered.

    python scripts/measure_relufy.py --models DIR [DIR ...] --csv FILE [--steps 1000] [--variants relu fatrelu:0.9 ...]

A variant is ACTIVATION[:TARGET][:pressure|:free]; `relu` alone has no target. The text is written once per model and
shared by its variants; its last 5 % are held out. One thread; every row is flushed as it comes.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.tools.relufication.relufication import relufy
from mlx_flash.tools.relufication.torch_decoder import TorchDecoder, sample_texts

VARIANTS = ("relu", "relu:0.85", "fatrelu:0.8", "fatrelu:0.9")
COLUMNS = ("machine", "model", "variant", "stage", "nats_per_token", "perplexity", "zeros", "kl", "seconds")
ROWS_AT_ONCE = 256


def write_rows(folder: Path, count: int, context: int) -> np.ndarray:
    """(count, context) ids that the model writes after BOS at temperature 1."""
    weights = load_file(folder / "model.safetensors")
    spec = read_spec(read_json(folder / "config.json"), weights)
    assert spec.bos_id is not None
    decoder, generator = TorchDecoder(spec, weights, None, context), torch.Generator().manual_seed(0)
    parts = []
    for begin in range(0, count, ROWS_AT_ONCE):
        now = min(ROWS_AT_ONCE, count - begin)
        parts.append(sample_texts(decoder, now, context, spec.bos_id, spec.eos_ids, generator).int())
        print(f"  {folder.name}: {begin + now} of {count} texts written", file=sys.stderr, flush=True)
    return torch.cat(parts).numpy()


def parse_variant(text: str) -> dict[str, Any]:
    activation, *rest = text.split(":")
    settings: dict[str, Any] = {"activation": activation}
    for word in rest:
        settings |= (
            {"pressure": word == "pressure"} if word in ("pressure", "free") else {"target_sparsity": float(word)}
        )
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="Hugging Face folders, e.g. stories260K")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="keep the checkpoints here, as MODEL-VARIANT")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file, tempfile.TemporaryDirectory() as temporary:
        table = csv.DictWriter(file, COLUMNS)
        if new:
            table.writeheader()
        for model in args.models:
            rows = write_rows(model, args.tokens // args.context, args.context)
            for variant in args.variants:
                out = (args.out or Path(temporary)) / f"{model.name}-{variant.replace(':', '-')}"
                begin = time.perf_counter()
                sizes = {"steps": args.steps, "batch": args.batch, "context": args.context, "tokens": args.tokens}
                report = relufy(model, out, data=rows, device="cpu", **sizes, **parse_variant(variant))
                seconds = time.perf_counter() - begin
                for stage in ("original", "replaced", "recovered"):
                    score = {name: f"{report[stage][name]:.4f}" for name in COLUMNS[4:8]}
                    row = {"machine": platform.node(), "model": model.name, "variant": variant, "stage": stage}
                    table.writerow(row | score | {"seconds": f"{seconds if stage == 'recovered' else 0:.0f}"})
                    print(f"{model.name:14s} {variant:18s} {stage:10s}", *score.values(), sep="  ", flush=True)
                file.flush()


if __name__ == "__main__":
    main()
