"""Decode speed of the mlx backend with everything resident, against mlx-lm alone on the same weights.

The contestants take turns in one process, at least five rounds; medians, and the median over the rounds of the ratio
to mlx-lm, are printed for the wall clock and for CPU time (which others on the machine change less), every round is in
the CSV. The greedy tokens must be the same in float32; in 16 bits the sums
are rounded elsewhere, and it is said where they part. ReLU models run in mlx-lm with its activation replaced.

    python scripts/measure_mlx_overhead.py --model ../shared/data/models/stories260K --csv FILE
    python scripts/measure_mlx_overhead.py --card openelm-270m --dtype bfloat16 --tokens 12 --csv FILE

Random weights (`--card`) show mechanism and speed, not quality. What is asked: at most 1.10 times mlx-lm's time.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import mlx_flash
from mlx_flash.engine.backends.mlx.backend import cache_limit_bytes
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.tools.random_model import make_random

PROMPT = [1, 9, 43, 21, 7, 100, 52, 3]
THEIRS = "mlx-lm"
LOSSLESS = ("all", "gate", "prompt:1")
FIRST = 3  # tokens that are not timed: `prompt` makes its selection for the first decoded one
Decode = Callable[[], Iterator[int]]


def theirs(folder: Path, tokens: int) -> Decode:
    """mlx-lm's own model and loop, with the buffer cache that it has by default."""
    config = json.loads((folder / "config.json").read_text())
    if "relu" in (config.get("hidden_act"), config.get("activation_fn_name")):
        module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
        module.swiglu = mx.compile(lambda gate, up: mx.maximum(gate, 0) * up, shapeless=True)  # type: ignore[attr-defined]
    model, _ = load_model(folder)

    def decode() -> Iterator[int]:
        for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=tokens, prefill_step_size=256):
            yield int(token)

    return decode


def ours(folder: Path, select: str, tokens: int) -> tuple[Decode, int]:
    """The flash checkpoint with everything resident, and the buffer cache that it asks for."""
    model, _ = mlx_flash.load(folder, backend="mlx", select=select, memory=everything(folder, select))
    assert model.flash.plan.all_resident

    def decode() -> Iterator[int]:
        yield from model.flash.steps(model, PROMPT, tokens, Sampling())

    return decode, cache_limit_bytes(model.flash.plan.spec.dim)


def everything(folder: Path, select: str) -> int:
    from mlx_flash.tools.inspection import inspect_model

    report = inspect_model(folder, mlx_flash.FlashConfig(backend="mlx", select=select))
    return int(report["everything_resident_bytes"])


def timed(steps: Iterable[int]) -> tuple[list[int], tuple[float, float]]:
    """The tokens; seconds and CPU seconds per token after the first ones."""
    tokens, begin = [], (0.0, 0.0)
    for token in steps:
        tokens.append(token)
        if len(tokens) == FIRST:
            begin = time.perf_counter(), time.process_time()
    count = len(tokens) - FIRST
    return tokens, ((time.perf_counter() - begin[0]) / count, (time.process_time() - begin[1]) / count)


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def compare(source: Path, selectors: list[str], rounds: int, tokens: int, name: str, writer: Any) -> None:
    dtype = json.loads((source / "config.json").read_text()).get("torch_dtype", "")
    with tempfile.TemporaryDirectory() as work:
        flash = mlx_flash.convert(source, Path(work) / "flash")
        default_cache = mx.set_cache_limit(0)
        contestants = {THEIRS: (theirs(source, tokens), default_cache)}
        contestants |= {select: ours(flash, select, tokens) for select in selectors}
        seconds: dict[str, list[float]] = {who: [] for who in contestants}
        cpu: dict[str, list[float]] = {who: [] for who in contestants}
        replies: dict[str, list[int]] = {}
        for number in range(-1, rounds):  # the first one warms up
            for who, (decode, cache_limit) in contestants.items():
                mx.clear_cache()
                mx.set_cache_limit(cache_limit)
                reply, (taken, cpu_taken) = timed(decode())
                if replies.setdefault(who, reply) != reply:
                    sys.exit(f"{name}, {who}: two runs gave different tokens")
                if number >= 0:
                    seconds[who].append(taken)
                    cpu[who].append(cpu_taken)
                    row = [platform.node(), name, dtype, who, number, tokens, f"{taken:.6g}", f"{cpu_taken:.6g}"]
                    writer.writerow(row)
    for who in contestants:
        differs = first_difference(replies[who], replies[THEIRS])
        said = "same tokens" if differs is None else f"other tokens from {differs} on"
        wall, busy = median_ratio(seconds[who], seconds[THEIRS]), median_ratio(cpu[who], cpu[THEIRS])
        milliseconds = 1e3 * statistics.median(seconds[who])
        print(f"{name} {dtype} {who:>9}: {milliseconds:8.3f} ms/token, {wall:5.2f} x, CPU {busy:5.2f} x, {said}")
        if differs is not None and dtype == "float32" and who in LOSSLESS:
            sys.exit(f"{name}, {who}: not mlx-lm's tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="Hugging Face folder; repeatable")
    parser.add_argument("--card", action="append", default=[], help="model card, random weights; repeatable")
    parser.add_argument("--dtype", default="bfloat16", help="of the cards' weights")
    parser.add_argument(
        "--select", action="append", default=[], help="default: all, prompt:1, and gate for ReLU models"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    with args.csv.open("w", newline="") as file, tempfile.TemporaryDirectory() as work:
        writer = csv.writer(file)
        writer.writerow(["machine", "model", "dtype", "what", "round", "tokens", "s_per_token", "cpu_s_per_token"])
        made = (make_random(card, Path(work) / card, dtype=args.dtype) for card in args.card)
        for source in itertools.chain(args.model, made):
            relu = "relu" in (source / "config.json").read_text()
            selectors = args.select or ["all", "prompt:1", *(["gate"] if relu else [])]
            compare(source, selectors, args.rounds, args.tokens, source.name, writer)


if __name__ == "__main__":
    main()
