"""Picks the next token from one row of logits with NumPy: greedy, temperature, top-p, top-k.

Top-p and top-k leave the same tokens as in mlx-lm; which of them is drawn depends on the seed alone.
Knows nothing of models, caches or how a reply ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_flash.errors import FlashError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How a token is picked; raises UsageError for values out of range.

    temp: 0 = greedy; otherwise logits are divided by it, after top-p and top-k
    top_p: smallest set of tokens that holds this share of the probability at temperature 1; 0 and 1 = off
    top_k: at most this many tokens, of those top_p left; 0 = off
    seed: the same seed gives the same tokens; None = another draw every time
    """

    temp: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temp) or self.temp < 0:
            raise UsageError(f"temp is {self.temp}; it must be a finite number from 0 (greedy) up")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must lie between 0 and 1 (both are off)")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be a whole number from 0 (off) up")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64):
            raise UsageError(f"seed is {self.seed}; it must be a whole number from 0 up, below 2^64, or left out")


def make_sampler(sampling: Sampling) -> Callable[[NDArray[np.floating]], int]:
    """A function from logits (V,) to a token id; each call draws once from one generator started at `seed`.

    Raises FlashError for logits with NaN or +inf, or without any finite value.
    """
    generator = np.random.default_rng(sampling.seed)

    def sample(logits: NDArray[np.floating]) -> int:
        _check(logits)
        if sampling.temp == 0:
            return int(np.argmax(logits))  # NumPy names the first maximum: the lowest id wins a tie
        return _draw(logits, sampling, generator)

    return sample


def surviving(logits: NDArray[np.floating], top_p: float, top_k: int) -> NDArray[np.intp]:
    """The ids, ascending, that top-p and then top-k leave of logits (V,). Ties at place k go to the lowest ids."""
    # All in float32 and from the largest probability down, as mlx-lm does: at top_p 0.99 of 150,000 tokens
    # float64 would keep some hundred more or fewer.
    scores = logits.astype(np.float32)
    largest = scores.max()
    scores -= largest + np.log(np.exp(scores - largest).sum(dtype=np.float32))
    keep = scores > -np.inf
    if 0 < top_p < 1:
        descending = np.sort(scores)[::-1]
        mass = np.cumsum(np.exp(descending), dtype=np.float32)
        above = np.concatenate([np.zeros(1, np.float32), mass[:-1]])
        kept = int(np.count_nonzero(above < np.float32(top_p) * mass[-1]))
        keep &= scores >= descending[kept - 1]
    ids = np.flatnonzero(keep)
    if 0 < top_k < ids.size:
        best = np.argsort(-scores[ids], kind="stable")[:top_k]
        ids = np.sort(ids[best])
    return ids


def _draw(logits: NDArray[np.floating], sampling: Sampling, generator: np.random.Generator) -> int:
    ids = surviving(logits, sampling.top_p, sampling.top_k)
    scores = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is meant
        weights = np.exp((scores - scores.max()) / sampling.temp)
    mass = np.cumsum(weights)
    place = np.searchsorted(mass, generator.random() * mass[-1], side="right")
    return int(ids[min(int(place), ids.size - 1)])


def _check(logits: NDArray[np.floating]) -> None:
    if logits.ndim != 1:
        raise FlashError(f"logits have the shape {logits.shape}; one row (vocabulary,) is sampled at a time")
    largest = logits.max(initial=-np.inf)  # NaN if any is NaN
    if np.isfinite(largest):
        return
    nan, inf = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
    raise FlashError(
        f"cannot pick a token: of {logits.size} logits {nan} are NaN and {inf} are infinite, "
        f"{int(np.isfinite(logits).sum())} finite; the weights are damaged (`mlx_flash verify`) or too large"
    )
