"""Reading bundles with scattering `preadv` calls from a few threads, around the page cache where possible.

Knows files, rows and alignment; which bundles are wanted, and why, is the caller's business.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from ..errors import ReadError
from .layout import DATA_START
from .pieces import PAGE, Pieces, check_request, pieces, segments
from .protocol import LayerFile, Pending, ReadReport, Target

MERGE_GAP = 16384
PIECE_BYTES = 1 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


class Done:
    """A request that has ended: with a report, or with the error that `wait` raises."""

    def __init__(self, outcome: ReadReport | ReadError):
        self.outcome = outcome

    def wait(self) -> ReadReport:
        if isinstance(self.outcome, ReadError):
            raise self.outcome
        return self.outcome


class _OpenFile:
    """An open layer file. align: what direct reads must be multiples of; 1 where reads are buffered."""

    def __init__(self, source: LayerFile, layer: int, direct: bool):
        self.source, self.layer = source, layer
        self.fd, self.align = _open_direct(source.path) if direct else (-1, 1)
        if self.fd < 0:
            self.fd = os.open(source.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if direct:
                _bypass_cache(self.fd)
        self.buffered_fd = -1
        self.lock = threading.Lock()

    def buffered(self) -> int:
        """A second descriptor, for what the file system refuses to read directly."""
        with self.lock:
            if self.buffered_fd < 0:
                self.buffered_fd = os.open(self.source.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self.buffered_fd

    def close(self) -> None:
        for fd in (self.fd, self.buffered_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.buffered_fd = -1

    def fill(self, buffers: list[memoryview], at: int, end: int) -> None:
        """Read [at, end) into `buffers`, which may reach further; continues short and interrupted reads."""
        fd = self.fd
        while at < end:
            try:
                got = os.preadv(fd, buffers, at)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and self.align > 1 and fd == self.fd:
                    fd = self.buffered()
                    continue
                raise read_error(self.source, self.layer, at, error.strerror or str(error)) from error
            if got == 0:
                raise read_error(self.source, self.layer, at, ended(at))
            at += got
            if at < end:
                buffers = _after(buffers, got)


def read_error(source: LayerFile, layer: int, at: int, problem: str) -> ReadError:
    """The error for byte `at` of a layer's file."""
    bundle = (at - DATA_START) // source.layout.stride
    return ReadError(f"cannot read {source.path}, layer {layer}, bundle {bundle}: {problem}")


def ended(at: int) -> str:
    """What is wrong when a read at byte `at` returns nothing."""
    return f"the file ends at byte {at}, too short for its layout; download or convert it again"


def _open_direct(path: os.PathLike[str]) -> tuple[int, int]:
    """(descriptor, alignment) for direct reads, or (-1, 1) where the system has none for this file."""
    if not _DIRECT:
        return -1, 1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # tmpfs, some network and overlay file systems
            return -1, 1
        raise
    probe = memoryview(mmap.mmap(-1, 2 * PAGE))
    for align in (512, PAGE):
        try:
            os.preadv(fd, [probe[align : 2 * align]], align)
            return fd, align
        except OSError:  # asks for more; what is really broken will show when bundles are read
            continue
    os.close(fd)
    return -1, 1


def _bypass_cache(fd: int) -> None:
    """macOS: keep this file out of the page cache; asks for no alignment. Not run on Linux."""
    import fcntl

    no_cache = getattr(fcntl, "F_NOCACHE", None)
    if no_cache is not None:
        fcntl.fcntl(fd, no_cache, 1)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` after their first `count` bytes."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


class _Job:
    """One request under way; every worker takes pieces until none is left or one has failed."""

    def __init__(self, reader: PreadReader, file: _OpenFile, plan: Pieces, targets: Sequence[Target]):
        self.reader, self.file, self.plan = reader, file, plan
        self.targets = targets  # also keeps their memory alive
        self.memory = [target.flat for target in targets]
        self.queue = deque(range(len(plan.start)))
        self.errors: dict[int, ReadError] = {}
        self.workers: list[Future[int]] = []

    def wait(self) -> ReadReport:
        count = sum([worker.result() for worker in self.workers])
        if self.errors:
            raise self.errors[min(self.errors)]
        return ReadReport(count, len(self.plan.start))

    def work(self) -> int:
        """Read pieces; returns the bytes asked for."""
        plan, direct, count = self.plan, self.file.align > 1, 0
        while not self.errors:
            try:
                k = self.queue.popleft()
            except IndexError:
                break
            try:
                if direct and not plan.aligned[k]:
                    count += self._staged(k)
                else:
                    self.file.fill(self._buffers(k), plan.start[k], plan.end[k])
                    count += plan.end[k] - plan.start[k]
            except ReadError as error:
                self.errors[k] = error
        return count

    def _buffers(self, k: int) -> list[memoryview]:
        """Where piece k goes: its segments' memory, and scrap for the gaps."""
        offset, target, memory, nbytes = self.plan.segments
        first, last = self.plan.first[k], self.plan.first[k + 1]
        at = memory[first]
        buffers = [self.memory[target[first]][at : at + nbytes[first]]]
        for i in range(first + 1, last):
            gap = offset[i] - offset[i - 1] - nbytes[i - 1]
            if gap:
                buffers.append(self.reader.scrap[:gap])
            at = memory[i]
            buffers.append(self.memory[target[i]][at : at + nbytes[i]])
        return buffers

    def _staged(self, k: int) -> int:
        """Read the aligned range around piece k, then copy: direct reads cannot begin or end elsewhere."""
        offset, target, memory, nbytes = self.plan.segments
        align = self.file.align
        start = self.plan.start[k] // align * align
        count = -(-(self.plan.end[k] - start) // align) * align
        staging = self.reader.staging(count)
        self.file.fill([staging[:count]], start, self.plan.end[k])
        for i in range(self.plan.first[k], self.plan.first[k + 1]):
            at, skip, length = memory[i], offset[i] - start, nbytes[i]
            self.memory[target[i]][at : at + length] = staging[skip : skip + length]
        return count


class PreadReader:
    """Reads with `os.preadv`; all reads of a request are under way at once, up to one per thread.

    files: one per layer, opened when first used, then kept open
    threads: reads in flight
    direct: go around the page cache where the file system can
    merge_gap: bundles at most this many bytes apart are one read
    piece_bytes: about the longest read
    """

    def __init__(
        self,
        files: Sequence[LayerFile],
        threads: int = 8,
        direct: bool = True,
        merge_gap: int = MERGE_GAP,
        piece_bytes: int = PIECE_BYTES,
    ):
        if threads < 1 or merge_gap < 0 or piece_bytes < 1:
            raise ValueError(f"{threads} threads, merge_gap {merge_gap}, piece_bytes {piece_bytes}: out of range")
        self.files, self.threads, self.direct = tuple(files), threads, direct
        self.merge_gap = merge_gap
        self.piece_bytes = -(-piece_bytes // PAGE) * PAGE
        self.scrap = memoryview(mmap.mmap(-1, max(PAGE, merge_gap)))
        self._open: dict[int, _OpenFile] = {}
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlx_flash-read")

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """See `Reader.submit`."""
        layout = self.files[layer].layout
        ids, rows, wanted = check_request(layout, ids, rows, targets)
        if not len(ids) or not wanted:
            return Done(ReadReport(0, 0))
        file = self._open.get(layer)
        if file is None:
            try:
                file = self._open[layer] = _OpenFile(self.files[layer], layer, self.direct)
            except OSError as error:
                at = DATA_START + int(ids.min()) * layout.stride
                return Done(read_error(self.files[layer], layer, at, error.strerror or str(error)))
        found = segments(layout, ids, rows, wanted)
        job = _Job(self, file, pieces(found, wanted, self.merge_gap, self.piece_bytes, file.align), wanted)
        for _ in range(min(self.threads, len(job.plan.start))):
            job.workers.append(self._pool.submit(job.work))
        return job

    def staging(self, count: int) -> memoryview:
        """The calling thread's page-aligned scratch memory, at least `count` bytes, used again and again."""
        found: memoryview | None = getattr(self._local, "staging", None)
        if found is None or len(found) < count:
            found = self._local.staging = memoryview(mmap.mmap(-1, max(count, self.piece_bytes)))
        return found

    def close(self) -> None:
        """See `Reader.close`."""
        self._pool.shutdown()
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> PreadReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
