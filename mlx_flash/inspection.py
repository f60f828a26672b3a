"""What a run would keep in memory and read, told before anything is loaded (`mlx_flash inspect`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from .config import FlashConfig, format_bytes
from .errors import BudgetError
from .load import decide


def inspect_model(model: str | Path | None, config: FlashConfig) -> dict[str, Any]:
    """The plan of a run as plain values, bytes throughout. A budget that is too small is reported, not raised."""
    plan, problem, memory = decide(model, config), None, None
    try:
        memory = plan.memory
    except BudgetError as error:
        problem = str(error)
    checkpoint, costs = plan.checkpoint, plan.costs
    counts = [layout.count for layout in checkpoint.layouts]
    return {
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
        "max_context": plan.context,
        "fits": problem is None,
        "problem": problem,
        "budget_bytes": plan.budget_bytes,
        "smallest_budget_bytes": costs.smallest,
        "everything_resident_bytes": costs.largest,
        "parts": memory.parts if memory else costs.fixed | {"staging": costs.staging_block},
        "bundle_bytes": checkpoint.layouts[0].stride,
        "ffn_bytes": sum(layout.count * layout.stride for layout in checkpoint.layouts),
        "bundles": counts,
        "capacities": list(memory.capacities) if memory else [0] * len(counts),
        "worst_bytes_per_token": plan.worst_bytes_per_token if memory else None,
        "available_memory_bytes": psutil.virtual_memory().available,
    }


def loss_text(loss: dict[str, Any] | None) -> str:
    """What a selector that is not exact loses, as far as it was measured."""
    if loss is None:
        return "not exact; its loss was not measured: mlx_flash perplexity"
    return f"not exact: perplexity {loss['loss']:+.2%} when calibrated, over {loss['tokens']} tokens"


def print_inspection(report: dict[str, Any]) -> None:
    """The report for a person, on stdout."""
    exact = "exact" if report["exact"] else loss_text(report["measured_loss"])
    print(f"{report['path']}")
    print(f"  {report['family']}, {report['activation']}, {report['dtype']}; backend {report['backend']}, "
          f"selector {report['selector']} ({exact}), context {report['max_context']} tokens")  # fmt: skip
    print(f"  FFN on flash {format_bytes(report['ffn_bytes'])} in {sum(report['bundles']):,} bundles of "
          f"{format_bytes(report['bundle_bytes'])}")  # fmt: skip
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
