"""Reading bundles with Linux's own asynchronous I/O: a whole request is a few system calls, and no Python per read.

Knows pieces and the kernel's records; what cannot be read this way (unaligned places, files without direct I/O,
whatever ended short or in an error) goes to the threads of `pread.py`, which finish it or name the place.

Ctrl-C may come between any two steps, and what a system call returned is then lost. So `torn` is set around each of
them, and mending needs no record of what the kernel holds: `io_destroy` returns when nothing is in flight, then a
new context reads again what is not known to have been read.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import sys
import weakref
from collections.abc import Sequence

import numpy as np

from ..errors import ReadError
from .pieces import Merging, Pieces
from .pread import FORKED, Crew, Job, OpenFile, PreadReader, given_up
from .protocol import LayerFile, Pending, ReadReport, Target

DEPTH = 256
# Given more than two at once the kernel joins reads that lie side by side: of a scan's long ones that makes a few huge
# ones, which keep the disk less busy.
LONG_BYTES, LONG_AT_ONCE = 1 << 17, 2
_NUMBERS = {"x86_64": (206, 209, 208, 207), "aarch64": (0, 2, 4, 1)}  # io_setup, io_submit, io_getevents, io_destroy
_PREAD, _PREADV = 0, 7
_CONTROL_BLOCK = np.dtype(  # struct iocb, little-endian
    [
        ("data", "<i8"),
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("fd", "<i4"),
        ("buffer", "<u8"),
        ("nbytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("eventfd", "<u4"),
    ]
)
_NONE = np.empty(0, np.int64)
_contexts: set[_Context] = set()  # until the kernel has let go of their requests' memory, whoever forgets the reader


class _Kernel:
    """The four system calls. Each returns what the kernel does: a count, or a negative error number."""

    def __init__(self) -> None:
        numbers = _NUMBERS.get(platform.machine())
        if sys.platform != "linux" or numbers is None or sys.maxsize < 1 << 32 or sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "no asynchronous I/O is known for this system")
        self._numbers = numbers
        long, pointer = ctypes.c_long, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(long, long, ctypes.c_ulong, long, long, pointer, pointer, use_errno=True)
        self._call = kind(("syscall", ctypes.CDLL(None)))

    def _result(self, value: int) -> int:
        return value if value >= 0 else -ctypes.get_errno()

    def setup(self, events: int, context: ctypes.c_ulong) -> int:
        """Make a context, its name in `context`, which must hold 0."""
        return self._result(self._call(self._numbers[0], events, ctypes.addressof(context), 0, None, None))

    def submit(self, context: int, pointers: np.ndarray) -> int:
        """Begin the reads of control blocks at these addresses (n,); returns how many were taken."""
        address = pointers.ctypes.data
        return self._result(self._call(self._numbers[1], context, len(pointers), address, None, None))

    def events(self, context: int, at_least: int, into: np.ndarray) -> int:
        """Wait for so many ended reads; `into` (n, 4) takes data, block, result, 0 of each."""
        address = into.ctypes.data
        return self._result(self._call(self._numbers[2], context, at_least, len(into), address, None))

    def destroy(self, context: int) -> int:
        """Return when nothing is in flight; the context is gone."""
        return self._result(self._call(self._numbers[3], context, 0, 0, None, None))


class _Context:
    """The kernel's context: at most `depth` reads in flight, of the requests that were begun first.

    Used by the reader's thread only.
    """

    def __init__(self, depth: int):
        self.kernel, self.depth, self.pid = _Kernel(), depth, os.getpid()
        self.requests: dict[int, _Request] = {}  # by number; also keeps their memory alive
        self.in_flight = 0
        self.torn = self.closed = False
        self._failures = 0  # contexts lost
        self._name = ctypes.c_ulong(0)
        self._events = np.empty((depth, 4), np.int64)
        self._numbers = itertools.count()
        problem = self._renew()
        if problem:
            raise OSError(-problem, os.strerror(-problem))
        _contexts.add(self)

    def add(self, request: _Request) -> None:
        """Begin a request. Known to `drain` before anything of it is in flight."""
        self.mend()
        request.number = next(self._numbers) & 0x7FFFFFFF  # shares an int64 with a piece's
        request.control["data"] |= request.number << 32
        self.requests = {number: each for number, each in self.requests.items() if not each.over}
        self.requests[request.number] = request
        self.fill()

    def mend(self) -> None:
        """After an interrupt: make what is recorded here and what the kernel holds agree again."""
        if self.torn:
            self._renew()

    def _renew(self) -> int:
        """A new context in which nothing is in flight; returns the kernel's error number, negative, or 0."""
        self.torn = True
        if self._name.value and os.getpid() == self.pid:  # a forked child has none of its parent's
            self.kernel.destroy(self._name.value)
        self._name.value = 0
        self.in_flight = 0
        for request in self.requests.values():
            request.restart()
        problem = 0
        if not self.closed and self._failures < 3:  # without a context all goes to the threads
            problem = self.kernel.setup(self.depth, self._name)
        self.torn = False
        return problem

    def fill(self) -> None:
        """Begin reads until `depth` are in flight or none is left."""
        for request in list(self.requests.values()):
            if request.failed:
                request.todo = _NONE
            while len(request.todo):
                if self.in_flight >= self.depth or not self._submit(request):
                    return

    def _submit(self, request: _Request) -> bool:
        """Begin some reads of a request, or hand them to the threads; False when that must wait."""
        pointers = request.pointers[request.todo[: min(request.at_once, self.depth - self.in_flight)]]
        self.torn = True
        taken = self.kernel.submit(self._name.value, pointers) if self._name.value else -errno.ENOSYS
        if taken > 0:
            request.todo = request.todo[taken:]
            request.in_flight += taken
            self.in_flight += taken
        elif taken == -errno.EAGAIN and self.in_flight:
            self.torn = False
            return False  # it goes on when some have ended
        elif taken == -errno.EINVAL:
            self._lost()
        elif taken != -errno.EINTR:
            request.hand_over(request.todo)
            request.todo = _NONE
        self.torn = False
        return True

    def reap(self, at_least: int) -> None:
        """Wait for so many reads, and note every one that has ended."""
        if not self.in_flight:
            return
        self.torn = True
        got = self.kernel.events(self._name.value, at_least, self._events)
        if got > 0:
            self._note(self._events[:got])
        elif got < 0 and got != -errno.EINTR:
            self._lost()
        self.torn = False

    def _lost(self) -> None:
        """The kernel does not know the context: a reader that was interrupted took it for its own, and ended it."""
        self._failures += 1
        self._renew()

    def _note(self, events: np.ndarray) -> None:
        numbers = events[:, 0] >> 32
        for number in set(numbers.tolist()):
            mine = events[numbers == number]
            self.in_flight -= len(mine)
            self.requests[number].note(mine[:, 0] & 0xFFFFFFFF, mine[:, 2])

    def finish(self, request: _Request) -> None:
        """Return when nothing of this request is in flight or to be begun."""
        self.mend()
        while request.in_flight or len(request.todo):
            self.fill()
            # Wake up once, or, where reads wait for their turn, before the disk runs out of them.
            at_least = request.in_flight
            if any(len(each.todo) for each in self.requests.values()):
                most = min(self.in_flight, max(1, self.depth // 4))
                at_least = min(at_least, most) or most
            self.reap(at_least)

    def drain(self) -> None:
        """See `Reader.drain`."""
        for request in self.requests.values():
            request.give_up()
        if os.getpid() != self.pid:
            return
        self.mend()
        while self.in_flight:
            self.reap(self.in_flight)

    def close(self) -> None:
        """Drain, and give the context back; a second call does nothing."""
        self.closed = True
        for request in self.requests.values():
            request.give_up()
        self._renew()
        self.requests = {}
        _contexts.discard(self)


class _Request:
    """One request's pieces: to be begun (`todo`), in flight, read, or with the threads."""

    number = 0  # given by the context

    def __init__(
        self,
        context: _Context,
        crew: Crew,
        file: OpenFile,
        plan: Pieces,
        targets: Sequence[Target],
        scrap: memoryview,
    ):
        self.context, self.crew, self.file, self.plan = context, crew, file, plan
        self.targets, self.scrap = targets, scrap  # also keeps their memory alive
        self.length = plan.end - plan.start
        self.at_once = LONG_AT_ONCE if self.length.mean() >= LONG_BYTES else context.depth
        self.vectors, self.control = control_blocks(file.fd, plan, scrap)
        self.pointers = self.control.ctypes.data + np.arange(len(self.control)) * self.control.itemsize
        self.unread = np.ones(len(plan.start), bool)  # and not handed over
        self.handed = np.zeros(len(plan.start), bool)
        self.jobs: list[Job] = []
        self.in_flight, self.given_up = 0, False
        usable = plan.aligned if file.align > 1 else np.zeros(len(plan.start), bool)
        self.todo = np.flatnonzero(usable)
        self._odd = np.flatnonzero(~usable)

    def begin(self) -> None:
        if len(self._odd):
            self.hand_over(self._odd)
        if len(self.todo):
            self.context.add(self)

    def restart(self) -> None:
        """Nothing is in flight any more: what is not known to have been read is to be read again."""
        self.in_flight = 0
        self.todo = _NONE if self.given_up else np.flatnonzero(self.unread)
        for job in self.jobs:
            if not job.over:
                self.crew.start(job)  # which an interrupt may have prevented

    def hand_over(self, which: np.ndarray) -> None:
        """Let threads read these pieces."""
        job = Job(self.file, self.plan, self.targets, self.scrap, which.tolist())
        if self.given_up:
            job.give_up()
        self.jobs.append(job)
        self.crew.start(job)
        self.handed[which] = True
        self.unread[which] = False

    def note(self, which: np.ndarray, results: np.ndarray) -> None:
        """These pieces have ended, with so many bytes or a negative error number."""
        self.in_flight -= len(which)
        whole = results == self.length[which]
        self.unread[which[whole]] = False
        if not whole.all():
            self.hand_over(which[~whole])  # they read on, or tell what is wrong

    @property
    def failed(self) -> bool:
        return any(job.errors for job in self.jobs)

    @property
    def over(self) -> bool:
        return not self.in_flight and not len(self.todo) and all(job.over for job in self.jobs)

    def wait(self) -> ReadReport:
        if os.getpid() == self.context.pid:
            self.context.finish(self)
        elif not self.over:
            raise ReadError(FORKED)
        for job in self.jobs:
            job.join()
        errors = {k: error for job in self.jobs for k, error in job.errors.items()}
        if errors:
            raise errors[min(errors)]
        if self.unread.any() or any(job.skipped for job in self.jobs):
            raise given_up(self.file, int(self.plan.start[0]))
        nbytes = int(self.length[~self.handed].sum()) + sum(job.bytes for job in self.jobs)
        return ReadReport(nbytes, len(self.length))

    def ended(self) -> bool:
        if os.getpid() != self.context.pid:
            return True
        self.context.mend()
        if self.in_flight or len(self.todo):
            self.context.reap(0)
            self.context.fill()
        return self.over

    def give_up(self) -> None:
        self.given_up = True
        self.todo = _NONE
        for job in self.jobs:
            job.give_up()


def control_blocks(fd: int, plan: Pieces, scrap: memoryview) -> tuple[np.ndarray, np.ndarray]:
    """(vectors (m, 2), the kernel's control blocks (n,)) of a plan's pieces; the blocks point into the vectors."""
    count = np.diff(plan.first)
    control = np.zeros(len(count), _CONTROL_BLOCK)
    control["data"] = np.arange(len(count))
    control["fd"] = fd
    control["offset"] = plan.start
    if len(count) == len(plan.address):  # no piece has two segments
        control["buffer"], control["nbytes"] = plan.address, plan.segments.nbytes
        return _NONE, control
    offset, nbytes = plan.segments.offset, plan.segments.nbytes
    gap = np.zeros(len(offset), np.int64)  # before each segment; of a piece's first it does not matter
    gap[1:] = offset[1:] - offset[:-1] - nbytes[:-1]
    place = np.cumsum(1 + (gap > 0)) - 1
    vectors = np.empty((place[-1] + 1, 2), np.int64)
    vectors[place, 0], vectors[place, 1] = plan.address, nbytes
    gaps = np.flatnonzero(gap > 0)
    vectors[place[gaps] - 1, 0], vectors[place[gaps] - 1, 1] = np.frombuffer(scrap, np.uint8).ctypes.data, gap[gaps]
    begin, end = place[plan.first[:-1]], place[plan.first[1:] - 1] + 1
    control["opcode"] = _PREADV
    control["buffer"], control["nbytes"] = vectors.ctypes.data + begin * vectors.itemsize * 2, end - begin
    return vectors, control


class AioReader(PreadReader):
    """PreadReader's, but for reads that may go around the page cache: these the kernel does by itself.

    depth: reads in flight. Where it is more than the device takes, `submit` waits for the device.
    Raises OSError where the system has no asynchronous I/O, or no room for another context (fs.aio-max-nr).
    """

    def __init__(
        self,
        files: Sequence[LayerFile],
        threads: int = 8,
        direct: bool = True,
        merging: Merging | None = None,
        depth: int = DEPTH,
    ):
        if depth < 1:
            raise ValueError(f"depth {depth}: out of range")
        super().__init__(files, threads, direct, merging)
        self._context = _Context(depth)
        self._close_context = weakref.finalize(self, self._context.close)

    def _begin(self, file: OpenFile, plan: Pieces, targets: Sequence[Target]) -> Pending:
        request = _Request(self._context, self._crew, file, plan, targets, self.scrap)
        request.begin()
        return request

    def drain(self) -> None:
        """See `Reader.drain`."""
        self._context.drain()
        super().drain()

    def close(self) -> None:
        """See `Reader.close`."""
        self._context.close()
        super().close()
