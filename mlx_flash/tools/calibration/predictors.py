"""Trains low-rank predictors, which name the FFN neurons that will fire from the FFN's input, and chooses their
ranks.

Knows inputs and which neurons fired on them; not where they come from, nor how predictors are stored. Works on one
layer at a time, in minibatches: beside the inputs it takes N d halves, N count bits, some (count, d) and (d, d)
matrices.

A neuron is asked for where its odds of firing exceed 1 / price: finding one more firing neuron is worth `price`
bundles asked for in vain, in every layer alike. That makes the fewest requests for a recall of the whole model.
Neurons that nearly every token would ask for are *always on*: they stay resident, are never read, and leave the rank
to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_flash.errors import UsageError

from .predictor_fit import MOST_BALANCE, Firing, Progress, TrainingData, count_scores, descend, round_pair

ITEM_BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
PRICES = np.geomspace(400.0, 0.4, 73)  # dearest first: recall falls along them
RESERVE = 0.1  # share of the misses allowed that is left to text unlike the one that was learnt from
LEAST_ALWAYS = 0.1  # a neuron that costs fewer requests per token is not worth a slot of its own
RANKS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Predictor:
    """a (r, d), b (count, r), bias (count,), fp32: a neuron is asked for where b @ (a @ x) + bias > 0.

    Scores are log-odds up to a constant of the layer. Neurons that are always, or never, asked for have b = 0 and a
    bias of 1 or -1. Rounded to `int8`, a is whole numbers from -127 to 127 and b such numbers times a power of two.
    """

    a: np.ndarray
    b: np.ndarray
    bias: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def always(self) -> np.ndarray:
        """(count,) bool: the neurons asked for whatever the input."""
        return (self.bias > 0) & ~self.b.any(axis=1)

    def scores(self, x: np.ndarray) -> np.ndarray:  # (N, d) -> (N, count)
        return (x @ self.a.T) @ self.b.T + self.bias


@dataclass(frozen=True)
class PredictorReport:
    """Figures of a predictor on `tokens` held-out tokens: `firing`, `predicted` and `always` are shares of the
    neurons."""

    rank: int
    tokens: int
    firing: float
    predicted: float
    always: float
    recall: float
    precision: float


@dataclass(frozen=True)
class PriceCurve:
    """One layer at one rank on held-out tokens, neuron by neuron and price by price.

    asked (K, count): share of the tokens that ask for a neuron at PRICES[k]; lost (K, count): share on which it fires
    unasked; rate (count,): share on which it fires. All fp32.
    """

    rank: int
    tokens: int
    asked: np.ndarray
    lost: np.ndarray
    rate: np.ndarray

    def cost(self, k: int) -> np.ndarray:  # (count,)
        """Requests per token, each firing that is lost counting as PRICES[k] of them."""
        return self.asked[k] + np.float32(PRICES[k]) * self.lost[k]

    def report(self, k: int, always: np.ndarray) -> PredictorReport:
        """At PRICES[k], with the neurons `always` (count,) always on."""
        asked = float(np.where(always, 1.0, self.asked[k]).sum())
        fired, lost = float(self.rate.sum()), float(self.lost[k][~always].sum())
        recall = 1 - lost / fired if fired else 1.0
        precision = (fired - lost) / asked if asked else 1.0
        count = len(always)
        return PredictorReport(
            self.rank, self.tokens, fired / count, asked / count, float(always.mean()), recall, precision
        )


@dataclass(frozen=True)
class TrainedPredictor:
    """A predictor whose price is not chosen yet. A score of 0 means odds of `weight`, the weight of a silent neuron
    in the loss."""

    predictor: Predictor
    weight: float
    curve: PriceCurve

    def at(self, k: int, always: np.ndarray) -> tuple[Predictor, PredictorReport]:
        """The predictor at PRICES[k], with the neurons `always` (count,) bool always on, and how it did."""
        fitted, report = self.predictor, self.curve.report(k, always)
        bias = fitted.bias - np.float32(_cuts(self.weight)[k])
        constant = always | ~fitted.b.any(axis=1)
        bias[constant] = np.where(always | (bias > 0), 1.0, -1.0)[constant]
        b = fitted.b * ~constant[:, None]
        return Predictor(fitted.a, b, bias), report


@dataclass(frozen=True)
class RankChoice:
    """The result of `choose_ranks`: a rank per layer, the neurons that are always on, and figures to expect per
    token."""

    ranks: tuple[int, ...]
    always: tuple[np.ndarray, ...]
    recall: float
    nbytes: int
    requests: float  # for neurons that are not always on


def predictor_bytes(rank: int, dim: int, count: int, dtype: str) -> int:
    """Bytes that a predictor takes: a and b in `dtype`, the bias in fp32."""
    return ITEM_BYTES[dtype] * rank * (dim + count) + 4 * count


def default_ranks(dim: int, count: int) -> list[int]:
    """Ranks worth a sketch: up to half of the width, and less weights than the gate itself."""
    found = [rank for rank in RANKS if dim // 32 < rank <= dim // 2 and rank * (dim + count) <= dim * count]
    return found or [max(1, min(dim, count) // 4)]


def train_layer(
    x: np.ndarray,
    gate: np.ndarray | Firing,
    *,
    rank: int,
    always: np.ndarray | None = None,
    seed: int = 0,
    dtype: str = "int8",
    epochs: int = 12,
    progress: Progress | None = None,
) -> TrainedPredictor:
    """Train one layer's predictor with a class-balanced logistic loss; measure it on the last tokens of `x`.

    x: (N, d) float16 or float32 in the order of the text, a memmap will do
    gate: (count, d) fp32, a neuron firing where gate . x > 0, or a callable from (T, d) fp32 to (T, count) bool
    always: (count,) bool, neurons that are left out of it
    progress: called with (steps done, steps)

    The weights are rounded to `dtype` before anything is measured. Deterministic for a seed, up to BLAS's own threads.
    Raises UsageError for too few tokens, an impossible rank or an unknown dtype.
    """
    return _train(TrainingData(x, gate, None), rank, always, seed, dtype, epochs, progress)


def sketch_layer(
    x: np.ndarray,
    gate: np.ndarray | Firing,
    ranks: Sequence[int],
    *,
    seed: int = 0,
    dtype: str = "int8",
    epochs: int = 4,
    tokens: int = 16384,
    progress: Progress | None = None,
) -> list[PriceCurve]:
    """Price curves of one layer's predictor at rank 0 and at `ranks`, from short trainings on the first `tokens`."""
    data, curves = TrainingData(x, gate, tokens), []
    tried = sorted({0, *ranks})
    for rank in tried:
        curves.append(_train(data, rank, None, seed, dtype, epochs, None).curve)
        if progress is not None:
            progress(len(curves), len(tried))
    return curves


def choose_ranks(
    sketches: Sequence[Sequence[PriceCurve]],
    dim: int,
    *,
    budget_bytes: int,
    recall: float = 0.97,
    dtype: str = "int8",
    always_share: float = 0.23,
) -> RankChoice:
    """Ranks and always-on neurons that make the fewest requests at a recall of the whole model.

    sketches: per layer, by rank, what `sketch_layer` gave; always_share: most neurons of the model that may be always
    on. They fill the cache, so leave a part of its share to the others: 2/3 of it was best.

    A layer gets no rank that it would need to double to cut its cost by less than 5 %; within `budget_bytes` for all of
    them, the ranks that save most per byte. Raises UsageError if the biases alone exceed the budget.
    """
    counts = [len(curves[0].rate) for curves in sketches]
    sizes = [
        [predictor_bytes(c.rank, dim, n, dtype) for c in curves] for curves, n in zip(sketches, counts, strict=True)
    ]
    least = sum(layer[0] for layer in sizes)
    if least > budget_bytes:
        raise UsageError(f"predictors of rank 0 take {least} bytes, the budget for all of them is {budget_bytes}")
    fired = sum(float(curves[0].rate.sum()) for curves in sketches)
    most = int(always_share * sum(counts))
    ranks = [[c.rank for c in curves] for curves in sketches]
    for k in reversed(range(len(PRICES))):
        low, high = LEAST_ALWAYS, 1.0 + float(PRICES[k])
        for last in (False,) * 16 + (True,):  # bisect what a slot is worth: the dearer, the fewer neurons get one
            slot = high if last else (low * high) ** 0.5
            costs = [[float(np.minimum(c.cost(k), slot).sum()) for c in curves] for curves in sketches]
            picks = _spend(costs, sizes, ranks, budget_bytes)
            chosen = [curves[pick] for curves, pick in zip(sketches, picks, strict=True)]
            always = tuple(c.cost(k) > slot for c in chosen)
            low, high = (low, slot) if sum(int(on.sum()) for on in always) <= most else (slot, high)
        lost = sum(float(c.lost[k][~on].sum()) for c, on in zip(chosen, always, strict=True))
        if lost <= (1 - recall) * fired or k == 0:
            break
    return RankChoice(
        tuple(curves[pick].rank for curves, pick in zip(sketches, picks, strict=True)),
        always,
        1 - lost / fired if fired else 1.0,
        sum(layer[pick] for layer, pick in zip(sizes, picks, strict=True)),
        sum(float(c.asked[k][~on].sum()) for c, on in zip(chosen, always, strict=True)),
    )


def choose_price(
    layers: Sequence[TrainedPredictor], always: Sequence[np.ndarray], recall: float = 0.97
) -> list[tuple[Predictor, PredictorReport]]:
    """The predictors at the lowest price that reaches `recall`, and a little more, over all layers' held-out firings.

    always: what `choose_ranks` gave. If no price reaches it, everything is always on.
    """
    least = recall + RESERVE * (1 - recall)
    for k in reversed(range(len(PRICES))):
        done = [layer.at(k, on) for layer, on in zip(layers, always, strict=True)]
        fired = [len(on) * report.firing for (_, report), on in zip(done, always, strict=True)]
        if sum(n * report.recall for n, (_, report) in zip(fired, done, strict=True)) >= least * sum(fired):
            return done
    return [layer.at(0, np.ones_like(on)) for layer, on in zip(layers, always, strict=True)]


def train_predictor(
    x: np.ndarray, gate: np.ndarray | Firing, *, rank: int, recall: float = 0.97, seed: int = 0, dtype: str = "int8"
) -> tuple[Predictor, PredictorReport]:
    """One layer on its own: the fewest requests that find `recall` of its firing neurons. See `train_layer`."""
    trained = train_layer(x, gate, rank=rank, seed=seed, dtype=dtype)
    return choose_price([trained], [np.zeros(len(trained.curve.rate), bool)], recall)[0]


def _train(
    data: TrainingData,
    rank: int,
    always: np.ndarray | None,
    seed: int,
    dtype: str,
    epochs: int,
    progress: Progress | None,
) -> TrainedPredictor:
    if dtype not in ITEM_BYTES:
        raise UsageError(f"unknown dtype {dtype!r} for predictors; known: {', '.join(ITEM_BYTES)}")
    if not 0 <= rank <= min(data.dim, data.count):
        raise UsageError(f"rank {rank} is outside 0 to {min(data.dim, data.count)}")
    # Without a rank all are asked for: a guess by rate alone would never find the rare ones, and some matter much.
    left_out = np.full(data.count, rank == 0) if always is None or rank == 0 else always
    rest, total = np.flatnonzero(~left_out), len(data.inputs)
    a, b = np.zeros((rank, data.dim), np.float32), np.zeros((data.count, rank), np.float32)
    bias, weight = np.full(data.count, 100, np.float32), 1.0  # beyond every cut
    if len(rest):
        rate = np.clip(data.fired[rest] / total, 0.5 / total, 1 - 0.5 / total).astype(np.float32)
        weight = float(np.clip(rate.sum() / (1 - rate).sum(), 1 / MOST_BALANCE, 1.0))
        offset = np.log(rate / (1 - rate)) - np.float32(np.log(weight))
        inner, outer = data.start(rest, rate, rank)
        descend(data, rest, (inner, outer, offset), weight, seed, epochs, progress)
        a, b[rest] = round_pair(inner @ data.whiten, outer, dtype)
        bias[rest] = offset - b[rest] @ (a @ data.mean)
    predictor = Predictor(a, b, bias)
    return TrainedPredictor(
        predictor, weight, PriceCurve(rank, len(data.tail), *count_scores(data, predictor.scores, _cuts(weight)))
    )


def _cuts(weight: float) -> np.ndarray:
    """(K,) scores above which a neuron is asked for at PRICES."""
    return -np.log(PRICES * weight)


def _spend(costs: list[list[float]], sizes: list[list[int]], ranks: list[list[int]], budget_bytes: int) -> list[int]:
    """Which rank each layer gets: from rank 0 up, always the step that saves most per byte and still fits."""
    limits = [_enough(cost, rank) for cost, rank in zip(costs, ranks, strict=True)]
    picks, left = [0] * len(costs), budget_bytes - sum(size[0] for size in sizes)
    while True:
        best = (0.0, 0, 0)
        for layer, (cost, size, pick) in enumerate(zip(costs, sizes, picks, strict=True)):
            for to in range(pick + 1, limits[layer] + 1):
                extra = size[to] - size[pick]
                if extra <= left:
                    best = max(best, ((cost[pick] - cost[to]) / extra, layer, to))
        gain, layer, to = best
        if gain <= 0:
            return picks
        left -= sizes[layer][to] - sizes[layer][picks[layer]]
        picks[layer] = to


def _enough(costs: list[float], ranks: list[int]) -> int:
    """The first rank from which no larger one saves 5 % for each doubling; from rank 0, 5 % at all."""
    for at, rank in enumerate(ranks):
        doublings = [np.log2(other / rank) if rank else 1.0 for other in ranks[at + 1 :]]
        if all(cost > 0.95**n * costs[at] for cost, n in zip(costs[at + 1 :], doublings, strict=True)):
            return at
    return len(ranks) - 1
