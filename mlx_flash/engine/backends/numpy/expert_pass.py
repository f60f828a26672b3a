"""A mixture's experts on the numpy backend: their memory, and their FFNs on the tokens routed to them.

An expert's FFN is act(gate . x) * (up . x), then down . that, rows as they are in the checkpoint. Every (token, expert)
pair is a result of its own, whose bits depend neither on the expert's slot nor on the other pairs. Knows
slots and arrays; neither files nor routers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlx_flash.engine.backends.numpy.kernels.base import Kernels, Weights, activate
from mlx_flash.engine.numerics.affine import AffineRows
from mlx_flash.engine.storage.bundle import WORD_BITS, Layout

from .slab import NumpySlab
from .tiles import Scratch, Tiles

PARTS = ("gate", "up", "down")
FEW = 4  # tokens of one expert up to which its rows are decoded in registers for each, not widened once for all
TILE_ROWS = 256  # of weights, widened for one product


class NumpyExpertSlab(NumpySlab):
    """`rows` experts. shapes: of each matrix, (rows, columns); a quantised one is a part of codes, one of scales and
    one of biases."""

    def __init__(self, layout: Layout, shapes: Mapping[str, tuple[int, int]], rows: int):
        super().__init__(layout, rows, [part.name for part in layout.parts])
        self._shapes = shapes
        self._fields = {
            name: [self._views[part].reshape(rows, shape[0], -1) for part in layout.parts_of(name)]
            for name, shape in shapes.items()
        }

    def matrix(self, name: str, row: int) -> Weights:
        """A matrix of the expert in a slot, as it is stored: a view."""
        found = [field[row] for field in self._fields[name]]
        if len(found) == 1:
            return found[0]
        codes, scales, biases = found
        return AffineRows(codes, scales, biases, WORD_BITS * codes.shape[1] // self._shapes[name][1])


class NumpyExpertPass:
    """Experts of one layer on x (T, d), the expert of pair p on token p // k. out (T * k, d): the pairs' results.

    activation: of the gate. chosen (T, k): the experts, distinct for each token.
    """

    def __init__(self, kernels: Kernels, tiles: Tiles, activation: str, x: np.ndarray, chosen: np.ndarray):
        self.kernels, self.tiles, self.activation, self.chosen = kernels, tiles, activation, chosen
        self.x = np.ascontiguousarray(x, np.float32)
        self.out = np.empty((chosen.size, x.shape[1]), np.float32)

    def add(self, ids: np.ndarray, rows: np.ndarray, slab: NumpyExpertSlab) -> None:
        """Compute all pairs of the experts `ids`, which lie in `rows` of the slab."""
        flat, k = self.chosen.reshape(-1), self.chosen.shape[1]
        many: list[tuple[int, np.ndarray]] = []
        for expert, row in zip(ids.tolist(), rows.tolist(), strict=True):
            pairs = np.flatnonzero(flat == expert)
            if len(pairs) <= FEW:
                for pair in pairs.tolist():
                    self._one(slab, row, pair, pair // k)
            else:
                many.append((row, pairs))
        at = 0
        while at < len(many):  # as many experts at once as have no more pairs than there are tokens
            end, held = at + 1, len(many[at][1])
            while end < len(many) and held + len(many[end][1]) <= len(self.x):
                held += len(many[end][1])
                end += 1
            self._several(slab, many[at:end])
            at = end

    def result(self, weights: np.ndarray) -> np.ndarray:
        """The pairs' results times weights (T, k) fp32, added up token by token in the order chosen: (T, d)."""
        pairs = self.out.reshape(*self.chosen.shape, -1)
        total = pairs[:, 0] * weights[:, :1]
        for j in range(1, self.chosen.shape[1]):
            total += pairs[:, j] * weights[:, j : j + 1]
        return total

    def _one(self, slab: NumpyExpertSlab, row: int, pair: int, token: int) -> None:
        gate, up, down = (slab.matrix(name, row) for name in PARTS)
        h = self.kernels.neurons(gate, up, None, self.x[token], acts=(self.activation, ""))
        self.out[pair] = self.kernels.dots(down, None, h)

    def _several(self, slab: NumpyExpertSlab, experts: Sequence[tuple[int, np.ndarray]]) -> None:
        """Experts with several tokens each: tiles of weights, widened, through BLAS."""
        tiles, k = self.tiles, self.chosen.shape[1]
        places = np.cumsum([0] + [len(pairs) for _, pairs in experts])
        width, dim = slab.matrix("gate", experts[0][0]).shape
        h = tiles.scratch.get("expert h", (int(places[-1]), width))
        x = tiles.scratch.get("expert x", (int(places[-1]), dim))
        for (_, pairs), at in zip(experts, places.tolist(), strict=False):
            np.take(self.x, pairs // k, axis=0, out=x[at : at + len(pairs)], mode="clip")

        def neurons(scratch: Scratch, task: int) -> None:
            number, tile = divmod(task, -(-width // TILE_ROWS))
            mine, rows = slice(places[number], places[number + 1]), slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
            lead, follow = (
                self._product(scratch, name, x[mine], slab.matrix(name, experts[number][0])[rows])
                for name in ("gate", "up")
            )
            h[mine, rows] = activate(self.activation, lead)
            h[mine, rows] *= follow

        def sums(scratch: Scratch, task: int) -> None:
            number, tile = divmod(task, -(-dim // TILE_ROWS))
            rows, (row, pairs) = slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS), experts[number]
            mine = h[places[number] : places[number + 1]]
            self.out[pairs, rows] = self._product(scratch, "down", mine, slab.matrix("down", row)[rows])

        tiles.each(len(experts) * -(-width // TILE_ROWS), neurons)
        tiles.each(len(experts) * -(-dim // TILE_ROWS), sums)

    def _product(self, scratch: Scratch, name: str, x: np.ndarray, weights: Weights) -> np.ndarray:
        """x (n, columns), weights (rows, columns) -> (n, rows), in memory that the next call of this name uses again"""
        return np.matmul(x, scratch.wide(weights).T, out=scratch.get(name, (len(x), len(weights))))


def expert_scratch_bytes(tokens: int, dim: int, width: int, top_k: int, threads: int) -> int:
    """Most bytes that a pass over so many tokens takes beyond slabs."""
    wide = 4 * TILE_ROWS * max(dim, width) + 3 * 4 * TILE_ROWS * tokens
    return 4 * tokens * (top_k * dim + width + 3 * dim) + threads * wide
