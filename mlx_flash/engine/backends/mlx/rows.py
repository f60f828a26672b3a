"""Rows of weights as MLX arrays, plain or quantised, and the two products that an FFN needs of them.

Knows shapes and dtypes; not where the rows lie or what they mean. Needs mlx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_flash.engine.storage.bundle import Quantisation


@dataclass(frozen=True)
class MlxRows:
    """Rows (groups, n, d): one array, or codes, scales and, where the mode has them, biases, each (groups, n, .).

    across: for x . row; a plain array is then (groups, d, n). wide: sums of quantised rows are computed in fp32: MLX's
    CPU adds them up in the dtype of the scales, which in bfloat16 loses six times more than one rounding, and takes six
    times longer. Its other devices add up in fp32.
    """

    arrays: tuple[mx.array, ...]
    coded: Quantisation | None = None
    across: bool = False
    wide: bool = False

    def product(self, left: mx.array) -> mx.array:
        """across: x (1 or groups, T, d) -> (groups, T, n); else h (groups, T, n) -> (groups, T, d)."""
        # The left operand is broadcast: the other way round MLX folds the groups into the rows of one product, whose
        # kernel then depends on their number. For T > 1 on Metal it does in any case: there is one group.
        if self.coded is None:
            return left @ self.arrays[0]
        codes, scales = self.arrays[:2]
        biases = self.arrays[2] if len(self.arrays) > 2 else None
        if self.wide and not self.across:
            left, scales, biases = (array.astype(mx.float32) for array in (left, scales, self.arrays[2]))
        coded = self.coded
        return mx.quantized_matmul(
            left, codes, scales, biases, self.across, coded.group_size, coded.bits, mode=coded.mode
        )

    def rows(self, part: slice, groups: int) -> MlxRows:
        """Rows `part` of a single group, not across, as so many groups."""
        return self._each(lambda array: array[:, part].reshape(groups, -1, array.shape[-1]))

    def copy(self) -> MlxRows:
        """The same rows in memory of their own, not across."""
        return self.ordered(mx.arange(self.count))

    def ordered(self, index: mx.array) -> MlxRows:
        """Copies of the rows `index` (n,) of every group, not across."""
        return self._each(lambda array: mx.take(array, index, axis=1))

    def followed_by(self, other: MlxRows) -> MlxRows:
        """The rows of both, single groups, not across."""
        pairs = zip(self.arrays, other.arrays, strict=True)
        return MlxRows(tuple(mx.concatenate(list(pair), axis=1) for pair in pairs), self.coded, wide=self.wide)

    @property
    def count(self) -> int:
        """Rows of a group, not across."""
        return int(self.arrays[0].shape[1])

    def _each(self, function: Callable[[mx.array], mx.array]) -> MlxRows:
        return MlxRows(tuple(function(array) for array in self.arrays), self.coded, wide=self.wide)


def make_rows(arrays: Sequence[mx.array], groups: int, coded: Quantisation | None, across: bool, wide: bool) -> MlxRows:
    """Rows (n, .) of each array as `groups` groups."""
    shaped = [array.reshape(groups, -1, array.shape[-1]) for array in arrays]
    if across and coded is None:
        shaped = [array.swapaxes(1, 2) for array in shaped]
    return MlxRows(tuple(shaped), coded, across, wide)
