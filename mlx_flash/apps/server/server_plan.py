"""The plan of a server: its memory holds a KV cache for each reply under way and for each prompt that is kept."""

from __future__ import annotations

from dataclasses import replace

from mlx_flash.config import FlashConfig
from mlx_flash.errors import BackendError, UsageError
from mlx_flash.runtime.planning.planner import plan_model
from mlx_flash.runtime.planning.run_plan import RunPlan


def plan_server(model: str | None, config: FlashConfig, replies: int, kept: int) -> tuple[RunPlan, int]:
    """The plan, and how many replies are generated at once: one where the selector is not exact, as it selects for one
    reply at a time. Raises BackendError, UsageError, and what planning raises."""
    if config.backend not in ("auto", "mlx"):
        raise BackendError(f"mlx_flash server runs on the mlx backend only, not on {config.backend}")
    for name, value, least in (("--replies", replies, 1), ("--kept-prompts", kept, 0)):
        if not least <= value <= 1024:
            raise UsageError(f"{name} is {value}; it must be from {least} to 1024")
    plan = plan_model(model, replace(config, backend="mlx", sequences=replies + kept))
    if plan.exact:
        return plan, replies
    return plan_model(model, replace(config, backend="mlx", sequences=1)), 1
