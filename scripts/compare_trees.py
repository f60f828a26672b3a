"""Decoding speed of two source trees on the same checkpoints, in turn: what a change cost, with intervals.

    python scripts/compare_trees.py --other TREE --tools ../shared/tools --work DIR --csv FILE [--rounds 5]

Each tree runs its own scripts/decode_once.py. OpenELM-3B's geometry in bf16 (`predictor` on a trace, `all`) and the
mixture of measure_moe.py (`router`), under a memory cap and in memory. Linux, root, cgroup v1 (for `capped`); 20 GB of
disk. Every round runs the trees one right after the other, the first in turn, and gives one ratio; printed are the
median of the ratios, and the interval that holds the true median with a confidence of about 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import measure_decode_3b
import measure_moe
from contest import Table, arguments, capped

from mlx_flash.tools.random_model import make_random

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 10_000


class Pairs:
    """The checkpoints, and what to run on them by name: (memory cap in MiB, checkpoint, options)."""

    def __init__(self, args: argparse.Namespace):
        self.tools = args.tools
        self.neurons = measure_decode_3b.Machine(args)
        self.experts = args.work / "qwen3-moe-5gb"

    def prepare(self) -> None:
        self.neurons.prepare_flash()
        if not self.experts.exists():
            card = self.experts.with_name("config.json")
            card.write_text(json.dumps(measure_moe.CONFIG))
            make_random(card, self.experts)

    def settings(self) -> dict[str, tuple[int, Path, Sequence[str | Path]]]:
        dense, moe, flash = measure_decode_3b, measure_moe, self.neurons.flash
        predictor = ("--select", "predictor", "--trace", self.neurons.trace, "--memory")
        everything = ("--select", "all", "--warm", "2", "--tokens", "6", "--memory")
        router = ("--select", "router", "--context", "512", "--tokens", "12", "--memory")
        return {
            "predictor, cap": (dense.CAP_MIB, flash, (*predictor, dense.BUDGET)),
            "predictor, in memory": (dense.NO_CAP_MIB, flash, (*predictor, dense.EVERYTHING)),
            "all, cap": (dense.CAP_MIB, flash, (*everything, dense.BUDGET)),
            "all, in memory": (dense.NO_CAP_MIB, flash, (*everything, dense.EVERYTHING)),
            "experts, cap": (moe.CAP_MIB, self.experts, (*router, moe.BUDGET, "--warm", "3")),
            "experts, in memory": (moe.NO_CAP_MIB, self.experts, (*router, moe.EVERYTHING, "--warm", "40")),
        }

    def seconds(self, tree: Path, cap_mib: int, model: Path, options: Sequence[str | Path]) -> float:
        """Per token, on this tree."""
        os.environ["PYTHONPATH"] = str(tree)
        command = [sys.executable, tree / "scripts" / "decode_once.py", "--model", model, *options]
        output, _, _ = capped(self.tools, cap_mib, *command)
        found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        return float(found["s_per_token"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what these were drawn from lies, with a confidence of about 95 %: a bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def report(ratios: dict[str, list[float]]) -> None:
    """The ratio of each setting, and of all settings together: per round, the geometric mean."""
    rounds = zip(*ratios.values(), strict=True)
    together = [math.exp(statistics.fmean(map(math.log, values))) for values in rounds]
    for name, values in [*ratios.items(), ("together", together)]:
        low, high = interval(values)
        print(f"{name}: this tree takes {statistics.median(values):.3f} of the other's time ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = arguments(__doc__, "20 GB", 5)
    parser.add_argument("--other", type=Path, required=True, help="root of the other source tree")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pairs, table = Pairs(args), Table(args.csv)
    pairs.prepare()
    trees = {"this": ROOT, "other": args.other.resolve()}
    ratios: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for name, setting in pairs.settings().items():
            if args.only and not name.startswith(tuple(args.only)):
                continue
            found = {}
            for tree in sorted(trees, reverse=bool(number % 2)):
                found[tree] = pairs.seconds(trees[tree], *setting)
                table.add(f"{name}, {tree}", number, s_per_token=found[tree])
            ratios.setdefault(name, []).append(found["this"] / found["other"])
    report(ratios)


if __name__ == "__main__":
    main()
