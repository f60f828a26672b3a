"""Measure how decoding grows with the model, the budget and the context, and draw it (numpy backend, random weights).

    python scripts/measure_growth.py --work DIR --csv FILE --picture FILE.png [--rounds 3]

30 GB of disk, 20 GB of memory, matplotlib. `predictor` replays a trace (10 % of the neurons named per token, 2.4 %
new); `all` reads whatever is not resident. Mechanism and speed, not quality.

    size      OpenELM 270M, 1.1B and 3B, and Llama's 7B geometry: a quarter of the FFN resident, and all of it
    budget    the 3B one from the smallest legal budget to everything resident
    context   the 3B one, everything resident, after 1 to 2047 tokens
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.tools.bench.bench_report import can_draw
from mlx_flash.tools.bench.random_checkpoint import attach_random_predictors, make_card
from mlx_flash.tools.bench.trace_replay import synthetic_trace
from mlx_flash.tools.inspection import inspect_model

SIZES = ("openelm-270m", "openelm-1.1b", "openelm-3b", "llama-7b")
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "relu",
    "tie_word_embeddings": False,
}
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the FFN that is resident
LENGTHS = (1, 512, 1024, 2047)
CONTEXT = 512
COLUMNS = ("machine", "curve", "model", "selector", "resident_share", "context", "budget_bytes", "s_per_token",
           "bytes_read_per_token", "anonymous_bytes")  # fmt: skip
COLOURS = {"predictor": "tab:blue", "all": "tab:orange", "everything resident": "tab:green"}


def make(name: str, work: Path) -> Path:
    """A checkpoint of this size with random predictors, and its trace beside it."""
    folder = work / name
    if (folder / "trace.npz").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    card = name
    if name == "llama-7b":
        card = str(folder / "llama")
        Path(card).mkdir(exist_ok=True)
        (Path(card) / "config.json").write_text(json.dumps(LLAMA_7B))
    checkpoint = Checkpoint.open(make_card(card, folder, relu=True))
    trace = synthetic_trace([layout.count for layout in checkpoint.layouts], 96)
    attach_random_predictors(checkpoint, trace)
    trace.save(folder / "trace.npz")
    return folder


def budget(folder: Path, selector: str, share: float, context: int) -> int:
    """The smallest budget, and slots for so much of the FFN; everything at 1."""
    found = inspect_model(folder / "flash", FlashConfig("1000GB", context, "numpy", selector, look_ahead="off"))
    if share == 1:
        return int(found["everything_resident_bytes"]) + (64 << 20)
    return int(found["smallest_budget_bytes"] + share * found["ffn_bytes"]) + (32 << 20)


def decode(folder: Path, selector: str, share: float, context: int, length: int = 0) -> dict[str, Any]:
    """Decode in a process of its own."""
    size = budget(folder, selector, share, context)
    tokens = ("--warm", "12", "--tokens", "10") if selector == "predictor" else ("--warm", "1", "--tokens", "3")
    command = [sys.executable, str(Path(__file__).with_name("decode_once.py")), "--model", str(folder / "flash")]
    command += ["--select", selector, "--memory", str(size), "--look-ahead", "off", "--context", str(context), *tokens]
    if selector == "predictor":
        command += ["--trace", str(folder / "trace.npz")]
    if length:
        command += ["--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def runs(folder: Path, name: str) -> Iterator[tuple[str, str, float, int, int]]:
    """(curve, selector, share, context, length) to measure for a model."""
    yield "size", "predictor", 0.25, CONTEXT, 0
    yield "size", "all", 0.25, CONTEXT, 0
    yield "size", "all", 1.0, CONTEXT, 0
    if name == "openelm-3b":
        for share in SHARES:
            yield "budget", "predictor", share, CONTEXT, 0
            yield "budget", "all", share, CONTEXT, 0
        for length in LENGTHS:
            yield "context", "all", 1.0, 2048, length


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds, written as they come."""
    rows = []
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in args.sizes:
            folder = make(name, args.work)
            planned = list(runs(folder, name))
            found: list[list[dict[str, Any]]] = [[] for _ in planned]
            for _ in range(args.rounds):  # in turn: the machine's speed drifts
                for results, (_, selector, share, context, length) in zip(found, planned, strict=True):
                    results.append(decode(folder, selector, share, context, length))
            for results, (curve, selector, share, context, length) in zip(found, planned, strict=True):
                row = dict(machine=platform.node(), curve=curve, model=name, selector=selector, resident_share=share)
                row |= dict(context=length or context, budget_bytes=results[0]["budget_bytes"])
                for column, key in zip(
                    COLUMNS[-3:], ("s_per_token", "bytes_per_token", "anonymous_bytes"), strict=True
                ):
                    row[column] = float(f"{statistics.median(r[key] for r in results):.6g}")
                writer.writerow(row)
                file.flush()
                rows.append(row)
                print(row, flush=True)
            if not args.keep:
                shutil.rmtree(folder)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2))
    axes = figure.subplots(1, 3)

    def line(axis: Any, curve: str, selector: str, x: str, label: str, **where: Any) -> None:
        mine = [r for r in rows if r["curve"] == curve and r["selector"] == selector]
        mine = [r for r in mine if all(r[k] == v for k, v in where.items())]
        axis.plot([r[x] for r in mine], [r["s_per_token"] for r in mine], "o-", label=label, color=COLOURS[label])

    line(axes[0], "size", "predictor", "model", "predictor", resident_share=0.25)
    line(axes[0], "size", "all", "model", "all", resident_share=0.25)
    line(axes[0], "size", "all", "model", "everything resident", resident_share=1.0)
    axes[0].set_title("model, a quarter of the FFN resident")
    for row in rows:
        row["budget, GB"] = row["budget_bytes"] / 1e9
    line(axes[1], "budget", "predictor", "budget, GB", "predictor")
    line(axes[1], "budget", "all", "budget, GB", "all")
    axes[1].set_title("OpenELM-3B, budget in GB")
    line(axes[2], "context", "all", "context", "everything resident")
    axes[2].set_title("OpenELM-3B, tokens before")
    for axis in axes:
        axis.set_ylabel("seconds per token")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    figure.suptitle("Decoding one token; random weights, bf16, numpy backend")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="temporary folder; models in it are deleted")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a further run")
    args = parser.parse_args()
    if not can_draw():  # which says so, before the work
        raise SystemExit(1)
    draw(measure(args), args.picture)


if __name__ == "__main__":
    main()
