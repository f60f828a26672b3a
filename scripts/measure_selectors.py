"""Perplexity, resident FFN and reads of every selector at several settings, for one model: CSV and a Markdown table.

On text files, or on text that the model writes itself at temperature 1 (then a copy of the model is calibrated first,
on other text of its own). Windows of 128 context tokens and up to 256 scored ones, selectors as in decoding.

    python scripts/measure_selectors.py --data held/*.txt --tokens 10240 --csv selectors.csv
    python scripts/measure_selectors.py --model stories260K --write 40 --csv selectors.csv
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

import mlx_flash
from mlx_flash.config import FlashConfig
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime.model_path import resolve_model
from mlx_flash.tools.calibration.calibrator import calibrate
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.perplexity import measure, windows_of_files
from mlx_flash.tools.text_windows import CONTEXT_TOKENS, SCORED_TOKENS, Window

KEPT = (0.75, 0.5, 0.25)
CALIBRATION_WINDOWS = 60
RELU = ("all", "gate", "predictor")


def settings(sparse: bool) -> list[tuple[str, tuple[float, ...]]]:
    """(selector, shares of the FFN that are to be resident; none: everything)."""
    found: list[tuple[str, tuple[float, ...]]] = [("all", (1.0, 0.5))]
    if sparse:
        found += [("gate", (1.0, 0.5, 0.4)), ("predictor", (1.0, 0.5, 0.35, 0.25))]
    for kept in KEPT:
        found += [(f"prompt:{kept}", (kept,)), (f"threshold:{1 - kept}", (1.0,)), (f"static:{kept}", (kept,))]
    return found


def budget_for(path: Path, select: str, share: float, context: int) -> int | str:
    """The largest budget with at most this share of the FFN resident."""

    def report(memory: int | str) -> dict[str, Any]:
        return inspect_model(path, FlashConfig(memory, context, "numpy", select, look_ahead="off"))

    low, high = report("auto")["smallest_budget_bytes"], report("auto")["everything_resident_bytes"]
    if share >= 1:
        return int(high)
    for _ in range(40):
        middle = (low + high) // 2
        found = report(middle)
        resident = sum(size for name, size in found["parts"].items() if name == "slots" or name.endswith(" rows"))
        low, high = (middle, high) if resident <= share * found["ffn_bytes"] else (low, middle)
    return int(low)


def own_windows(path: Path, count: int, first_seed: int) -> Iterator[Window]:
    """Texts that the model writes after BOS at temperature 1, at most 1 + 128 + 256 tokens."""
    model, tokenizer = mlx_flash.load(path, backend="numpy", select="all")
    length = min(model.flash.plan.context, 1 + CONTEXT_TOKENS + SCORED_TOKENS)
    for seed in tqdm(range(first_seed, first_seed + count), desc="write", file=sys.stderr):
        bos = [tokenizer.bos_token_id]
        ids = bos + list(model.flash.steps(model, bos, length - 1, Sampling(1.0, 0.0, 0, seed)))
        yield Window(ids[: 1 + CONTEXT_TOKENS], ids[1 + CONTEXT_TOKENS :])
    model.flash.close()


def calibrated_copy(model: str, folder: Path) -> Path:
    """A copy of the model, calibrated on text of its own."""
    path = mlx_flash.convert(resolve_source(model), folder / "model")
    _, tokenizer = mlx_flash.load(path, backend="numpy", select="all")
    texts = [tokenizer.decode(w.prompt[1:] + w.scored) for w in own_windows(path, CALIBRATION_WINDOWS, 10_000)]
    (folder / "text.txt").write_text("\n".join(texts))
    calibrate(path, [folder / "text.txt"], loss_windows=0, backend="numpy")
    return path


def resolve_source(model: str) -> Path:
    if not (Path(model) / "config.json").is_file():
        raise SystemExit(f"{model} is not a Hugging Face folder")
    return Path(model)


def rows_for(path: Path, windows: list[Window]) -> Iterator[dict[str, Any]]:
    context = max(len(window.prompt) + len(window.scored) for window in windows)
    sparse = inspect_model(path, FlashConfig(backend="numpy"))["activation"] in ("relu", "fatrelu")
    dense = math.nan
    for select, shares in settings(sparse):
        for share in shares:
            memory = budget_for(path, select, share, context)
            model, _ = mlx_flash.load(path, FlashConfig(memory, context, "numpy", select, look_ahead="off"))
            found = measure(model, windows)
            model.flash.close()
            if select == "all":
                dense = found["nats_per_token"]
            ffn = found["ffn_bytes"]
            yield {
                "selector": select,
                "tokens": found["tokens"],
                "perplexity": found["perplexity"],
                "loss": math.expm1(found["nats_per_token"] - dense),
                "ffn_resident": found["ffn_resident_bytes"] / ffn,
                "ffn_resident_bytes": found["ffn_resident_bytes"],
                "read_per_token": found["bytes_read_per_token"] / ffn,
                "bytes_read_per_token": found["bytes_read_per_token"],
                "bundles_per_token": found["bundles_per_token"],
                "hit_rate": found["hit_rate"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--data", nargs="+", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--write", type=int, metavar="W", help="score W windows that the model writes itself")
    parser.add_argument("--csv", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.write:
            path = calibrated_copy(args.model, Path(folder))
            windows = list(own_windows(path, args.write, 0))
        else:
            path = resolve_model(args.model, announce=print)
            model, tokenizer = mlx_flash.load(path, backend="numpy")
            windows, _ = windows_of_files(tokenizer, args.data, model.flash.plan.context, args.tokens)
            model.flash.close()
        rows = []
        print("| selector | FFN resident | perplexity | loss | read per token | neurons per token | hits |")
        print("|---|---|---|---|---|---|---|")
        for row in rows_for(path, windows):
            rows.append({"machine": platform.machine(), "model": args.model or "flash-stories-6m", **row})
            cells = [f"`{row['selector']}`", f"{row['ffn_resident']:.0%}", f"{row['perplexity']:.3f}"]
            cells += [f"{row['loss']:+.2%}", f"{row['read_per_token']:.1%}", f"{row['bundles_per_token']:.0f}"]
            print(f"| {' | '.join(cells)} | {row['hit_rate']:.0%} |", flush=True)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
