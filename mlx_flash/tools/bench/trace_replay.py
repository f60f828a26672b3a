"""A trace in place of what a model's own neurons would do: made from statistics, or replayed on random weights.

Random weights fire at random, which no cache can serve; what a real model asks for, token after token, is known from
traces. Replaying one gives reads and sums their true pattern. It shows mechanism and speed, nothing of quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_flash.tools.trace import Trace

# AGES[j]: share of a layer's neurons that were named last j + 1 tokens ago; AGES[0] is thus the share named per token,
# and, as every neuron ages into the next class unless it is named again, the last one the share named per token that no
# window of the tokens before holds. 10 % per token, 25 % within a window of 4 tokens, 2.4 % new: as OPT-6.7B's
# predictor names them in "LLM in a flash" (arXiv 2312.11514, section 3.1), but for the one more percent per token.
AGES = (0.100, 0.066, 0.0485, 0.0355, 0.024)


def synthetic_layer(count: int, ages: Sequence[float], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """For one layer of `count` neurons the ids named for each token, ascending int32, for ever.

    Of the neurons that were named last 1, 2, 3, ... tokens ago fixed numbers are named again, so that every token,
    from the first, has the statistics of `ages`; which ones is left to chance, evenly over the layer.
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
    """Names a trace's ids in place of a predictor's; after the last token it begins again.

    recall, precision: of the ids that are guessed a layer ahead: how many of a token's ids, and how many of the guesses
    are among these. Each layer keeps its own count of tokens, as layers are called in turn.
    """

    def __init__(self, trace: Trace, recall: float = 0.95, precision: float = 0.95, seed: int = 0):
        self.trace, self.recall, self.precision = trace, recall, precision
        self._at = [0] * len(trace.counts)
        # All of them now: drawing them is no part of what is measured.
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

    def _token(self, layer: int) -> int:
        return self._at[layer] % self.trace.tokens


def _guess(
    ids: np.ndarray, count: int, recall: float, precision: float, draw: Callable[[int], np.ndarray]
) -> np.ndarray:
    """A share `recall` of ids, and so many of the others that `precision` of all is right."""
    right = ids[draw(len(ids)) < recall]
    wrong = (draw(round(len(right) * (1 / precision - 1))) * count).astype(np.int32)
    return np.union1d(right, wrong)
