"""Picking the best reader of bundles for this system, and three simple readers: plain, in memory, and failing.

Knows ids, rows and bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

import numpy as np

from mlx_flash.engine.system.executor import Executor
from mlx_flash.errors import ReadError, UsageError

from .aio_reader import DEPTH, AioReader
from .bundle import Layout
from .extents import LayerExtents, Source
from .pread_reader import PreadReader, ended, read_error
from .read_plan import Merging, Segments, check_request, segments
from .reader import Done, Pending, Reader, ReadReport, Target

MOST_THREADS = 64  # of Python's that read: more wait for each other


def open_reader(
    files: Sequence[Source],
    threads: int = 8,
    direct: bool = True,
    merging: Merging | None = None,
    depth: int | None = None,
    executor: Executor | None = None,
) -> Reader:
    """Open the best reader that this system can run. The plain one has no options.

    threads, direct, merging: as for PreadReader
    depth: reads in flight, instead of each reader's default
    executor: as for AioReader
    """
    if not hasattr(os, "preadv"):
        return PlainReader(files)
    if direct:  # the kernel reads by itself around the page cache only
        with suppress(OSError):
            return AioReader(files, threads, direct, merging, DEPTH if depth is None else depth, executor)
    return PreadReader(files, threads if depth is None else min(depth, MOST_THREADS), direct, merging)


class _Closing:
    """The rest of the protocol, for readers whose reads have ended when `submit` returns."""

    def drain(self) -> None:
        """See `Reader.drain`."""

    def close(self) -> None:
        """See `Reader.close`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainReader(_Closing):
    """Reads with seek and readinto, one segment after the other, for systems without `preadv`."""

    def __init__(self, files: Sequence[Source]):
        self.files = tuple(files)
        self._open: dict[Path, FileIO] = {}
        self._closed = False

    def __enter__(self) -> PlainReader:
        return self

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """See `Reader.submit`; all is read when it returns."""
        if self._closed:
            raise UsageError("the model is closed")
        source = self.files[layer]
        ids, rows, wanted = check_request(source.layout, ids, rows, targets)
        if not len(ids) or not wanted:
            return Done()
        memory = [target.flat for target in wanted]
        if isinstance(source, LayerExtents):
            found = source.segments(ids, rows, wanted)
        else:
            found = [(source.path, segments(source.layout, ids, rows, wanted))]
        for path, each in found:
            problem = self._read(path, each, memory)
            if problem is not None:
                return Done(problem)
        reads = [each.nbytes for _, each in found]
        return Done(ReadReport(sum(int(nbytes.sum()) for nbytes in reads), sum(map(len, reads))))

    def _read(self, path: Path, found: Segments, memory: Sequence[memoryview]) -> ReadError | None:
        at = int(found.offset[0])
        columns = [c.tolist() for c in (found.offset, found.target, found.memory, found.nbytes)]
        try:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = FileIO(path)
            for at, target, start, nbytes in zip(*columns, strict=True):
                file.seek(at)
                view = memory[target][start : start + nbytes]
                while view:
                    got = file.readinto(view)
                    if not got:
                        return read_error(self.files, path, at, ended(at))
                    at, view = at + got, view[got:]
        except OSError as error:
            return read_error(self.files, path, at, error.strerror or str(error))
        return None

    def close(self) -> None:
        """See `Reader.close`."""
        self._closed = True
        for file in self._open.values():
            file.close()
        self._open.clear()


class MemoryReader(_Closing):
    """Bundles that already are in memory: one (layout, uint8 (count, stride)) per layer. For tests."""

    def __init__(self, layers: Sequence[tuple[Layout, np.ndarray]]):
        self.layers = tuple(layers)

    def __enter__(self) -> MemoryReader:
        return self

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """See `Reader.submit`; all is copied when it returns."""
        layout, bundles = self.layers[layer]
        ids, rows, wanted = check_request(layout, ids, rows, targets)
        for target in wanted:
            target.rows[rows] = bundles[ids, target.offset : target.offset + target.nbytes]
        return Done(ReadReport(len(ids) * sum(target.nbytes for target in wanted), len(ids) if wanted else 0))


class FaultyReader(_Closing):
    """Passes requests on to `inner`; the `fail_at`-th (from 1) ends in ReadError, half read. For tests."""

    def __init__(self, inner: Reader, fail_at: int):
        self.inner, self.fail_at, self.submits = inner, fail_at, 0

    def __enter__(self) -> FaultyReader:
        return self

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """See `Reader.submit`."""
        self.submits += 1
        if self.submits != self.fail_at:
            return self.inner.submit(layer, ids, rows, targets)
        half = len(ids) // 2
        self.inner.submit(layer, ids[:half], rows[:half], targets).wait()
        bundle = int(ids[half]) if len(ids) else -1
        return Done(ReadError(f"cannot read layer {layer}, bundle {bundle}: request {self.fail_at} is made to fail"))

    def drain(self) -> None:
        """See `Reader.drain`."""
        self.inner.drain()

    def close(self) -> None:
        """See `Reader.close`."""
        self.inner.close()
