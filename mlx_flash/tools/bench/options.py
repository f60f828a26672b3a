"""The settings of `mlx_flash bench`, checked before the work begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_flash.config import FlashConfig, Selection
from mlx_flash.errors import UsageError
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.runtime.planning.context_length import decide_context
from mlx_flash.tools.trace import Trace

from .trace_replay import synthetic_trace

WITH_PREDICTORS = ("predictor",)  # the selectors whose choice a trace can replace
LEAST_TRACE, MOST_TRACE = 128, 1024  # tokens that are made up; after the last the trace begins again


@dataclass(frozen=True)
class BenchOptions:
    """What a bench run measures; raises UsageError for values out of range.

    tokens: decoded and timed, and as many more with clocks inside; warm: decoded before them; prompt: its length;
    rounds: replies that are measured
    trace: a file, "synthetic", or None; recall, precision: of the guesses of a replayed trace
    """

    tokens: int = 32
    warm: int = 8
    prompt: int = 64
    rounds: int = 1
    trace: str | None = None
    recall: float = 0.95
    precision: float = 0.95

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("warm", 0), ("prompt", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.recall <= 1 or not 0 < self.precision <= 1:
            raise UsageError(
                f"--recall {self.recall:g} and --precision {self.precision:g} are shares: of 0 to 1, precision above 0"
            )

    @property
    def reply(self) -> int:
        """Tokens decoded in a round."""
        return self.warm + 2 * self.tokens

    def check_context(self, spec: ModelSpec, config: FlashConfig) -> None:
        """Raise UsageError unless a round fits the context."""
        context = decide_context(config.max_context, spec.max_context, spec.limit).tokens
        if self.prompt + self.reply > context:
            raise UsageError(
                f"--prompt {self.prompt}, --warm {self.warm} and twice --tokens {self.tokens} are "
                f"{self.prompt + self.reply} tokens, the context holds {context}: ask for fewer, or raise --max-context"
            )

    def with_trace(self, selection: Selection) -> BenchOptions:
        """These options for a model with random weights: its predictors name random neurons, so a trace replaces them
        where none is given."""
        if selection.name not in WITH_PREDICTORS or self.trace is not None:
            return self
        return replace(self, trace="synthetic")

    def make_trace(self, counts: tuple[int, ...]) -> Trace | None:
        """The trace to replay on layers of so many bundles; raises UsageError, FormatError."""
        if self.trace is None:
            return None
        if self.trace == "synthetic":
            return synthetic_trace(counts, min(MOST_TRACE, max(LEAST_TRACE, self.rounds * self.reply)))
        trace = Trace.load(self.trace)
        if trace.counts != counts:
            raise UsageError(
                f"{self.trace} is of {_geometry(trace.counts)}, the model has {_geometry(counts)}: record one of this "
                "model, or use --trace synthetic"
            )
        if not trace.tokens:
            raise UsageError(f"{self.trace} has no tokens")
        return trace


def _geometry(counts: tuple[int, ...]) -> str:
    return f"{len(counts)} layers of {min(counts)} to {max(counts)} bundles ({sum(counts)} in all)"
