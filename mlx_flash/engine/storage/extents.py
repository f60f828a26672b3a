"""Bundles whose parts lie apart, in one or more files: the experts of a checkpoint as it was downloaded.

Knows parts, files and offsets, not which tensor is which part. Nothing is copied or converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import Layout
from .read_plan import Segments
from .reader import LayerFile, Target


@dataclass(frozen=True, eq=False)
class LayerExtents:
    """Where a layer's bundles are: part p of bundle id begins at byte offset[p, id] of the file paths[file[p, id]].

    layout: the parts back to back, as a target sees a bundle
    file, offset: (parts, count) int64, parts in layout order
    Raises ValueError if these do not fit together.
    """

    paths: tuple[Path, ...]
    layout: Layout
    file: np.ndarray
    offset: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.layout.parts), self.layout.count)
        if self.file.shape != shape or self.offset.shape != shape:
            raise ValueError(f"extents are {shape}, not files {self.file.shape} and offsets {self.offset.shape}")
        if self.file.size and not (self.file.min() >= 0 and self.file.max() < len(self.paths)):
            raise ValueError(f"files {self.file.min()}..{self.file.max()} of {len(self.paths)}: out of range")
        if self.offset.size and self.offset.min() < 0:
            raise ValueError(f"an extent begins at byte {self.offset.min()}")

    def bundle_at(self, path: Path, at: int) -> int | None:
        """The bundle that byte `at` of a file belongs to, or would if the file were long enough."""
        for number in (number for number, each in enumerate(self.paths) if each == path):
            for part, file, offset in zip(self.layout.parts, self.file, self.offset, strict=True):
                here = np.flatnonzero((file == number) & (offset <= at) & (at < offset + part.nbytes))
                if len(here):
                    return int(here[0])
        return None

    def segments(self, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> list[tuple[Path, Segments]]:
        """The segments of a checked request, file by file; neighbours contiguous in file and memory are one."""
        columns: list[np.ndarray] = []  # each (5, n): file, offset, target, memory, nbytes
        begin = 0
        for p, part in enumerate(self.layout.parts):
            end = begin + part.nbytes
            for t, target in enumerate(targets):
                low, high = max(begin, target.offset), min(end, target.offset + target.nbytes)
                if low < high:
                    memory = rows * target.pitch + (low - target.offset)
                    offset = self.offset[p, ids] + (low - begin)
                    to, nbytes = np.full_like(offset, t), np.full_like(offset, high - low)
                    columns.append(np.stack([self.file[p, ids], offset, to, memory, nbytes]))
            begin = end
        if not columns:  # the targets ask for padding only
            return []
        found = np.concatenate(columns, axis=1)
        file, offset, to, memory, nbytes = found[:, np.lexsort((found[1], found[0]))]
        joined = (file[1:] == file[:-1]) & (to[1:] == to[:-1])
        joined &= (offset[1:] == offset[:-1] + nbytes[:-1]) & (memory[1:] == memory[:-1] + nbytes[:-1])
        first = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        merged = Segments(offset[first], to[first], memory[first], np.add.reduceat(nbytes, first))
        which = file[first]
        return [(self.paths[n], merged.take(np.flatnonzero(which == n))) for n in np.unique(which).tolist()]


Source = LayerFile | LayerExtents
