"""The selector `prompt`: chooses the neurons of a whole reply while its prompt is computed (GRIFFIN, arXiv 2404.01365).

The prompt itself is computed exactly. Loses quality; `calibrate` measures how much.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNPass, Slab
from mlx_flash.engine.residency.staging import BlockRequest

from .context import blocks
from .sparse import LayerSetup, SparseSelector, part_rows, top


class PromptSelector(SparseSelector):
    """Any model: the `fraction` of the neurons with the most energy over the prompt computes the whole reply, so that
    nothing is read once these are resident.

    Energy: the mean over tokens of (h |down|)^2, without a prompt's first token, whose activations are unlike those of
    all others. (GRIFFIN divides by each token's total and leaves |down| out.)
    Where activations have no exact zeros, the average output of the other neurons over the prompt is added to every
    output (bias compensation: FLAP, arXiv 2312.11983), which costs no read. With ReLU that doubled the loss.

    prior (count,): calibrated energies, which count as PRIOR_TOKENS tokens; None without a calibration.
    reselect: every so many decoded tokens one is computed with all neurons, which counts as RESELECT_TOKENS.
    """

    PRIOR_TOKENS = 2048
    RESELECT_TOKENS = 32

    def __init__(
        self, setup: LayerSetup, fraction: float, prior: np.ndarray | None = None, reselect: int | None = None
    ):
        super().__init__(setup)
        self.fraction, self.reselect = fraction, reselect
        every = self.count * self.neurons  # sums are per neuron
        self.prior = np.zeros(every) if prior is None else self.PRIOR_TOKENS * prior.astype(np.float64)
        self.down_squares = np.full(every, -1.0)
        self.compensates = self.spec.activation != "relu"
        self.reply, self.decoded = self.shared.reply, 0
        self._forget_prompt()

    def _forget_prompt(self) -> None:
        self.tokens = 0  # those that were summed up, times their weights
        self.energy, self.scalars = np.zeros_like(self.prior), np.zeros_like(self.prior)  # sums over these tokens
        self.output = np.zeros(self.spec.layout.dim)
        self.ids: np.ndarray | None = None
        self.offset: np.ndarray | None = None

    def is_decode(self, x: Any) -> bool:
        if not super().is_decode(x) or self.reply != self.shared.reply or not self.tokens:
            return False
        self.decoded += 1
        return self.reselect is None or self.decoded % self.reselect != 0

    def _decode(self, x: Any) -> Any:
        result = super()._decode(x)
        return result if self.offset is None else self.shared.backend.shift(result, self.offset)

    def choose(self, x: Any, work: FFNPass) -> np.ndarray:
        if self.ids is None:
            energy = (self.energy + self.prior).reshape(self.count, self.neurons).sum(axis=1)
            self.ids = top(energy, self.fraction).astype(np.int32)
            if self.compensates:
                offset = (self.output - self._chosen_output()) / self.tokens
                if self.spec.down_bias is not None:  # a part of every output already
                    offset -= self.shared.backend.to_numpy(self.spec.down_bias)
                self.offset = offset.astype(np.float32)
        return self.ids

    def _chosen_output(self) -> np.ndarray:
        """The chosen neurons' part of the summed outputs of the prompt, (d,) fp64. They are read for it, block by block
        in the order of the file, and get their slots."""
        assert self.ids is not None
        per_block = [self.ids[(self.ids >= f) & (self.ids < f + n)] for f, n in blocks(0, self.count, self.block)]
        requests = [BlockRequest(self.layer, ids) for ids in per_block if len(ids)]
        self.shared.stream.start(requests, self._fetch_block)
        total = np.zeros_like(self.output)
        for request in requests:
            _, staging = self.shared.stream.take()
            scalars = self.scalars.reshape(self.count, self.neurons)[request.ids].reshape(-1)
            total += scalars @ part_rows(staging, self.spec.layout, "down", len(request.ids))
            rows = np.arange(len(request.ids))
            self.loader.warm(request.ids, np.ones((1, len(rows)), bool), staging.targets, rows)
            self.shared.stream.release(staging)
        return total

    def uses(self, first: int, h: np.ndarray) -> np.ndarray:
        """None yet: the choice is made when the whole prompt has been seen."""
        return np.zeros((len(h), h.shape[1] // self.neurons), bool)

    def _prefill(self, x: Any) -> Any:
        self.sequences = int(np.prod(x.shape[:-2]))
        result = super()._prefill(x)
        if not self.compensates:
            return result
        rows = self._counted(self.shared.backend.to_numpy(result).reshape(-1, len(self.output)))
        self.output += self.weight * rows.sum(axis=0, dtype=np.float64)
        return result

    def _counted(self, rows: np.ndarray) -> np.ndarray:
        """rows (T, n), sequence after sequence, without each sequence's first token where that is skipped."""
        if not self.skipped:
            return rows
        return rows.reshape(self.sequences, -1, rows.shape[1])[:, self.skipped :].reshape(-1, rows.shape[1])

    def prompt_block(self, first: int, h: np.ndarray, staging: Slab) -> None:
        ids = slice(first * self.neurons, first * self.neurons + h.shape[1])
        if first == 0:
            self._begin_chunk(len(h) // self.sequences)
        if self.down_squares[ids.start] < 0:
            rows = part_rows(staging, self.spec.layout, "down", h.shape[1] // self.neurons)
            self.down_squares[ids] = np.square(rows).sum(axis=1, dtype=np.float64)
        counted = self._counted(h)
        self.scalars[ids] += self.weight * counted.sum(axis=0, dtype=np.float64)
        squares = np.square(counted).sum(axis=0, dtype=np.float64)
        self.energy[ids] += self.weight * squares * self.down_squares[ids]

    def _begin_chunk(self, tokens: int) -> None:
        """Before a chunk of `tokens` tokens per sequence: a prompt's, or one token computed whole to select anew."""
        if self.reply != self.shared.reply or (self.decoded and tokens > 1):
            self._forget_prompt()
            self.reply, self.decoded = self.shared.reply, 0
        self.skipped = 1 if not self.tokens and tokens > 1 else 0
        self.weight = self.RESELECT_TOKENS if self.decoded else 1
        self.tokens += self.weight * self.sequences * (tokens - self.skipped)
        self.ids = None
