"""Calibration: learns statistics, cut-offs and predictors from a text, and writes them into a checkpoint.

The text passes through the model once; then the layers are worked on one after the other, from files. Finished steps
are kept in a workspace, so that an interrupted calibration goes on; the old calibration is valid until the end.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.config import FlashConfig, parse_selection
from mlx_flash.engine.selection.factory import check_selection
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration, attach, model_identity
from mlx_flash.engine.storage.writer import check_free_space
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.runtime.loading import load
from mlx_flash.runtime.planning.neuron_plan import NeuronPlan
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.tools.perplexity import check_ids, measure
from mlx_flash.tools.simulation import best_policy
from mlx_flash.tools.text_windows import CONTEXT_TOKENS, SCORED_TOKENS, Window, cut_windows, encode_text, read_text

from .ffn_inputs import FfnInputs, capture
from .ffn_weights import layer_weights
from .neuron_statistics import SPARSITIES, energy, firing, gaps, miss_curve, rates, sample_statistics
from .predictor_training import as_stored, layer_figures, look_ahead, predicted_firing, train_predictors, weight_bytes
from .predictors import PredictorReport
from .workspace import Workspace, open_workspace

DEFAULT_TOKENS = 20_000
MIN_TOKENS = 2048
WINDOW_TOKENS = 512
LOSS_WINDOWS = 4
POLICY_LAYERS, POLICY_TOKENS = 4, 1024  # on which the policy of residency is chosen
LOSSY = ("predictor", "threshold:0.5", "prompt:0.5", "static:0.5")  # whose loss is measured at the end


@dataclass(frozen=True)
class Texts:
    """Windows of token ids to learn from, and windows to measure on, which come later in the text."""

    learn: list[list[int]]
    measure: list[Window]

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.learn)


def split_text(tokenizer: Any, data: Sequence[str | Path], tokens: int, window: int, loss_windows: int) -> Texts:
    """Take the last tokens of the text to measure on, and `tokens` of the rest, in windows spread evenly, to learn
    from. Raises UsageError for a text that is too short."""
    before: list[int] = []
    ids: list[int] = []
    for path in data:
        before, more = encode_text(tokenizer, read_text(path))
        ids += more
    scored = min(SCORED_TOKENS, window - CONTEXT_TOKENS - len(before))
    measured = loss_windows * (CONTEXT_TOKENS + scored) if scored > 0 else 0
    if len(ids) < MIN_TOKENS + measured:
        raise UsageError(
            f"the text has {len(ids)} tokens; calibration needs at least {MIN_TOKENS + measured} ({MIN_TOKENS} to "
            f"learn from, {measured} to measure the loss on), and does better with {DEFAULT_TOKENS}"
        )
    rest, tail = ids[: len(ids) - measured], ids[len(ids) - measured :]
    step = window - len(before)
    pieces = [before + rest[at : at + step] for at in range(0, len(rest), step)]
    count = min(len(pieces), max(1, -(-tokens // window)))
    learn = [pieces[i * len(pieces) // count] for i in range(count)]
    chosen = [
        found
        for at in range(0, measured, CONTEXT_TOKENS + scored)
        for found in cut_windows(before, tail[at : at + CONTEXT_TOKENS + scored], CONTEXT_TOKENS, scored)
    ]
    return Texts(learn, chosen)


def calibrate(
    model: str | Path | None,
    data: Sequence[str | Path],
    *,
    tokens: int = DEFAULT_TOKENS,
    recall: float = 0.97,
    loss_windows: int = LOSS_WINDOWS,
    memory: int | str = "auto",
    backend: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Calibrate a flash checkpoint (or the cached copy of what `model` names) on text files; returns what was found.

    tokens: how many to learn from; recall: share of the firing neurons that a predictor must name
    loss_windows: windows of 128 + 256 tokens at the text's end on which lossy selectors are measured; 0 for none
    memory, backend: for the passes through the model; beside them one layer is held in fp32

    Raises UsageError for texts that are too short, empty or no UTF-8, and what `load` raises.
    """
    if not 0 < recall < 1:
        raise UsageError(f"--recall is {recall}; it must lie between 0 and 1")
    if tokens < MIN_TOKENS or loss_windows < 0 or seed < 0:
        raise UsageError(
            f"--tokens {tokens}, --windows {loss_windows} and --seed {seed} must be at least {MIN_TOKENS}, 0 and 0"
        )
    config = FlashConfig(memory=memory, backend=backend, select="all")
    for path in data:
        read_text(path)  # before a model is converted
    plan = plan_checkpoint(model, config, calibrated=False)
    _check_known(plan)
    config = replace(config, max_context=min(plan.context, WINDOW_TOKENS))
    plan = plan_checkpoint(
        plan.checkpoint.path, config, calibrated=False, name=plan.name, loads=True
    )  # a budget that is too small shows here
    tokenizer = plan.models.load_tokenizer(plan.checkpoint.path, plan.spec.eos_ids)
    texts = split_text(tokenizer, data, tokens, min(plan.context, WINDOW_TOKENS), loss_windows)
    check_ids([Window(ids, ids[-1:]) for ids in texts.learn], plan.spec.vocab)
    made_from = {
        "model": model_identity(plan.checkpoint.files),
        "backend": plan.backend_name,
        "text": hashlib.sha256(str(texts.learn).encode()).hexdigest(),
        "recall": recall,
        "seed": seed,
        "version": 1,
    }
    with open_workspace(plan.checkpoint.path, made_from) as work:
        calibration = _learn(work, plan, texts, config, recall, seed, progress)
        attach(plan.checkpoint, calibration)
        if texts.measure:
            losses = measure_losses(plan, texts.measure, config, calibration, progress)
            fresh = plan_checkpoint(plan.checkpoint.path, config)  # its config.json has changed
            calibration = replace(calibration, summary={**calibration.summary, "losses": losses})
            attach(fresh.checkpoint, calibration)
    layers = [dict(layer.figures) for layer in calibration.layers]
    return {"path": str(plan.checkpoint.path), **calibration.summary, "layers": layers}


def _check_known(plan: NeuronPlan) -> None:
    """Raise UsageError for a model that calibration does not know, or does not help."""
    if plan.spec.kernel_activation not in ("silu", "relu"):
        raise UsageError(
            f"calibrate knows FFNs with SiLU or ReLU, {plan.spec.table.title} has {plan.spec.activation}: "
            "use --select all or prompt:F, which need no calibration"
        )
    if plan.spec.gated and plan.spec.ffn_bias:
        raise UsageError(
            f"calibrate knows gated FFNs without biases, those of this {plan.spec.table.title} have some: use --select "
            "all or prompt:F, which need no calibration"
        )
    if any(layout.grouped for layout in plan.checkpoint.layouts):
        neurons = max(layout.neurons for layout in plan.checkpoint.layouts)
        raise UsageError(
            f"{plan.checkpoint.path} was quantised before it was converted: groups of {neurons} neurons share scales, "
            "and there is nothing to calibrate for all and prompt; for single neurons convert with --requantize -q"
        )


def _learn(
    work: Workspace, plan: NeuronPlan, texts: Texts, config: FlashConfig, recall: float, seed: int, progress: bool
) -> Calibration:
    """The statistics of every layer and, for a ReLU model, its predictors; steps in the workspace are not repeated."""
    checkpoint, spec = plan.checkpoint, plan.spec
    check_free_space(work.path, 2 * texts.tokens * spec.dim * len(spec.layers))
    inputs = FfnInputs(work.path, len(spec.layers), texts.tokens, spec.dim)
    backend = capture(checkpoint.path, config, texts.learn, inputs, progress)
    starts = [0, *np.cumsum([len(window) for window in texts.learn]).tolist()[:-1]]
    found = [_statistics(work, plan, layer, x, starts) for layer, x in enumerate(inputs.arrays)]
    summary: dict[str, Any] = {"tokens": texts.tokens, "backend": backend, "sparsities": list(SPARSITIES)}
    if spec.gated:
        lost = {lead: sum(layer.figures["lost"][lead] for layer in found) for lead in ("gate", "up")}
        summary["lead"] = min(lost, key=lambda lead: lost[lead])
    if not spec.has_zeros:
        return Calibration(tuple(found), summary)
    trained = train_predictors(work, plan, inputs.arrays, recall, seed, progress)
    layers, asked_for = [], []
    for index, (layer, (predictor, report)) in enumerate(zip(found, trained, strict=True)):
        x, count = inputs.arrays[index], len(layer.rate)
        ahead = look_ahead(plan, inputs.arrays, index, predictor)
        named = predicted_firing(x, predictor)
        asked = miss_curve(gaps(named, count))
        if index % max(1, len(found) // POLICY_LAYERS) == 0:
            tokens = [np.flatnonzero(row) for row in np.unpackbits(named[-POLICY_TOKENS:], axis=1, count=count)]
            asked_for.append((tokens, count, layer.rate))
        told = {**layer.figures, **layer_figures(report, count, ahead)}
        layers.append(replace(layer, predicted_curve=asked, figures=told, **as_stored(predictor)))
    summary["policy"] = best_policy(asked_for).plain()
    return Calibration(tuple(layers), {**summary, **_overall(layers, [report for _, report in trained], plan)})


def _overall(
    layers: Sequence[LayerCalibration], reports: Sequence[PredictorReport], plan: NeuronPlan
) -> dict[str, Any]:
    """Figures of all predictors together, on held-out tokens of the calibration."""
    counts = [len(layer.rate) for layer in layers]
    fired = sum(n * report.firing for n, report in zip(counts, reports, strict=True))
    found = sum(n * report.firing * report.recall for n, report in zip(counts, reports, strict=True))
    asked = sum(n * report.predicted for n, report in zip(counts, reports, strict=True))
    size = sum(layer.predictor_bytes for layer in layers)
    return {
        "recall": found / fired if fired else 1.0,
        "precision": found / asked if asked else 1.0,
        "firing": fired / sum(counts),
        "predicted": asked / sum(counts),
        "predictor_bytes": size,
        "predictor_share": size / weight_bytes(plan),
    }


def _statistics(
    work: Workspace, plan: NeuronPlan, layer: int, x: np.ndarray, starts: Sequence[int]
) -> LayerCalibration:
    step = f"statistics-{layer:03d}"
    kept = work.load(step)
    if kept is None:
        weights = layer_weights(plan, layer)
        count = len(weights.first)
        sampled = sample_statistics(x, weights)
        arrays = {
            "energy": energy(x, weights, starts),
            "rate": np.ones(count, np.float32),
            "curve": np.zeros((0, 2), np.float32),
        }
        if plan.spec.has_zeros:
            packed = firing(x, weights)
            arrays |= {"rate": rates(packed, count), "curve": miss_curve(gaps(packed, count))}
        figures = {
            "zeros": float(1 - arrays["rate"].mean()),
            "neurons_for_99_percent": sampled.neurons_for_99_percent,
            "cutoffs": sampled.cutoffs,
            "lost": sampled.lost,
        }
        work.save(step, arrays, figures)
        kept = arrays, figures
    arrays, figures = kept
    return LayerCalibration(**arrays, predicted_curve=np.zeros((0, 2), np.float32), figures=figures)


def measure_losses(
    plan: NeuronPlan, chosen: Sequence[Window], config: FlashConfig, calibration: Calibration, progress: bool
) -> dict[str, dict[str, float]]:
    """The loss of each lossy selector that this model can run, on some windows, by the selector's name."""
    found: dict[str, float] = {}
    for select in ("all", *LOSSY):
        try:
            check_selection(parse_selection(select), plan.spec.activation, plan.spec.gated, calibration)
            model, _ = load(plan.checkpoint.path, replace(config, select=select))
        except UsageError:
            continue
        except BudgetError as error:  # it needs more than `all`, which has just run
            print(f"the loss of {select} is not measured: {error}", file=sys.stderr)
            continue
        try:
            found[select] = measure(model, chosen, progress)["nats_per_token"]
        finally:
            model.flash.close()
    tokens = sum(len(window.scored) for window in chosen)
    return {
        name: {
            "nats_per_token": nats,
            "all": found["all"],
            "loss": float(np.expm1(nats - found["all"])),
            "tokens": tokens,
        }
        for name, nats in found.items()
        if name != "all"
    }
