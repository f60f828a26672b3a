"""Fits one low-rank predictor: prepared inputs, gradient descent, rounding, and counts of its scores.

Knows arrays only: no prices of a whole model and no ranks to choose from. Works in blocks or minibatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mlx_flash.engine.numerics.casting import from_float32, to_float32
from mlx_flash.errors import UsageError

Firing = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[int, int], None]

LEAST_TOKENS = 1024
HELD_SHARE = 0.15
BATCH = 512
BLOCK = 512
FASTEST = 0.3  # Adam's highest rate, times the square root of the width
LEAST_STEPS = 128
MOST_BALANCE = 20.0  # a firing counts at most so many times a silence: beyond it, neurons are asked for in vain


class TrainingData:
    """Whitened inputs and packed firing of the tokens to train on, and the held-out tail unchanged."""

    def __init__(self, x: np.ndarray, gate: np.ndarray | Firing, tokens: int | None):
        if x.ndim != 2 or len(x) < LEAST_TOKENS:
            raise UsageError(
                f"a predictor is trained on the FFN inputs of at least {LEAST_TOKENS} tokens, got {x.shape[0]}; "
                "use a longer text"
            )
        self.fires: Firing = gate if callable(gate) else lambda block: block @ gate.T > 0
        held = int(len(x) * HELD_SHARE)
        self.tail, inputs = x[len(x) - held :], x[: min(len(x) - held, tokens or len(x))]
        total, self.dim = inputs.shape
        self.mean, self.whiten = _whitening(inputs)
        self.inputs = np.empty((total, self.dim), np.float16)
        packed, self.fired, self.cross = [], np.zeros(0), np.zeros((0, self.dim), np.float32)
        for at, block in enumerate(row_blocks(inputs)):
            white, firing = (block - self.mean) @ self.whiten.T, self.fires(block)
            self.inputs[at * BLOCK : at * BLOCK + len(block)] = np.clip(white, -6e4, 6e4)
            packed.append(np.packbits(firing, axis=1))
            if at == 0:
                self.fired, self.cross = np.zeros(firing.shape[1]), np.zeros((firing.shape[1], self.dim), np.float32)
            self.fired += firing.sum(axis=0)
            self.cross += firing.T.astype(np.float32) @ white
        self.packed = np.concatenate(packed)
        self._whole: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def count(self) -> int:
        return len(self.fired)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (n, d) fp32, (n, count) bool
        firing = np.unpackbits(self.packed[rows], axis=1, count=self.count)
        return self.inputs[rows].astype(np.float32), firing.view(bool)

    def start(self, rest: np.ndarray, rate: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """A pair a (rank, d), b (n, rank) to descend from, for the neurons `rest` (n,) that fire at `rate` (n,).

        The covariance of firing and whitened inputs is the direction of a neuron's gate, whatever decides that it
        fires; the pair is the best of its rank for such rows, each neuron counting by its variance.
        """
        spread = np.sqrt(rate * (1 - rate))[:, None]
        rows = self.cross[rest] / np.float32(len(self.inputs)) / spread
        if self._whole is None or len(rest) < self.count:
            values, vectors = np.linalg.eigh(rows.T @ rows)  # of (d, d): far cheaper than the rows' own SVD
            spectrum = values[::-1], vectors[:, ::-1].T
            if len(rest) == self.count:
                self._whole = spectrum
        else:
            spectrum = self._whole
        root = np.maximum(spectrum[0][:rank], 1e-12)[:, None] ** 0.25
        right = spectrum[1][:rank]
        return (root * right).astype(np.float32), (rows @ right.T / root.T / spread).astype(np.float32)


def row_blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """fp32 pieces of at most BLOCK rows."""
    for begin in range(0, len(x), BLOCK):
        yield np.asarray(x[begin : begin + BLOCK], np.float32)


def _whitening(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mean (d,) and W (d, d) fp32 such that W (x - mean) has unit covariance."""
    total, dim = x.shape
    mean = np.zeros(dim)
    for block in row_blocks(x):
        mean += block.sum(axis=0, dtype=np.float64) / total
    centre, second = mean.astype(np.float32), np.zeros((dim, dim))
    for block in row_blocks(x):
        second += (block - centre).T @ (block - centre)
    if not np.isfinite(second).all():
        raise UsageError("the FFN inputs hold values that are not numbers, or too large: is the checkpoint intact?")
    values, vectors = np.linalg.eigh(second / total)
    values = np.maximum(values, max(values[-1] * 1e-6, 1e-12))  # what never varies must not become noise
    return centre, np.ascontiguousarray((vectors / np.sqrt(values)).T, np.float32)


def descend(
    data: TrainingData,
    rest: np.ndarray,
    parameters: tuple[np.ndarray, np.ndarray, np.ndarray],
    weight: float,
    seed: int,
    epochs: int,
    progress: Progress | None = None,
) -> None:
    """Adam on the logistic loss of a (r, d), b (n, r), bias (n,) for the neurons `rest` (n,), in place.

    A firing counts 1, a silence `weight`. The rate falls along a cosine.
    """
    a, b, bias = parameters
    rng, total = np.random.default_rng(seed), len(data.inputs)
    size = min(BATCH, total)
    steps, step = max(epochs * (total // size), LEAST_STEPS), 0
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    order = np.empty(0, np.int64)
    while step < steps:
        if len(order) < size:
            order = rng.permutation(total)
        x, firing = data.batch(order[:size])
        order, step = order[size:], step + 1
        firing = firing if len(rest) == data.count else firing[:, rest]
        inner = x @ a.T
        slope = _slope(inner @ b.T + bias, firing, weight)
        gradients = (slope @ b).T @ x, slope.T @ inner, slope.sum(axis=0)
        speed = FASTEST / data.dim**0.5 * min(step / 20, 0.01 + 0.5 * (1 + np.cos(np.pi * step / steps)))
        for parameter, (first, second), gradient in zip(parameters, moments, gradients, strict=True):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            scale = np.sqrt(second / (1 - 0.999**step)) + 1e-9
            parameter -= np.float32(speed / (1 - 0.9**step)) * first / scale
        if progress is not None and (step % 16 == 0 or step == steps):
            progress(step, steps)


def _slope(scores: np.ndarray, firing: np.ndarray, weight: float) -> np.ndarray:
    """The mean loss's gradient in the scores (n, count), in their memory: sigmoid(z) - 1 where a neuron fires, weight *
    sigmoid(z) where not."""
    size = len(scores)
    np.negative(scores, out=scores)
    np.clip(scores, -30, 30, out=scores)
    np.exp(scores, out=scores)
    scores += 1
    np.reciprocal(scores, out=scores)
    scores -= firing
    scores *= np.where(firing, np.float32(1 / size), np.float32(weight / size))
    return scores


def round_pair(a: np.ndarray, b: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The pair rounded to what `dtype` can hold; scales may move between the two."""
    if dtype != "int8":
        return to_float32(from_float32(a, dtype), dtype), to_float32(from_float32(b, dtype), dtype)
    if not a.size or not b.any():
        return np.zeros_like(a), np.zeros_like(b)
    # Directions in order of what they matter, or one that matters little could take the range of all.
    outer, upper = np.linalg.qr(b)
    inner, lower = np.linalg.qr(a.T)
    left, values, right = np.linalg.svd(upper @ lower.T)
    fit = len(values)
    a, b = np.zeros_like(a), np.zeros_like(b)
    a[:fit], b[:, :fit] = right[:fit] @ inner.T, (outer @ left[:, :fit]) * values
    scale = np.maximum(np.abs(a).max(axis=1), 1e-30) / 127
    a, b = np.rint(a / scale[:, None]), b * scale
    step = np.exp2(np.ceil(np.log2(np.abs(b).max() / 127)))
    return a, np.rint(b / step) * np.float32(step)


def count_scores(
    data: TrainingData, scores: Callable[[np.ndarray], np.ndarray], cuts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On the held-out tail: asked (K, count), lost (K, count), rate (count,) fp32 shares of its tokens.

    cuts (K,): evenly spaced, ascending; a neuron is asked for at cut k where its score is above it.
    """
    count = data.count
    asked, lost = np.zeros((2, len(cuts) + 1, count), np.int64)
    columns = np.arange(count)
    for block in row_blocks(data.tail):
        firing = data.fires(block)
        below = np.ceil((scores(block) - cuts[0]) / (cuts[1] - cuts[0]))  # how many cuts are below the score
        cells = np.clip(below, 0, len(cuts)).astype(np.int64) * count + columns
        asked += np.bincount(cells.ravel(), minlength=asked.size).reshape(asked.shape)
        lost += np.bincount(cells[firing], minlength=lost.size).reshape(lost.shape)
    rate = lost.sum(axis=0)
    above = asked[::-1].cumsum(axis=0)[::-1][1:]
    return (
        (above / len(data.tail)).astype(np.float32),
        (lost.cumsum(axis=0)[:-1] / len(data.tail)).astype(np.float32),
        (rate / len(data.tail)).astype(np.float32),
    )
