"""The protocol of all readers of bundles, and its types: targets, layer files, pending reads, reports.

Knows ids, rows and bytes, not how bytes are fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from mlx_flash.errors import ReadError
from mlx_flash.stats import Stats

from .bundle import DATA_START, Layout


@dataclass(frozen=True, eq=False)
class Target:
    """Memory that receives bytes [offset, offset + nbytes) of bundles.

    rows: uint8 (n, nbytes), writable, each row contiguous; row `slot` takes one bundle's bytes. `nbytes` may
    reach into the padding, up to the stride: whole records in rows `stride` apart are read in one go.
    """

    offset: int
    rows: np.ndarray

    def __post_init__(self) -> None:
        rows = self.rows
        if rows.dtype != np.uint8 or rows.ndim != 2 or not rows.flags.writeable or self.offset < 0:
            raise ValueError(f"a target needs writable uint8 rows, not {rows.dtype} {rows.shape} at {self.offset}")
        if rows.size and (
            rows.strides[1] != 1 and rows.shape[1] > 1 or len(rows) > 1 and rows.strides[0] < rows.shape[1]
        ):
            raise ValueError(f"a target's rows must be contiguous and apart, not of strides {rows.strides}")

    @cached_property
    def nbytes(self) -> int:
        return int(self.rows.shape[1])

    @cached_property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return int(self.rows.strides[0])

    @cached_property
    def address(self) -> int:
        return int(self.rows.ctypes.data)

    @cached_property
    def flat(self) -> memoryview:
        """All rows, and what lies between them, as one run of bytes; row r begins at r * rows.strides[0]."""
        count, nbytes = self.rows.shape
        length = (count - 1) * self.rows.strides[0] + nbytes if count and nbytes else 0
        return np.lib.stride_tricks.as_strided(self.rows, (length,), (1,)).data


@dataclass(frozen=True)
class LayerFile:
    """The file of a layer's bundles: bundle `id` begins at byte DATA_START + id * stride."""

    path: Path
    layout: Layout

    def bundle_at(self, path: Path, at: int) -> int | None:
        """The bundle that byte `at` of a file belongs to; None for another file."""
        return (at - DATA_START) // self.layout.stride if path == self.path else None


@dataclass(frozen=True)
class ReadReport:
    """Bytes read, gaps and alignment included, and the number of reads."""

    bytes: int
    reads: int


class Pending(Protocol):
    """The reads of a request, under way."""

    def wait(self) -> ReadReport:
        """Wait until all reads have ended. Raises ReadError, after all have ended too. The rows may be reused
        afterwards; after an error their bytes are undefined. A second call has the same outcome."""

    def ended(self) -> bool:
        """Whether `wait` would return or raise at once. Does not wait for the disk."""

    def give_up(self) -> None:
        """Start no further read of this request. Returns at once, while reads under way still write to the rows. So
        `wait` must still be called; it raises ReadError unless all reads had been started."""


class Done:
    """A request that has ended, with a report or with the error that `wait` raises."""

    def __init__(self, outcome: ReadReport | ReadError | None = None):
        self.outcome = outcome or ReadReport(0, 0)

    def wait(self) -> ReadReport:
        if isinstance(self.outcome, ReadError):
            raise self.outcome
        return self.outcome

    def ended(self) -> bool:
        return True

    def give_up(self) -> None:
        """Does nothing: no read is left."""


class Together:
    """Several requests as one."""

    def __init__(self, requests: Sequence[Pending]):
        self.requests = tuple(requests)

    def wait(self) -> ReadReport:
        reports, errors = [], []
        for request in self.requests:
            try:
                reports.append(request.wait())
            except Exception as error:  # the others still write to the rows: it is raised when all have ended
                errors.append(error)
        if errors:
            raise errors[0]
        return ReadReport(sum(report.bytes for report in reports), sum(report.reads for report in reports))

    def ended(self) -> bool:
        return all([request.ended() for request in self.requests])  # each one asked goes on with what waits its turn

    def give_up(self) -> None:
        for request in self.requests:
            request.give_up()


class Reader(Protocol):
    """Reads bundles of layers into rows of memory. Used by one thread."""

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """Begin to read bundle ids[i] into row rows[i] of every target.

        ids, rows (n,) integers, in any order; rows are distinct; targets overlap neither in the bundle nor in
        memory. The rows belong to the reader until `wait` of the returned object has ended, which also raises
        the disk's errors. Raises ValueError for ids, rows or targets out of range, UsageError if the reader is
        closed.
        """

    def drain(self) -> None:
        """Give up all requests, also one that an interrupted `submit` started, and wait: afterwards nothing writes to
        any row. Requests that have not been read by then fail."""

    def close(self) -> None:
        """Drain, and close the files; a second call does nothing."""

    def __enter__(self) -> Reader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class CountedReader:
    """Passes requests on to `reader` and counts in `stats` what they read and how long they are waited for."""

    def __init__(self, reader: Reader, stats: Stats):
        self.reader, self.stats = reader, stats

    def read(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """See `Reader.submit`; without any ids nothing is asked of the reader."""
        if not len(ids):
            return Done()
        return CountedRead(self.reader.submit(layer, ids, rows, targets), self.stats)


class CountedRead:
    """A request whose bytes are counted once, when it has ended."""

    def __init__(self, pending: Pending, stats: Stats):
        self._pending, self._stats, self._counted = pending, stats, False

    def ended(self) -> bool:
        return self._pending.ended()

    def give_up(self) -> None:
        self._pending.give_up()

    def wait(self) -> ReadReport:
        with self._stats.waiting():
            report = self._pending.wait()
        if not self._counted:
            self._counted = True
            self._stats.bytes_read += report.bytes
            self._stats.reads += report.reads
        return report
