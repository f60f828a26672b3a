"""Trains the predictors of a whole model, layer by layer, from captured FFN inputs; keeps each step in a workspace.

predictors.py trains a single one and chooses the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.runtime.planning.neuron_plan import NeuronPlan

from .ffn_weights import layer_weights
from .neuron_statistics import TOKENS
from .predictors import (
    Predictor,
    PredictorReport,
    PriceCurve,
    TrainedPredictor,
    choose_price,
    choose_ranks,
    default_ranks,
    sketch_layer,
    train_layer,
)
from .workspace import Workspace

LARGEST_SHARE = 0.05  # of the weights, for all predictors
STEP_BYTES = 4  # of a layer's predictor, beside what `predictors` counts
MARGINS = (0.0, 1.0, 2.0, 3.0, 4.0)  # of which look-ahead takes one


def firing_of(plan: NeuronPlan, layer: int) -> Callable[[np.ndarray], np.ndarray]:
    """x (T, d) -> (T, count) bool."""
    weights = layer_weights(plan, layer)
    return lambda x: x @ weights.first.T + weights.offset > 0


def train_predictors(
    work: Workspace, plan: NeuronPlan, inputs: Sequence[np.ndarray], recall: float, seed: int, progress: bool
) -> list[tuple[Predictor, PredictorReport]]:
    """All layers' predictors, together at most LARGEST_SHARE of the weights, at a recall of the whole model."""
    counts = [layout.count for layout in plan.checkpoint.layouts]
    dim = plan.spec.dim
    with tqdm(total=2 * len(counts), desc="predictors", unit="step", disable=not progress, file=sys.stderr) as bar:
        sketches = []
        for layer, count in enumerate(counts):
            sketches.append(_sketch(work, plan, layer, inputs[layer], default_ranks(dim, count), seed))
            bar.update()
        budget_bytes = int(LARGEST_SHARE * weight_bytes(plan)) - STEP_BYTES * len(counts)
        choice = choose_ranks(sketches, dim, budget_bytes=budget_bytes, recall=recall)
        trained = []
        for layer, rank in enumerate(choice.ranks):
            trained.append(_train(work, plan, layer, inputs[layer], rank, choice.always[layer], seed))
            bar.update()
    return choose_price(trained, choice.always, recall)


def weight_bytes(plan: NeuronPlan) -> int:
    """All weights of the model."""
    dense = sum(info.nbytes for _, info in plan.checkpoint.resident_tensors().values())
    return dense + sum(layout.count * layout.bundle_bytes for layout in plan.checkpoint.layouts)


def _sketch(
    work: Workspace, plan: NeuronPlan, layer: int, x: np.ndarray, ranks: list[int], seed: int
) -> list[PriceCurve]:
    step = f"sketch-{layer:03d}"
    if (kept := work.load(step)) is None:
        curves = sketch_layer(x, firing_of(plan, layer), ranks, seed=seed)
        arrays = {
            f"{name}-{k}": getattr(curve, name) for k, curve in enumerate(curves) for name in ("asked", "lost", "rate")
        }
        kept = arrays, {"curves": [[curve.rank, curve.tokens] for curve in curves]}
        work.save(step, *kept)
    arrays, figures = kept
    return [
        PriceCurve(rank, tokens, *(arrays[f"{name}-{k}"] for name in ("asked", "lost", "rate")))
        for k, (rank, tokens) in enumerate(figures["curves"])
    ]


def _train(
    work: Workspace, plan: NeuronPlan, layer: int, x: np.ndarray, rank: int, always: np.ndarray, seed: int
) -> TrainedPredictor:
    step = f"predictor-{layer:03d}"
    if (kept := work.load(step)) is None:
        made = train_layer(x, firing_of(plan, layer), rank=rank, always=always, seed=seed)
        arrays = {name: getattr(made.predictor, name) for name in ("a", "b", "bias")}
        arrays |= {name: getattr(made.curve, name) for name in ("asked", "lost", "rate")}
        kept = arrays, {"weight": float(made.weight), "rank": made.curve.rank, "tokens": made.curve.tokens}
        work.save(step, *kept)
    arrays, figures = kept
    curve = PriceCurve(figures["rank"], figures["tokens"], arrays["asked"], arrays["lost"], arrays["rate"])
    return TrainedPredictor(Predictor(arrays["a"], arrays["b"], arrays["bias"]), figures["weight"], curve)


def as_stored(predictor: Predictor) -> dict[str, np.ndarray]:
    """A predictor as a checkpoint stores it: 8-bit integers, and the step of b, a power of two."""
    largest = float(np.abs(predictor.b).max(initial=0.0))
    step = np.exp2(np.ceil(np.log2(largest / 127))) if largest else 1.0
    a, b = predictor.a, predictor.b / step
    if not (np.rint(a) == a).all() or not (np.rint(b) == b).all():
        raise ValueError("the predictor is not rounded to 8 bits")
    arrays: dict[str, np.ndarray] = {
        "a": a.astype(np.int8),
        "b": b.astype(np.int8),
        "bias": predictor.bias.astype(np.float32),
    }
    return arrays | {"step": np.array([step], np.float32)}


def predicted_firing(x: np.ndarray, predictor: Predictor) -> np.ndarray:
    """Which neurons are asked for on every token: (N, ceil(m / 8)) uint8, bits packed."""
    slices = (np.asarray(x[at : at + TOKENS], np.float32) for at in range(0, len(x), TOKENS))
    return np.concatenate([np.packbits(predictor.scores(part) > 0, axis=1) for part in slices])


def look_ahead(plan: NeuronPlan, inputs: Sequence[np.ndarray], layer: int, predictor: Predictor) -> dict[str, float]:
    """How well the input of the layer before names this layer's firing neurons: recall and precision on the last
    tokens, at the margin where their product is largest. Neurons that are always asked for are left out."""
    if layer == 0:
        return {"margin": 0.0, "recall": 0.0, "precision": 0.0}
    held = slice(-min(2 * TOKENS, len(inputs[layer])), None)
    fires = firing_of(plan, layer)(np.asarray(inputs[layer][held], np.float32)) & ~predictor.always
    scores = predictor.scores(np.asarray(inputs[layer - 1][held], np.float32))
    best = {"margin": 0.0, "recall": 0.0, "precision": 0.0}
    for margin in MARGINS:
        guessed = (scores > margin) & ~predictor.always
        right = float((guessed & fires).sum())
        found = {"margin": margin, "recall": right / max(1, fires.sum()), "precision": right / max(1, guessed.sum())}
        if found["recall"] * found["precision"] > best["recall"] * best["precision"]:
            best = found
    return best


def layer_figures(report: PredictorReport, count: int, ahead: dict[str, float]) -> dict[str, Any]:
    """The figures of a layer's predictor, as plain values."""
    return {"predictor": asdict(report), "look_ahead": ahead, "bundles": count}
