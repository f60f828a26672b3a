"""Replays a trace of activations, recorded or made from statistics, on a model of random weights.

Random weights activate neurons at random, so a cache of them has no hits. With a trace of a real model, reads and sums
have their true pattern. This measures speed only, not quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import Predictor
from mlx_flash.tools.trace import Trace

# AGES[j]: share of a layer's neurons that were named last j + 1 tokens ago. AGES[0] is thus the share named per token.
# Every neuron ages into the next class unless it is named again, so the last share is also that of a token's neurons
# which no window of earlier tokens holds. 10 % per token, 25 % within a window of 4 tokens, 2.4 % new: as OPT-6.7B's
# predictor in "LLM in a flash" (arXiv 2312.11514, section 3.1), except for one more percent per token.
AGES = (0.100, 0.066, 0.0485, 0.0355, 0.024)


def synthetic_layer(count: int, ages: Sequence[float], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield, without end, the ids that one layer of `count` neurons names for each token, ascending int32.

    Of the neurons that were named last 1, 2, 3, ... tokens ago fixed numbers are named again, drawn evenly, so that
    every token, from the first, has the statistics of `ages`.
    """
    sizes = [round(share * count) for share in ages]
    again = [size - older for size, older in zip(sizes, sizes[1:], strict=False)] + [sizes[-1]]
    age = np.repeat(np.arange(1, len(ages) + 1, dtype=np.int8), [*sizes[:-1], count - sum(sizes[:-1])])
    age = rng.permutation(age)
    while True:
        shuffled = rng.permutation(count)
        by_age = age[shuffled]
        named = np.concatenate([shuffled[by_age == j][:number] for j, number in enumerate(again, 1)])
        age = np.minimum(age + 1, len(ages)).astype(np.int8)
        age[named] = 1
        yield np.sort(named).astype(np.int32)


def synthetic_trace(counts: Sequence[int], tokens: int, seed: int = 0, ages: Sequence[float] = AGES) -> Trace:
    """A trace of `tokens` decoded tokens for layers of `counts` neurons."""
    layers = [synthetic_layer(count, ages, np.random.default_rng([seed, i])) for i, count in enumerate(counts)]
    return Trace(tuple(counts), [[next(layer) for _ in range(tokens)] for layer in layers], 0)


class Replay:
    """Predictors that name a trace's ids; after the last token it begins again.

    recall, precision: of the ids that look-ahead guesses: how many of a token's ids, and how many of the guesses are
    among these. Each layer keeps its own count of tokens, as layers are called in turn.
    """

    def __init__(self, trace: Trace, recall: float = 0.95, precision: float = 0.95, seed: int = 0):
        self.trace, self.recall, self.precision = trace, recall, precision
        self._at = [0] * len(trace.counts)
        # Drawn now, not while tokens are timed.
        draw = np.random.default_rng(seed).random
        self._guesses = [
            [_guess(ids, count, recall, precision, draw) for ids in tokens]
            for count, tokens in zip(trace.counts, trace.ids, strict=True)
        ]

    def ids(self, layer: int) -> np.ndarray:
        """What the next token asks of this layer, ascending int32."""
        found = self.trace.ids[layer][self._token(layer)]
        self._at[layer] += 1
        return found

    def guess(self, layer: int) -> np.ndarray:
        """What is guessed of the layer's next token, ascending."""
        return self._guesses[layer][self._token(layer)]

    def predictor(self, layer: int, own: Predictor) -> Predictor:
        """A predictor of what the layer's next token asks for. It also computes `own`, the model's predictor, as that
        takes its share of the time."""
        return self._replaced(layer, own, self.ids)

    def guesser(self, layer: int, own: Predictor) -> Predictor:
        """The same for look-ahead: a predictor of what is guessed of the layer's next token."""
        return self._replaced(layer, own, self.guess)

    def _replaced(self, layer: int, own: Predictor, named: Callable[[int], np.ndarray]) -> Predictor:
        def begin(x: Any) -> Callable[[], np.ndarray]:
            begun = own(x)

            def logits() -> np.ndarray:
                begun()
                found = np.full(self.trace.counts[layer], -np.inf, np.float32)
                found[named(layer)] = np.inf
                return found

            return logits

        return begin

    def _token(self, layer: int) -> int:
        return self._at[layer] % self.trace.tokens


def _guess(
    ids: np.ndarray, count: int, recall: float, precision: float, draw: Callable[[int], np.ndarray]
) -> np.ndarray:
    """A share `recall` of ids, and so many of the others that `precision` of all is right."""
    right = ids[draw(len(ids)) < recall]
    wrong = (draw(round(len(right) * (1 / precision - 1))) * count).astype(np.int32)
    return np.union1d(right, wrong)


def replay_trace(model: Any, replay: Replay) -> None:
    """From now on the trace says which neurons a model with predictors asks for, and what look-ahead guesses."""
    name_neurons(model, replay)
    let_named_neurons_fire(model)


def name_neurons(model: Any, replay: Replay) -> None:
    """Hand the trace's predictors to the selectors and to the look-ahead."""
    selectors = model.flash.selectors
    for selector in selectors:
        if hasattr(selector, "predict"):  # `gate` computes what fires
            selector.predict = replay.predictor(selector.layer, selector.predict)
    if (look_ahead := selectors[0].look_ahead) is not None:
        look_ahead.predictors = [replay.guesser(layer, own) for layer, own in enumerate(look_ahead.predictors)]


def let_named_neurons_fire(model: Any) -> None:
    """Compute every named neuron to the end. ReLU lets half of the gates of random weights through, so that the other
    half would never touch its down rows: faster than any model whose trace it is. SiLU has no zeros."""
    for selector in model.flash.selectors:
        selector.decode_spec = replace(selector.decode_spec, activation="silu")
