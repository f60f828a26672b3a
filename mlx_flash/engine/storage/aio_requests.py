"""One reader's requests in a context of Linux's asynchronous I/O, and which of their pieces are still to be read.

Pieces that cannot be read this way (unaligned ones, files without direct I/O) go to the threads of `pread_reader.py`,
as do reads that ended short or in an error: a thread reads on, or names the place in its error.

Ctrl-C may come between any two steps, and the result of a system call is then lost. So `torn` is set around each call,
and to mend it needs no record of what the kernel holds: `io_destroy` returns when nothing is in flight, and a new
context reads again every piece that is not known to have been read.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mlx_flash.engine.system.executor import Executor
from mlx_flash.engine.system.linux_aio import LinuxAio
from mlx_flash.errors import ReadError

from .control_blocks import Blocks, places
from .pread_reader import FORKED, Crew, OpenFile, ReadJob, given_up
from .read_plan import Alike, Pieces
from .reader import ReadReport, Target

# With more than two in flight the kernel joins reads that lie side by side: it makes a scan's long reads a few huge
# ones, which keep the disk less busy.
LONG_BYTES, LONG_AT_ONCE = 1 << 17, 2
MANY = 4  # so many reads are worth handing to another thread, which usually is awake
_NONE = np.empty(0, np.int64)
_open_contexts: set[AioContext] = set()  # keeps requests' memory until the kernel is done, if the reader is forgotten


class AioContext:
    """A context of the kernel's: at most `depth` reads in flight, of the oldest requests first.

    Used by the reader's thread only. Reads that another thread submits count as in flight at once; `settle` corrects
    the count.
    """

    def __init__(self, depth: int, aio: LinuxAio, executor: Executor | None = None):
        self.aio, self.depth, self.pid = aio, depth, os.getpid()
        self.requests: dict[int, AioRequest] = {}  # by number; also keeps their memory alive
        self.in_flight = 0
        self.torn = self.closed = False
        self._submit_call = None if executor is None else aio.submit_call(executor)
        self._submitted: tuple[AioRequest, np.ndarray] | None = None  # the pieces in that call, until `settle`
        self._failures = 0  # contexts lost
        self._id = ctypes.c_ulong(0)
        self.blocks, self.events = Blocks(depth), np.empty((depth, 4), np.int64)
        self._events_at = self.events.ctypes.data
        self.numbers = itertools.count()
        problem = self._renew()
        if problem:
            raise OSError(-problem, os.strerror(-problem))
        _open_contexts.add(self)

    def add(self, request: AioRequest) -> None:
        """Start a request. `drain` knows of it before any of its reads is in flight."""
        self.mend()
        self.requests = {number: each for number, each in self.requests.items() if not each.over}
        self.requests[request.number] = request
        self.fill(elsewhere=self._submit_call is not None)

    def mend(self) -> None:
        """After an interrupt: make the state here agree with the kernel's again."""
        if self.torn:
            self._renew()

    def _renew(self) -> int:
        """Open a new context in which nothing is in flight; returns the kernel's error number, negative, or 0."""
        self.torn = True
        if os.getpid() == self.pid:  # a forked child has none of its parent's
            if self._submit_call is not None:
                self._submit_call.wait()
            if self._id.value:
                self.aio.destroy(self._id.value)
        self._submitted = None
        self._id.value = 0
        self.in_flight = 0
        for request in self.requests.values():
            request.restart()
        problem = 0
        if not self.closed and self._failures < 3:  # without a context the threads read everything
            problem = self.aio.setup(self.depth, self._id)
        self.torn = False
        return problem

    def fill(self, elsewhere: bool = False) -> bool:
        """Start reads until `depth` are in flight or none is left; returns whether some may be left.

        elsewhere: let another thread submit the first ones
        """
        for request in list(self.requests.values()):
            if request.jobs and request.failed:
                request.todo = _NONE
            while len(request.todo):
                if self.in_flight >= self.depth:
                    return True
                self.settle()
                which = request.todo[: min(request.at_once, self.depth - self.in_flight)]
                self.blocks.fill(request.number, request.file.fd, request.plan.start, request.places, which)
                if elsewhere and len(which) >= MANY and self._submit_elsewhere(request, which):
                    return True
                if not self._submit(request, which):
                    return True
        return False

    def _submit_elsewhere(self, request: AioRequest, which: np.ndarray) -> bool:
        """Let another thread submit these pieces, whose blocks are filled; False if there is none."""
        assert self._submit_call is not None
        if not self._id.value:
            return False
        count = len(which)
        self.torn = True
        started = self._submit_call.start(self._id.value, count, self.blocks.pointers)
        if started:
            request.todo = request.todo[count:]
            request.in_flight += count
            self.in_flight += count
            self._submitted = request, which
        self.torn = False
        return started

    def submitting(self) -> bool:
        """Whether another thread is submitting reads."""
        return self._submitted is not None and self._submit_call is not None and not self._submit_call.done()

    def settle(self) -> None:
        """Wait until no other thread submits. Pieces that the kernel did not take are to be submitted again."""
        if self._submitted is None or self._submit_call is None:
            return
        request, which = self._submitted
        taken = max(0, self._submit_call.wait())
        self.torn = True
        if taken < len(which):
            request.in_flight -= len(which) - taken
            self.in_flight -= len(which) - taken
            if not request.given_up:
                request.todo = np.concatenate([which[taken:], request.todo])
        self._submitted = None
        self.torn = False

    def _submit(self, request: AioRequest, which: np.ndarray) -> bool:
        """Submit these pieces, whose blocks are filled, or hand the request to the threads if the kernel refuses it.
        Returns False if the kernel is busy and takes nothing now."""
        self.torn = True
        taken = -errno.ENOSYS
        if self._id.value:
            taken = self.aio.submit(self._id.value, len(which), self.blocks.pointers)
        if taken > 0:
            request.todo = request.todo[taken:]
            request.in_flight += taken
            self.in_flight += taken
        elif taken == -errno.EAGAIN and self.in_flight:
            self.torn = False
            return False  # until some reads have ended
        elif taken == -errno.EINVAL:
            self._lost()
        elif taken != -errno.EINTR:
            request.hand_over(request.todo)
            request.todo = _NONE
        self.torn = False
        return True

    def reap(self, at_least: int) -> None:
        """Wait until `at_least` reads have ended, and note all that have."""
        if not self.in_flight:
            return
        self.torn = True
        got = self.aio.events(self._id.value, at_least, self.depth, self._events_at)
        if got > 0:
            self._note(self.events[:got])
        elif got < 0 and got != -errno.EINTR:
            self._lost()
        self.torn = False

    def _lost(self) -> None:
        """The kernel does not know this context: another reader, after an interrupt, took its id for its own and
        destroyed it."""
        self._failures += 1
        self._renew()

    def _note(self, events: np.ndarray) -> None:
        busy = [request for request in self.requests.values() if request.in_flight]
        if len(busy) == 1:
            self.in_flight -= len(events)
            busy[0].note(events)
            return
        numbers = events[:, 0] >> 32
        for number in set(numbers.tolist()):
            mine = events[numbers == number]
            self.in_flight -= len(mine)
            self.requests[number].note(mine)

    def finish(self, request: AioRequest) -> None:
        """Return when nothing of this request is in flight or left to be submitted."""
        self.mend()
        if self._submitted is not None and request.in_flight and request is not self._submitted[0]:
            self.reap(0)  # if that was all, the submission need not be waited for
        if request.in_flight or len(request.todo):
            self.settle()
        while request.in_flight or len(request.todo):
            # Wake up once; or, if pieces are left to be submitted, before the disk runs out of reads.
            if self.fill():
                most = min(self.in_flight, max(1, self.depth // 2))
                at_least = min(request.in_flight, most) or most
            else:
                at_least = request.in_flight
            self.reap(at_least)

    def drain(self) -> None:
        """See `Reader.drain`."""
        for request in self.requests.values():
            request.give_up()
        if os.getpid() != self.pid:
            return
        self.mend()
        self.settle()
        while self.in_flight:
            self.reap(self.in_flight)

    def close(self) -> None:
        """Drain, and destroy the context; a second call does nothing."""
        self.closed = True
        for request in self.requests.values():
            request.give_up()
        self._renew()
        self.requests = {}
        _open_contexts.discard(self)


class AioRequest:
    """One request. Each of its pieces is to be submitted (`todo`), in flight, read, or with the threads."""

    def __init__(
        self,
        context: AioContext,
        crew: Crew,
        file: OpenFile,
        plan: Pieces,
        targets: Sequence[Target],
        scrap: memoryview,
    ):
        self.context, self.crew, self.file, self.plan = context, crew, file, plan
        self.targets, self.scrap = targets, scrap  # also keeps their memory alive
        self.number = next(context.numbers) & 0x7FFFFFFF  # shares an int64 with a piece's
        # Pieces are unread until they are known to have been read, or are handed over. Those in flight are unread.
        self.left, self.alike = len(plan.start), plan.nbytes if isinstance(plan, Alike) else 0
        self.nbytes = self.left * self.alike or int(self.length.sum())
        self.at_once = LONG_AT_ONCE if self.nbytes >= LONG_BYTES * self.left else context.depth
        self.places = places(plan, scrap)
        self.jobs: list[ReadJob] = []
        self.in_flight, self.given_up = 0, False
        self.todo, self._odd = np.arange(self.left), _NONE
        if file.align == 1 or isinstance(plan, Alike) and not plan.alike:
            self.todo, self._odd = _NONE, self.todo  # cannot be read directly
        elif not isinstance(plan, Alike):
            self.todo, self._odd = np.flatnonzero(plan.aligned), np.flatnonzero(~plan.aligned)

    @cached_property
    def unread(self) -> np.ndarray:
        """Which pieces (n,) are unread. Once all have been read only `left` says so."""
        return np.ones(len(self.plan.start), bool)

    @cached_property
    def handed(self) -> np.ndarray:
        """Which pieces (n,) were handed over to the threads."""
        return np.zeros(len(self.plan.start), bool)

    @cached_property
    def length(self) -> np.ndarray:
        return self.plan.end - self.plan.start

    def begin(self) -> None:
        if len(self._odd):
            self.hand_over(self._odd)
        if len(self.todo):
            self.context.add(self)

    def restart(self) -> None:
        """Read again, now that nothing is in flight, the pieces that are not known to have been read."""
        self.in_flight = 0
        unread = np.flatnonzero(self.unread) if self.left else _NONE
        self.left = len(unread)
        self.todo = _NONE if self.given_up else unread
        for job in self.jobs:
            if not job.over:
                self.crew.start(job)  # an interrupt may have prevented it

    def hand_over(self, which: np.ndarray) -> None:
        """Let threads read these pieces."""
        job = ReadJob(self.file, self.plan, self.targets, self.scrap, which.tolist())
        if self.given_up:
            job.give_up()
        self.jobs.append(job)
        self.crew.start(job)
        self.handed[which] = True
        self._read(which)

    def note(self, events: np.ndarray) -> None:
        """Note the reads that have ended. events (n, 4): each one's result is its bytes or a negative error number."""
        self.in_flight -= len(events)
        results = events[:, 2]
        if self.alike and len(events) == self.left == np.count_nonzero(results == self.alike):
            self.left = 0
            return
        which = events[:, 0] & 0xFFFFFFFF
        whole = results == self.length[which]
        self._read(which[whole])
        if not whole.all():
            self.hand_over(which[~whole])  # a thread reads on, or says what is wrong

    def _read(self, which: np.ndarray) -> None:
        """Note that these pieces are no longer unread."""
        self.unread[which] = False
        self.left = int(np.count_nonzero(self.unread))

    @property
    def failed(self) -> bool:
        return any(job.errors for job in self.jobs)

    @property
    def over(self) -> bool:
        return not (self.in_flight or len(self.todo) or self.jobs and not all(job.over for job in self.jobs))

    def wait(self) -> ReadReport:
        if os.getpid() == self.context.pid:
            self.context.finish(self)
        elif not self.over:
            raise ReadError(FORKED)
        nbytes = self.nbytes
        if self.jobs:
            nbytes = int(self.length[~self.handed].sum()) + self._join()
        if self.left:
            raise given_up(self.file, int(self.plan.start[0]))
        return ReadReport(nbytes, len(self.plan.start))

    def _join(self) -> int:
        """Wait for the threads; returns the bytes that they asked the system for."""
        for job in self.jobs:
            job.join()
        errors = {k: error for job in self.jobs for k, error in job.errors.items()}
        if errors:
            raise errors[min(errors)]
        if any(job.skipped for job in self.jobs):
            raise given_up(self.file, int(self.plan.start[0]))
        return sum(job.bytes for job in self.jobs)

    def ended(self) -> bool:
        if os.getpid() != self.context.pid:
            return True
        self.context.mend()
        if (self.in_flight or len(self.todo)) and not self.context.submitting():
            self.context.settle()
            self.context.reap(0)
            self.context.fill()
        return self.over

    def give_up(self) -> None:
        self.given_up = True
        self.todo = _NONE
        for job in self.jobs:
            job.give_up()
