"""Reading bundles with scattering `preadv` calls from a few threads, around the page cache where possible.

Knows files, rows and alignment, not why a bundle is wanted.

The calling thread touches plain locks and a SimpleQueue only, which are written in C: Python's own Executor, Future
and Condition stay locked for good where Ctrl-C interrupts them.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from mlx_flash.errors import ReadError, UsageError

from .bundle import DATA_START
from .extents import LayerExtents, Source
from .read_plan import PAGE, Merging, Pieces, check_request, pieces, plan_reads
from .reader import Done, Pending, ReadReport, Target, Together

_DIRECT = getattr(os, "O_DIRECT", 0)
FORKED = "cannot read: this process was forked from the one that loaded the model; load it in the child"
_local = threading.local()  # each worker's staging memory


class OpenFile:
    """An open file of bundles; closed with the last reference.

    align: the alignment that direct reads need; 1 if reads are buffered
    sources: the layers whose bundles are in it, for error messages
    """

    def __init__(self, path: Path, direct: bool, sources: Sequence[Source] = ()):
        self.path, self.sources = path, sources
        self.fd = self.buffered_fd = -1
        self.fd, self.align = _open_direct(path) if direct else (-1, 1)
        if self.fd < 0:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if direct:
                _bypass_cache(self.fd)
        self.lock = threading.Lock()

    def buffered(self) -> int:
        """A second descriptor, for reads that the file system refuses to make directly."""
        with self.lock:
            if self.buffered_fd < 0:
                self.buffered_fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self.buffered_fd

    def close(self) -> None:
        for fd in (self.fd, self.buffered_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.buffered_fd = -1

    __del__ = close

    def fill(self, buffers: list[memoryview], at: int, end: int) -> None:
        """Read bytes [at, end) into `buffers`, which may be longer. Continues short and interrupted reads."""
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
                raise read_error(self.sources, self.path, at, error.strerror or str(error)) from error
            if got == 0:
                raise read_error(self.sources, self.path, at, ended(at))
            at += got
            if at < end:
                buffers = _after(buffers, got)


def read_error(sources: Sequence[Source], path: Path, at: int, problem: str) -> ReadError:
    """The error for byte `at` of a file: it names the layer and bundle there. sources: one per layer."""
    found = ((layer, source.bundle_at(path, at)) for layer, source in enumerate(sources))
    place = next((f"layer {layer}, bundle {bundle}" for layer, bundle in found if bundle is not None), f"byte {at}")
    return ReadError(f"cannot read {path}, {place}: {problem}")


def given_up(file: OpenFile, at: int) -> ReadError:
    """The error for a request that `give_up` or `drain` ended."""
    return read_error(file.sources, file.path, at, "the read was given up")


def ended(at: int) -> str:
    """The problem, in words, if a read at byte `at` returns nothing."""
    return f"the file ends at byte {at}, too short for its layout; download or convert it again"


def _open_direct(path: os.PathLike[str]) -> tuple[int, int]:
    """(descriptor, alignment) for direct reads, or (-1, 1) if this file cannot be read directly."""
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
    """`buffers` without their first `count` bytes."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


def _staging(count: int) -> memoryview:
    """The calling thread's page-aligned scratch memory of at least `count` bytes, which is reused."""
    found: memoryview | None = getattr(_local, "staging", None)
    if found is None or len(found) < count:
        found = _local.staging = memoryview(mmap.mmap(-1, max(count, 1 << 20)))
    return found


class ReadJob:
    """Pieces that threads read: each thread takes the next piece until none is left. The job is over when every piece
    has been read, or skipped because an earlier one failed. Only the reading threads use `lock`: signals reach the main
    thread only, so an interrupt cannot leave it locked.

    which: the pieces; None: all of them
    """

    def __init__(
        self,
        file: OpenFile,
        plan: Pieces,
        targets: Sequence[Target],
        scrap: memoryview,
        which: Sequence[int] | None = None,
    ):
        self.file, self.plan, self.scrap = file, plan.lists, scrap
        self.targets = targets  # also keeps their memory alive
        self.memory = [target.flat for target in targets]
        self.queue = deque(range(len(plan.start)) if which is None else which)
        self.errors: dict[int, Exception] = {}
        self.first_error = len(plan.start)
        self.pid = os.getpid()
        self.lock, self.left, self.count = threading.Lock(), len(self.queue), len(self.queue)
        self.bytes = self.skipped = 0
        self.over = self.cancelled = False
        self._until_over = threading.Lock()  # held until the job is over
        self._until_over.acquire()

    def wait(self) -> ReadReport:
        self.join()
        if self.errors:
            raise self.errors[min(self.errors)]
        if self.skipped:
            raise given_up(self.file, self.plan.start[0])
        return ReadReport(self.bytes, self.count)

    def join(self) -> None:
        """Wait until the job is over. Raises no error of a read."""
        # `over` is set before the release: a second wait, or one after an interrupted one, cannot block for ever.
        if not self.over:
            if os.getpid() != self.pid:
                raise ReadError(FORKED)
            self._until_over.acquire()

    def ended(self) -> bool:
        return self.over or os.getpid() != self.pid

    def give_up(self) -> None:
        self.cancelled = True

    def work(self) -> None:
        """Read pieces until none is left."""
        while True:
            try:
                k = self.queue.popleft()
            except IndexError:
                return
            count, skipped = 0, self.cancelled or k > self.first_error
            try:
                if not skipped:
                    count = self._read(k)
            except Exception as error:  # whatever it is: `wait` must end, and tell
                self.errors[k] = error
            with self.lock:
                if k in self.errors:
                    self.first_error = min(k, self.first_error)
                self.left -= 1
                self.bytes += count
                self.skipped += skipped
                if not self.left:
                    self.over = True
                    self._until_over.release()

    def _read(self, k: int) -> int:
        """Read piece k; returns the bytes asked for."""
        start, end = self.plan.start[k], self.plan.end[k]
        if self.file.align > 1 and not self.plan.aligned[k]:
            return self._staged(k)
        self.file.fill(self._buffers(k), start, end)
        return end - start

    def _buffers(self, k: int) -> list[memoryview]:
        """Where piece k goes: its segments' memory, and scrap for the gaps."""
        offset, target, memory, nbytes = self.plan[:4]
        first, last = self.plan.first[k], self.plan.first[k + 1]
        at = memory[first]
        buffers = [self.memory[target[first]][at : at + nbytes[first]]]
        for i in range(first + 1, last):
            gap = offset[i] - offset[i - 1] - nbytes[i - 1]
            if gap:
                buffers.append(self.scrap[:gap])
            at = memory[i]
            buffers.append(self.memory[target[i]][at : at + nbytes[i]])
        return buffers

    def _staged(self, k: int) -> int:
        """Read the aligned range around piece k, then copy: direct reads cannot begin or end elsewhere."""
        offset, target, memory, nbytes = self.plan[:4]
        align = self.file.align
        start = self.plan.start[k] // align * align
        count = -(-(self.plan.end[k] - start) // align) * align
        staging = _staging(count)
        self.file.fill([staging[:count]], start, self.plan.end[k])
        for i in range(self.plan.first[k], self.plan.first[k + 1]):
            at, skip, length = memory[i], offset[i] - start, nbytes[i]
            self.memory[target[i]][at : at + length] = staging[skip : skip + length]
        return count


def _work(queue: SimpleQueue[ReadJob | None]) -> None:
    """What a reading thread runs."""
    while (job := queue.get()) is not None:
        job.work()
        del job  # while it sleeps it must not keep a job's memory and file


def _end_threads(queue: SimpleQueue[ReadJob | None], threads: int) -> None:
    for _ in range(threads):
        queue.put(None)


class Crew:
    """The threads that read, and the jobs that may not be over."""

    def __init__(self, threads: int):
        self.threads = threads
        self._jobs: list[ReadJob] = []
        self._queue: SimpleQueue[ReadJob | None] = SimpleQueue()
        # Threads know the queue, not the crew, and end with it whether or not `close` is called.
        self._end = weakref.finalize(self, _end_threads, self._queue, threads)
        for i in range(threads):
            name = f"mlx_flash-read-{i}"
            threading.Thread(target=_work, args=(self._queue,), daemon=True, name=name).start()

    def start(self, job: ReadJob) -> None:
        # Known to `drain` before it is known to a thread: an interrupt may come in between.
        self._jobs = [each for each in self._jobs if not each.over] + [job]
        for _ in range(min(self.threads, job.count)):
            self._queue.put(job)

    def drain(self) -> None:
        """See `Reader.drain`."""
        under_way = [job for job in self._jobs if not job.over]
        for job in under_way:
            job.give_up()
            self._queue.put(job)  # which an interrupted `start` may not have done; a thread skips what is left
        for job in under_way:
            with suppress(ReadError):
                job.join()

    def close(self) -> None:
        """Drain, and end the threads; a second call does nothing."""
        self.drain()
        self._end()
        self._jobs.clear()


class PreadReader:
    """Reads with `os.preadv`; all reads of a request are under way at once, up to one per thread.

    files: where each layer's bundles are; a file is opened when first used, then kept open
    threads: reads in flight
    direct: go around the page cache where the file system can
    merging: when neighbours become one read
    """

    def __init__(self, files: Sequence[Source], threads: int = 8, direct: bool = True, merging: Merging | None = None):
        self.merging = merging or Merging()
        gap, share, piece_bytes = self.merging.gap, self.merging.share, self.merging.piece_bytes
        if threads < 1 or gap < 0 or share < 0 or piece_bytes < 1 or piece_bytes % PAGE:
            raise ValueError(f"{threads} threads, {self.merging}: out of range")
        self.files, self.threads, self.direct = tuple(files), threads, direct
        self.scrap = memoryview(mmap.mmap(-1, max(PAGE, gap)))
        self._open: dict[Path, OpenFile] = {}
        self._closed, self._pid = False, os.getpid()
        self._crew = Crew(threads)

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Pending:
        """See `Reader.submit`."""
        if self._closed:
            raise UsageError("the model is closed")
        layout = self.files[layer].layout
        ids, rows, wanted = check_request(layout, ids, rows, targets)
        if not len(ids) or not wanted:
            return Done()
        if os.getpid() != self._pid:  # a child has none of its parent's threads
            return Done(ReadError(FORKED))
        source = self.files[layer]
        if isinstance(source, LayerExtents):
            return self._in_place(source, ids, rows, wanted)
        try:
            file = self._file(source.path)
        except OSError as error:
            return self._cannot_open(source.path, DATA_START + int(ids.min()) * layout.stride, error)
        return self._begin(file, plan_reads(layout, ids, rows, wanted, self.merging, file.align), wanted)

    def _in_place(self, source: LayerExtents, ids: np.ndarray, rows: np.ndarray, wanted: Sequence[Target]) -> Pending:
        """Start a request whose bundles lie in several places, perhaps in several files."""
        begun: list[Pending] = []
        for path, found in source.segments(ids, rows, wanted):
            try:
                file = self._file(path)
            except OSError as error:
                begun.append(self._cannot_open(path, int(found.offset[0]), error))
                break
            begun.append(self._begin(file, pieces(found, wanted, self.merging, file.align), wanted))
        return begun[0] if len(begun) == 1 else Together(begun)

    def _file(self, path: Path) -> OpenFile:
        """The open file, one for all layers. Raises OSError."""
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = OpenFile(path, self.direct, self.files)
        return file

    def _cannot_open(self, path: Path, at: int, error: OSError) -> Done:
        return Done(read_error(self.files, path, at, error.strerror or str(error)))

    def _begin(self, file: OpenFile, plan: Pieces, targets: Sequence[Target]) -> Pending:
        """Start the reads of a plan."""
        job = ReadJob(file, plan, targets, self.scrap)
        self._crew.start(job)
        return job

    def drain(self) -> None:
        """See `Reader.drain`."""
        self._crew.drain()

    def close(self) -> None:
        """See `Reader.close`."""
        self.drain()
        self._closed = True
        self._crew.close()
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> PreadReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
