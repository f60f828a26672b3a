"""mlx-lm's model classes with FFN modules that call a function instead of holding weights. Needs mlx-lm.

Knows nothing of files or of what the functions do. mlx-lm's generate, caches, samplers and adapters take such a model
like any other of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ConfigError

from .dense_corrections import fit_class, fit_dense_weights
from .output_head import fit_head

FFN = Callable[[mx.array], mx.array]


class Bias(nn.Module):
    """The bias of a linear layer whose weight is on flash."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = mx.zeros((size,))


class FlashFFNModule(nn.Module):
    """Replaces a layer's FFN: calls `ffn` on x (B, T, d). Its only parameters are biases, if there are any.

    biases: (name, size) of those of up, down and, where there is one, gate
    """

    def __init__(self, ffn: FFN, biases: Sequence[tuple[str, int]] = ()):
        super().__init__()
        self._ffn = ffn
        self._biased = [name for name, _ in biases]
        for name, size in biases:
            self[name] = Bias(size)

    def biases(self) -> list[mx.array]:
        return [self[name].bias for name in self._biased]

    def __call__(self, x: mx.array) -> mx.array:
        return self._ffn(x)


class ReplyWatch:
    """Tells whether a new reply begins, from the caches that a model is called with: mlx-lm's loops do not say so."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Any], int] | None = None  # the first layer's cache, and the tokens it then held

    def begins(self, tokens: int, cache: Sequence[Any] | None) -> bool:
        """Whether a call of so many tokens per sequence with this cache belongs to another reply than the last one."""
        last, self._last = self._last, None
        if not cache:
            return True
        first = cache[0]
        offset = getattr(first, "offset", None)
        if not isinstance(offset, int):  # a batch has an array of them
            return not hasattr(first, "empty") or first.empty() or last is not None
        self._last = weakref.ref(first), offset + tokens
        # A cache that is quantised on the way is another object, which goes on where the one before ended.
        goes_on = last is not None and (last[0]() is first or last[1] == offset)
        return offset == 0 or not goes_on


def flash_model(model_class: type, tied: bool = False, config: Mapping[str, Any] | None = None) -> type:
    """A subclass of the architecture's class that tells its run when a reply begins and refuses weights for FFNs.

    tied: whether the head is the embedding, which the architecture may not look at. config: in its normal form, for the
    corrections of what the architecture does not look at.
    """
    model_class = fit_class(model_class, config or {})

    class FlashModel(model_class):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self._reply_watch = ReplyWatch()

        def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> Any:
            if (run := getattr(self, "flash", None)) is not None and self._reply_watch.begins(inputs.shape[1], cache):
                run.shared.begin_reply()
            return super().__call__(inputs, cache=cache, **options)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            found = super().sanitize(weights) if hasattr(model_class, "sanitize") else weights
            return fit_dense_weights(self, fit_head(self, found, tied), config or {})

        def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any:
            """As any module of MLX; raises ConfigError for an FFN's weights, which would be dropped if not strict."""
            if isinstance(file_or_weights, str):
                loaded: Any = mx.load(file_or_weights)
                file_or_weights = list(loaded.items())
            taken = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, FlashFFNModule))
            wrong = [] if strict else [name for name, _ in file_or_weights if name.startswith(taken)]
            if wrong:
                raise ConfigError(
                    f"{len(wrong)} tensors are for FFNs, which are read from flash, such as {wrong[0]!r}; an adapter "
                    'can change attention only ("keys" in its lora_parameters)'
                )
            return super().load_weights(file_or_weights, strict)

    return FlashModel
