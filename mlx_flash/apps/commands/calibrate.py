"""`mlx_flash calibrate`: learns from a text what lossy selectors need, and shows what was found."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.apps.options import check_address_space
from mlx_flash.config import format_bytes

DESCRIPTION = "Learn from a text what `predictor`, `threshold` and `static` need."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="flash checkpoint; the cached copy of a Hugging Face folder or repo id")
    parser.add_argument("--data", required=True, nargs="+", metavar="TEXT", help="UTF-8 text files")
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="learn from N tokens; default 20000")
    parser.add_argument("--recall", type=float, default=0.97, metavar="R",
                        help="share of the firing neurons that predictors must name; default 0.97")  # fmt: skip
    parser.add_argument("--windows", type=int, default=4, metavar="W",
                        help="windows of 128 + 256 tokens to measure losses on; default 4, 0 for none")  # fmt: skip
    parser.add_argument("--memory", default="auto", metavar="SIZE", help="budget of the passes through the model")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto, mlx or numpy")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_address_space(args.backend)
    from mlx_flash.tools.calibration.calibrator import calibrate

    found = calibrate(
        args.model,
        args.data,
        tokens=args.tokens,
        recall=args.recall,
        loss_windows=args.windows,
        memory=args.memory,
        backend=args.backend,
        seed=args.seed,
        progress=not args.json,
    )
    if not args.json:
        print_calibration(found)
    return found


def print_calibration(found: dict[str, Any]) -> None:
    """On stdout: a line per layer, then the predictors as a whole and what the selectors lose."""
    print(f"{found['path']}: calibrated on {found['tokens']} tokens")
    predicts = "recall" in found
    print("layer  zeros  99 % energy in" + ("  rank  recall  precision  asked for  always  look-ahead" * predicts))
    for index, layer in enumerate(found["layers"]):
        line = f"{index:>5}  {layer['zeros']:5.1%}  {layer['neurons_for_99_percent']:14.1%}"
        if predicts:
            made, ahead = layer["predictor"], layer["look_ahead"]
            line += (
                f"  {made['rank']:>4}  {made['recall']:6.1%}  {made['precision']:9.1%}  {made['predicted']:9.1%}"
                f"  {made['always']:6.1%}  {ahead['recall']:.0%} at {ahead['precision']:.0%}"
            )
        print(line)
    if predicts:
        print(
            f"predictors: recall {found['recall']:.2%}, precision {found['precision']:.1%}, "
            f"{found['firing']:.1%} of the neurons fire, {found['predicted']:.1%} are asked for; "
            f"{format_bytes(found['predictor_bytes'])}, {found['predictor_share']:.2%} of the weights"
        )
    for name, loss in found.get("losses", {}).items():
        print(f"{name:<14} perplexity {loss['loss']:+.2%} over {loss['tokens']} tokens")
