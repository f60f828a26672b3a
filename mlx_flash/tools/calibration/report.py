"""A calibration's figures for a person."""

from __future__ import annotations

from typing import Any

from mlx_flash.config import format_bytes


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
