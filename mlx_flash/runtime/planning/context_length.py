"""How many tokens of context a run gets, and why they may be fewer than the model's."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_flash.errors import UsageError
from mlx_flash.models.specs.model_spec import ContextLimit

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class ContextLength:
    """A run's context in tokens, the model's own, and why they differ or what the choice means; None: nothing."""

    tokens: int
    most: int
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.reason is None else f"{self.tokens} of {self.most}: {self.reason}"


def decide_context(wanted: int | None, most: int, limit: ContextLimit | None) -> ContextLength:
    """The context of a run of a model with `most` tokens. Raises UsageError for a longer one, and for one in which
    positions or windows would not be those of the model."""
    end = most if limit is None else min(limit.tokens, most)
    context = wanted or min(DEFAULT_CONTEXT, end)
    if limit is not None and limit.hard and context > end:
        raise UsageError(f"--max-context {context} is beyond {end} of the model's {most} tokens: {limit.reason}")
    if context > most:
        raise UsageError(f"--max-context {context} is beyond the model's {most} tokens")
    if limit is None:
        return ContextLength(context, most)
    if context > end:
        return ContextLength(context, most, limit.beyond)
    return ContextLength(context, most, limit.reason if context == end < min(DEFAULT_CONTEXT, most) else None)
