"""Statistics of a layer's neurons over a text: how often they fire, how soon again, with what energy; and cut-offs.

Arithmetic on arrays, a slice of tokens or neurons at a time; knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from mlx_flash.engine.backends.numpy.kernels.base import activate

SAMPLE_TOKENS = 2048  # of which all scalars are held at once
TOKENS = 1024  # per slice
NEURONS = 512
SPARSITIES = tuple(round(0.05 * step, 2) for step in range(1, 20))
PROXY_SPARSITY = 0.5  # at which gate and up are compared
QUANTILE_ITEMS = 1 << 22


@dataclass(frozen=True)
class FfnWeights:
    """One FFN in fp32: first (m, d) is the part that the activation is applied to, times `second` where there is one;
    bias (m,) is added to its products; down (m, d). cutoff: FATReLU's."""

    first: np.ndarray
    second: np.ndarray | None
    down: np.ndarray
    bias: np.ndarray | None
    activation: str
    cutoff: float = 0.0

    @property
    def offset(self) -> np.ndarray | float:
        """A neuron of a ReLU model fires where first . x + offset > 0."""
        return -self.cutoff if self.bias is None else self.bias - np.float32(self.cutoff)

    def active(self, x: np.ndarray) -> np.ndarray:
        """Activations (T, m) of x (T, d)."""
        values = x @ self.first.T
        if self.bias is not None:
            values += self.bias
        activate(self.activation, values)
        if self.cutoff:
            values[values <= np.float32(self.cutoff)] = 0
        return values

    def scalars(self, x: np.ndarray) -> np.ndarray:
        """h (T, m) of x (T, d)."""
        active = self.active(x)
        return active if self.second is None else active * (x @ self.second.T)


def slices(x: np.ndarray) -> Iterator[np.ndarray]:
    """x (N, d) in fp32, some tokens at a time."""
    for begin in range(0, len(x), TOKENS):
        yield np.asarray(x[begin : begin + TOKENS], np.float32)


def firing(x: np.ndarray, weights: FfnWeights) -> np.ndarray:
    """Which neurons fire for which token: (N, ceil(m / 8)) uint8, bits packed."""
    return np.concatenate([np.packbits(weights.active(part) != 0, axis=1) for part in slices(x)])


def gaps(packed: np.ndarray, count: int) -> np.ndarray:
    """A histogram of the tokens between a neuron's uses: hist[g] uses came g tokens after the one before. (N + 1,)
    int64; a neuron's first use has no gap and is left out."""
    tokens = len(packed)
    histogram = np.zeros(tokens + 1, np.int64)
    for begin in range(0, packed.shape[1], NEURONS // 8):
        fires = np.unpackbits(packed[:, begin : begin + NEURONS // 8], axis=1)[:, : count - 8 * begin]
        neuron, token = np.nonzero(fires.T)
        same = neuron[1:] == neuron[:-1]
        histogram += np.bincount((token[1:] - token[:-1])[same], minlength=tokens + 1)
    return histogram


def miss_curve(histogram: np.ndarray) -> np.ndarray:
    """(k, 2) fp32, for windows of 0, 1, 2, 4, ... tokens: the distinct bundles that the last tokens used, and the
    bundles that a token asks for beyond them ("LLM in a flash", section 3.1.2: s_agg(k), s_agg(k + 1) - s_agg(k))."""
    tokens = len(histogram) - 1
    gap = np.arange(tokens + 1)
    windows = [0] + [1 << bit for bit in range(max(1, tokens).bit_length() - 1)]
    rows = [(np.sum(histogram * np.minimum(gap, k)) / tokens, histogram[k + 1 :].sum() / tokens) for k in windows]
    return np.array(rows, np.float32)


def rates(packed: np.ndarray, count: int) -> np.ndarray:
    """Share of the tokens that fire each neuron, (m,) fp32."""
    totals = np.zeros(packed.shape[1] * 8, np.int64)
    for begin in range(0, len(packed), TOKENS):
        totals += np.unpackbits(packed[begin : begin + TOKENS], axis=1).sum(axis=0, dtype=np.int64)
    return (totals[:count] / len(packed)).astype(np.float32)


def energy(x: np.ndarray, weights: FfnWeights, starts: Collection[int] = ()) -> np.ndarray:
    """The mean of (h |down|)^2 over the tokens of x (N, d), (m,) fp32. starts: tokens that begin a text, which are
    left out because their activations are unlike all others. All tokens count: a neuron that seldom fires needs
    many."""
    total, left_out = np.zeros(len(weights.first)), np.zeros(len(x), bool)
    left_out[list(starts)] = True
    for index, part in enumerate(slices(x)):
        counted = part[~left_out[index * TOKENS : index * TOKENS + len(part)]]
        total += np.square(weights.scalars(counted)).sum(axis=0, dtype=np.float64)
    mean = total / max(1, len(x) - int(left_out.sum()))
    return (mean * np.square(weights.down).sum(axis=1, dtype=np.float64)).astype(np.float32)


@dataclass(frozen=True)
class SampleStatistics:
    """From a sample of tokens: for each of SPARSITIES the magnitude below which that share of gate (or up) values
    lies; the share of the output's energy that each loses; the share of the neurons that hold 99 % of a token's
    energy."""

    cutoffs: dict[str, list[float]]
    lost: dict[str, float]
    neurons_for_99_percent: float


def sample_statistics(x: np.ndarray, weights: FfnWeights) -> SampleStatistics:
    """Statistics that need all scalars of a token at once, on up to SAMPLE_TOKENS tokens of x (N, d)."""
    some = np.asarray(x[:: max(1, len(x) // SAMPLE_TOKENS)][:SAMPLE_TOKENS], np.float32)
    active = weights.active(some)
    ups = None if weights.second is None else some @ weights.second.T
    squares = np.square(active if ups is None else active * ups)
    totals = np.maximum(squares.sum(axis=1, keepdims=True), np.float32(1e-30))
    ordered = -np.sort(-squares / totals, axis=1)
    needed = np.where(ordered[:, 0] > 0, (np.cumsum(ordered, axis=1) < 0.99).sum(axis=1) + 1, 0)
    cutoffs, lost = {}, {}
    if ups is not None:
        outputs = squares * np.square(weights.down).sum(axis=1)
        whole = max(float(outputs.sum(dtype=np.float64)), 1e-30)  # in a dead layer nothing can be lost
        for name, lead in (("gate", active), ("up", ups)):
            magnitude = np.abs(lead)
            cutoffs[name] = _quantiles(magnitude)
            cut = np.interp(PROXY_SPARSITY, SPARSITIES, cutoffs[name])
            lost[name] = float(outputs[magnitude <= cut].sum(dtype=np.float64)) / whole
    return SampleStatistics(cutoffs, lost, float(needed.mean() / len(weights.first)))


def _quantiles(values: np.ndarray) -> list[float]:
    flat = values.ravel()
    return [float(v) for v in np.quantile(flat[:: max(1, flat.size // QUANTILE_ITEMS)], SPARSITIES)]
