"""The plan of a run, shown before anything is loaded: what it keeps in memory, what it reads, how fast it should be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from mlx_flash.config import FlashConfig, format_bytes
from mlx_flash.errors import BudgetError
from mlx_flash.runtime.planning.planner import plan_model
from mlx_flash.runtime.planning.run_plan import RunPlan


def inspect_model(model: str | Path | None, config: FlashConfig) -> dict[str, Any]:
    """The plan of a run as plain values, bytes throughout. A budget that is too small is reported, not raised."""
    return inspect_plan(plan_model(model, config, loads=False))


def inspect_plan(plan: RunPlan) -> dict[str, Any]:
    """The same, of a plan."""
    problem, memory = None, None
    try:
        memory = plan.memory
    except BudgetError as error:
        problem = str(error)
    checkpoint, costs = plan.checkpoint, plan.costs
    counts = [layout.count for layout in checkpoint.layouts]
    return {
        "model": plan.name,
        "path": str(checkpoint.path),
        "family": plan.spec.family,
        "activation": plan.spec.activation,
        "dtype": plan.dtype,
        "backend": plan.backend_name,
        "selector": plan.selector,
        "exact": plan.exact,
        "measured_loss": plan.measured_loss,
        "calibrated": plan.calibration is not None,
        "look_ahead": plan.look_ahead if memory else None,
        "tuning": plan.tuning.report(),
        "machine": machine_of(plan),
        "prediction": prediction_of(plan) if memory else None,
        "max_context": plan.context,
        "context_text": plan.context_text,
        "fits": problem is None,
        "problem": problem,
        "budget_bytes": plan.budget_bytes,
        "smallest_budget_bytes": costs.smallest,
        "everything_resident_bytes": costs.largest,
        "parts": memory.parts if memory else costs.fixed | {"staging": costs.staging_block},
        "bundle_bytes": max(layout.stride for layout in checkpoint.layouts),
        "ffn_bytes": sum(layout.count * layout.stride for layout in checkpoint.layouts),
        "bundles": counts,
        "capacities": list(memory.capacities) if memory else [0] * len(counts),
        "worst_bytes_per_token": plan.worst_bytes_per_token if memory else None,
        "available_memory_bytes": psutil.virtual_memory().available,
    }


def machine_of(plan: RunPlan) -> dict[str, Any]:
    """The measurements of this machine that a plan uses, or why there are none."""
    found = plan.machine
    if found is None:
        return {"measured": False, "problem": plan.machine_problem}
    return {"measured": True, "problem": None, "device": found.device, "host": found.host, "when": found.when}


def prediction_of(plan: RunPlan) -> dict[str, Any] | None:
    """How long a token should take, in seconds; None where that is not known."""
    found = plan.prediction
    return asdict(found) | {"total_s": found.total_s, "tokens_per_s": found.tokens_per_s} if found else None


def loss_text(loss: dict[str, Any] | None) -> str:
    """The measured loss of a selector that is not exact."""
    if loss is None:
        return "not exact; its loss was not measured: mlx_flash perplexity"
    return f"not exact: perplexity {loss['loss']:+.2%} when calibrated, over {loss['tokens']} tokens"


def print_inspection(report: dict[str, Any]) -> None:
    """Print the report on stdout."""
    exact = "exact" if report["exact"] else loss_text(report["measured_loss"])
    print(report["model"] if report["model"] == report["path"] else f"{report['model']} ({report['path']})")
    print(f"  {report['family']}, {report['activation']}, {report['dtype']}; backend {report['backend']}, "
          f"selector {report['selector']} ({exact}), context {report['context_text']}")  # fmt: skip
    alike = report["ffn_bytes"] == sum(report["bundles"]) * report["bundle_bytes"]
    print(f"  FFN on flash {format_bytes(report['ffn_bytes'])} in {sum(report['bundles']):,} bundles of "
          f"{'' if alike else 'up to '}{format_bytes(report['bundle_bytes'])}")  # fmt: skip
    print(f"budget {format_bytes(report['budget_bytes'])} (smallest {format_bytes(report['smallest_budget_bytes'])}, "
          f"everything resident {format_bytes(report['everything_resident_bytes'])}, "
          f"available now {format_bytes(report['available_memory_bytes'])})")  # fmt: skip
    for name, size in report["parts"].items():
        print(f"  {name:<16} {format_bytes(size):>10}")
    print("layer  bundles  resident")
    for layer, (count, capacity) in enumerate(zip(report["bundles"], report["capacities"], strict=True)):
        print(f"{layer:>5}  {count:>7}  {capacity:>8}  {capacity / count:4.0%}")
    if report["fits"]:
        print(f"a token reads at worst {format_bytes(report['worst_bytes_per_token'])}")
    else:
        print(f"does not fit: {report['problem']}")
    print_tuning(report)


TUNING_NAMES = {
    "merge_gap": "gaps read over",
    "reads_in_flight": "reads in flight",
    "direct": "around the page cache",
    "staging_blocks": "staging blocks, at most",
    "look_ahead": "look-ahead",
}


def print_tuning(report: dict[str, Any]) -> None:
    """Print how bundles are read and why, and the speed that is predicted."""
    machine, prediction = report["machine"], report["prediction"]
    if machine["measured"]:
        print(f"reads, as measured on {machine['device']}, {machine['when']}")
    elif machine["problem"]:
        print(f"reads, as where nothing was measured: {machine['problem']}")
    else:
        print(f"reads: this machine was not measured; do so: mlx_flash bench --probe --dir {report['path']}")
    for name, chosen in report["tuning"].items():
        value = chosen["value"]
        if name == "merge_gap":
            value = format_bytes(value)
        elif type(value) is bool:
            value = "yes" if value else "no"
        print(
            f"  {TUNING_NAMES[name]:<24} {'as many as the reader takes' if value is None else value} ({chosen['why']})"
        )
    if prediction is None:
        if machine["measured"] and report["fits"]:
            print("no prediction: a probe measures the kernels of the numpy backend only")
        return
    parts = ("waited_s", "dense_s", "sparse_s", "selection_s", "other_s")
    names = ("waiting for reads", "dense", "sparse", "selection", "other")
    split = ", ".join(f"{name} {prediction[part] * 1e3:.3g}" for name, part in zip(names, parts, strict=True))
    print(f"predicted for {report['selector']}: {prediction['tokens_per_s']:.3g} tokens/s, prompt "
          f"{prediction['prompt_tokens_per_s']:.3g} tokens/s, reading {format_bytes(prediction['bytes_per_token'])} a "
          f"token in {prediction['reads_s'] * 1e3:.3g} ms")  # fmt: skip
    print(f"  ms a token: {split}")
    if prediction["assumption"]:
        print(f"  {prediction['assumption']}")
