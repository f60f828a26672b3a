"""A loaded model's run: counters, reader and the token loop, whatever the model's bundles are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.config import FlashConfig
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.errors import UsageError
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.specs.key_checks import unknown_keys, unknown_keys_text
from mlx_flash.models.specs.model_spec import ContextLimit
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime.planning.selective_persistence import Largest, auto_budget

DEFAULT_CONTEXT = 2048


def announce(message: str) -> None:
    """What takes a while is said before it begins, on stderr."""
    print(message, file=sys.stderr, flush=True)


def budget_for(config: FlashConfig, costs: Largest) -> int:
    return auto_budget(costs) if config.memory == "auto" else int(config.memory)


def report_keys(models: Any, config: Mapping[str, Any]) -> None:
    """Say on stderr which keys of a model's config nothing here understands. models: the backend's model code; one that
    does not tell what it reads is not asked."""
    reader = getattr(models, "keys_read", None)
    unknown = [] if reader is None else unknown_keys(config, reader(config))
    if unknown:
        print(unknown_keys_text(unknown), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Context:
    """A run's context in tokens, the model's own, and why they differ or what the choice means; None: nothing."""

    tokens: int
    most: int
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.reason is None else f"{self.tokens} of {self.most}: {self.reason}"


def decide_context(wanted: int | None, most: int, limit: ContextLimit | None) -> Context:
    """The context of a run of a model with `most` tokens. Raises UsageError for a longer one, and for one in which
    positions or windows would not be those of the model."""
    end = most if limit is None else min(limit.tokens, most)
    context = wanted or min(DEFAULT_CONTEXT, end)
    if limit is not None and limit.hard and context > end:
        raise UsageError(f"--max-context {context} is beyond {end} of the model's {most} tokens: {limit.reason}")
    if context > most:
        raise UsageError(f"--max-context {context} is beyond the model's {most} tokens")
    if limit is None:
        return Context(context, most)
    if context > end:
        return Context(context, most, limit.beyond)
    return Context(context, most, limit.reason if context == end < min(DEFAULT_CONTEXT, most) else None)


class BaseRun:
    """A loaded model's plan, counters, reader and selectors (of the layers that have one, in order); `model.flash` is
    one. `close` gives its files and threads back."""

    def __init__(self, plan: Any, shared: SharedContext):
        self.plan, self.shared, self.stats = plan, shared, shared.stats
        self.selectors: list[Any] = []

    @contextmanager
    def phase(self, decoding: bool) -> Iterator[None]:
        """What runs within is a prompt's tokens (exact with every selector) or decoded ones."""
        self.shared.decoding = decoding
        try:
            yield
        finally:
            self.shared.decoding = None

    def begin_reply(self) -> None:
        """What comes is another prompt: what was selected for the last one is void."""
        self.shared.reply += 1

    def forced(self, model: Any, prompt_ids: Sequence[int], next_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits (vocab,) fp32 after the prompt, then after each of `next_ids`, which pass one by one as if they had
        been sampled."""
        yield from self.plan.models.forced(model, prompt_ids, next_ids, self.plan.config.prefill_chunk)

    def steps(
        self,
        model: Any,
        prompt_ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        kept: PromptCache | None = None,
    ) -> Iterator[int]:
        """Yield sampled ids after the prompt, `max_tokens` at most. A selector that is not exact learns from the whole
        prompt: then nothing `kept` is used."""
        held, chunk = kept if self.plan.exact else None, self.plan.config.prefill_chunk
        yield from self.plan.models.steps(model, prompt_ids, max_tokens, sampling, chunk, held)

    def close(self) -> None:
        self.shared.stream.stop()
        self.shared.reader.close()
