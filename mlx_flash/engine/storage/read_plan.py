"""Planning the reads of a request: sort, merge neighbours, cut long runs. Arithmetic only, no I/O.

A *segment* is bytes that are contiguous in the file and in memory; a *piece* is one read, of one or more
segments with small gaps between them. Work per bundle stays in numpy, for a layer has thousands of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .bundle import DATA_START, Layout
from .reader import Target

PAGE = 4096
# A read may name at most IOV_MAX = 1024 buffers, and each segment may need one more for the gap before it.
MAX_SEGMENTS = 512
SCAN_BUNDLES = 32
# Where fewer than one in FEW has a near neighbour, each is a read of its own: finding out which reads to merge takes
# longer than the reads that are saved, and the kernel joins what lies side by side by itself.
FEW = 16


@dataclass(frozen=True)
class Merging:
    """When neighbours are merged into one read.

    gap: the most bytes between them; to read over more takes longer than a second read
    share: the most bytes of all gaps together, as a share of the bytes requested. Does not apply if a request names
        every bundle from its first to its last, as when one part of a whole layer is read.
    piece_bytes: about the longest read; a multiple of PAGE
    """

    gap: int = 8192
    share: float = 0.1
    piece_bytes: int = 1 << 20


@dataclass(frozen=True)
class Segments:
    """Columns (n,) int64, in file order: position in the file, target, position in `target.flat`, length."""

    offset: np.ndarray
    target: np.ndarray
    memory: np.ndarray
    nbytes: np.ndarray

    def take(self, index: np.ndarray) -> Segments:
        return Segments(self.offset[index], self.target[index], self.memory[index], self.nbytes[index])


@dataclass(frozen=True)
class Pieces:
    """Piece k reads [start[k], end[k]) of the file into segments first[k] .. first[k + 1].

    address (n,): where in memory each segment goes. aligned[k]: all its places and lengths are.
    """

    segments: Segments
    address: np.ndarray
    first: np.ndarray
    start: np.ndarray
    end: np.ndarray
    aligned: np.ndarray

    @cached_property
    def lists(self) -> Lists:
        """The same in plain lists, for threads that take pieces one by one."""
        found = self.segments
        columns = (found.offset, found.target, found.memory, found.nbytes)
        return Lists(*(c.tolist() for c in (*columns, self.first, self.start, self.end, self.aligned)))


class Alike(Pieces):
    """Pieces of one segment of `nbytes` each, of one target, all aligned or none: a token needs thousands of them.
    Columns that only threads use are computed when they are asked for."""

    def __init__(self, start: np.ndarray, memory: np.ndarray, base: int, nbytes: int, alike: bool):
        self.__dict__.update(start=start, address=memory + base, nbytes=nbytes, alike=alike, _memory=memory)

    nbytes: int
    alike: bool
    _memory: np.ndarray

    @cached_property
    def segments(self) -> Segments:
        target, nbytes = np.zeros(len(self.start), np.int64), np.full(len(self.start), self.nbytes)
        return Segments(self.start, target, self._memory, nbytes)

    @cached_property
    def first(self) -> np.ndarray:
        return np.arange(len(self.start) + 1)

    @cached_property
    def end(self) -> np.ndarray:
        return self.start + self.nbytes

    @cached_property
    def aligned(self) -> np.ndarray:
        return np.full(len(self.start), self.alike)


class Lists(NamedTuple):
    """The columns of Segments, then those of Pieces."""

    offset: list[int]
    target: list[int]
    memory: list[int]
    nbytes: list[int]
    first: list[int]
    start: list[int]
    end: list[int]
    aligned: list[bool]


def check_request(
    layout: Layout, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]
) -> tuple[np.ndarray, np.ndarray, list[Target]]:
    """Check a request: returns ids and rows as int64 (n,), and the targets that are not empty, in bundle order. Raises
    ValueError for values out of range."""
    if ids.ndim != 1 or ids.shape != rows.shape:
        raise ValueError(f"ids {ids.shape} and rows {rows.shape} must be two lists of the same length")
    if ids.size and (ids.dtype.kind not in "iu" or rows.dtype.kind not in "iu"):
        raise ValueError(f"ids and rows must be integers, not {ids.dtype} and {rows.dtype}")
    chosen, at, stride = [target for target in targets if target.nbytes], 0, layout.stride
    if len(chosen) > 1:
        chosen.sort(key=lambda target: target.offset)
    for target in chosen:
        end = target.offset + target.nbytes
        if target.offset < at or end > stride:
            raise ValueError(f"target [{target.offset}, {end}) overlaps another or the stride of {stride}")
        at = end
    wide_ids, wide_rows = ids.astype(np.int64, copy=False), rows.astype(np.int64, copy=False)
    if ids.size:
        capacity = min(len(target.rows) for target in chosen) if chosen else int(rows.max()) + 1
        # As unsigned numbers negative ones are too large.
        if wide_ids.view(np.uint64).max() >= layout.count or wide_rows.view(np.uint64).max() >= capacity:
            raise ValueError(
                f"ids {ids.min()}..{ids.max()} of {layout.count} bundles, "
                f"rows {rows.min()}..{rows.max()} of {capacity}: out of range"
            )
    return wide_ids, wide_rows, chosen


def plan_reads(
    layout: Layout, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target], merging: Merging, align: int
) -> Pieces:
    """The reads of a checked request that is not empty."""
    found = _one_target(layout.stride, ids, rows, targets[0], merging, align) if len(targets) == 1 else None
    if found is None:
        found = pieces(segments(layout, ids, rows, targets), targets, merging, align, is_scan(ids))
    return found


def _one_target(
    stride: int, ids: np.ndarray, rows: np.ndarray, target: Target, merging: Merging, align: int
) -> Pieces | None:
    """A fast way to plan two usual requests of one target: that of a decoded token (ascending ids with few neighbours)
    and a run of whole records. Returns None for other requests."""
    nbytes, pitch, odd = target.nbytes, target.pitch, align - 1
    begin, address = DATA_START + target.offset, target.address
    if nbytes > merging.piece_bytes or (stride | pitch | nbytes) & odd:
        return None  # long, or not all aligned alike
    aligned = not (begin | address) & odd
    step = ids[1:] - ids[:-1]
    near = np.count_nonzero(step <= (merging.gap + nbytes) // stride)
    if near * FEW < len(ids):
        if near and step.min() < 0:
            return None
        offset, memory = ids * stride, rows * pitch
        offset += begin
        return Alike(offset, memory, address, nbytes, aligned)
    if nbytes != stride or pitch != stride or (step != 1).any() or (rows[1:] - rows[:-1] != 1).any():
        return None
    skip = np.arange(0, len(ids) * stride, merging.piece_bytes)
    length = np.minimum(merging.piece_bytes, len(ids) * stride - skip)
    start, memory = skip + (begin + int(ids[0]) * stride), skip + int(rows[0]) * stride
    found = Segments(start, np.zeros(len(skip), np.int64), memory, length)
    alike = np.full(len(skip), aligned)
    return Pieces(found, memory + address, np.arange(len(skip) + 1), start, start + length, alike)


def is_scan(ids: np.ndarray) -> bool:
    """Whether these are many bundles, and all from the first to the last. ids (n,)."""
    return len(ids) >= SCAN_BUNDLES and int(ids.max()) - int(ids.min()) + 1 == len(ids)


def segments(layout: Layout, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Segments:
    """The segments of a checked request. Neighbours that are contiguous in file and memory are joined."""
    if (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        ids, rows = ids[order], rows[order]
    starts = np.array([target.offset for target in targets], np.int64)
    widths = np.array([target.nbytes for target in targets], np.int64)
    pitches = np.array([target.rows.strides[0] for target in targets], np.int64)
    offset = (ids[:, None] * layout.stride + (DATA_START + starts)).ravel()
    memory = (rows[:, None] * pitches).ravel()
    target, nbytes = np.empty(len(offset), np.int64), np.empty(len(offset), np.int64)
    target.reshape(len(ids), -1)[:], nbytes.reshape(len(ids), -1)[:] = np.arange(len(targets)), widths
    joined = (offset[1:] == offset[:-1] + nbytes[:-1]) & (memory[1:] == memory[:-1] + nbytes[:-1])
    if len(targets) > 1:
        joined &= target[1:] == target[:-1]
    if not joined.any():
        return Segments(offset, target, memory, nbytes)
    first, last = _groups(~joined)
    return Segments(offset[first], target[first], memory[first], offset[last] + nbytes[last] - offset[first])


def pieces(found: Segments, targets: Sequence[Target], merging: Merging, align: int, scan: bool = False) -> Pieces:
    """Group segments into reads. scan: the request names every bundle from its first to its last."""
    piece_bytes = merging.piece_bytes
    if found.nbytes.max() > piece_bytes:
        found = _cut(found, piece_bytes)
    end = found.offset + found.nbytes
    breaks = _breaks(found.offset[1:] - end[:-1], 1e9 if scan else merging.share * int(found.nbytes.sum()), merging.gap)
    address = np.array([target.address for target in targets], np.int64)[found.target] + found.memory
    aligned = ((found.offset | address | found.nbytes) & (align - 1)) == 0
    if breaks.all():  # every segment is a read of its own
        return Pieces(found, address, np.arange(len(end) + 1), found.offset, end, aligned)
    run_first, _ = _groups(breaks)
    run = np.zeros(len(end), np.int64)
    np.cumsum(breaks, out=run[1:])
    bucket = (found.offset - found.offset[run_first][run]) // piece_bytes
    block = (np.arange(len(end)) - run_first[run]) // MAX_SEGMENTS
    breaks |= (bucket[1:] != bucket[:-1]) | (block[1:] != block[:-1])
    first, last = _groups(breaks)
    aligned = np.logical_and.reduceat(aligned, first)
    return Pieces(found, address, np.append(first, len(end)), found.offset[first], end[last], aligned)


def _breaks(gap: np.ndarray, spare: float, merge_gap: int) -> np.ndarray:
    """Whether a read ends between each two neighbours, `gap` (n,) bytes apart. The smallest gaps are read over first,
    at most `spare` bytes in all."""
    breaks = (gap < 0) | (gap > merge_gap)  # < 0: the same bundle twice
    over = np.flatnonzero(~breaks & (gap > 0))
    if len(over):
        over = over[np.argsort(gap[over], kind="stable")]
        breaks[over[np.cumsum(gap[over]) > spare]] = True
    return breaks


def _groups(breaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last index of each group, where breaks[i] parts item i from item i + 1."""
    cuts = np.flatnonzero(breaks)
    return np.concatenate(([0], cuts + 1)), np.concatenate((cuts, [len(breaks)]))


def _cut(found: Segments, piece_bytes: int) -> Segments:
    """Segments of at most `piece_bytes`."""
    count = -(-found.nbytes // piece_bytes)
    source = np.repeat(np.arange(len(count)), count)
    skip = (np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)) * piece_bytes
    cut = found.take(source)
    return Segments(cut.offset + skip, cut.target, cut.memory + skip, np.minimum(piece_bytes, cut.nbytes - skip))
