"""Reading bundles with Linux's own asynchronous I/O: a whole request is a few system calls, and no Python per read.

Knows pieces and the kernel's records; what cannot be read this way (unaligned places, files without direct I/O,
whatever ended short or in an error) goes to the threads of `pread_reader.py`, which finish it or name the place.

Ctrl-C may come between any two steps, and what a system call returned is then lost. So `torn` is set around each of
them, and mending needs no record of what the kernel holds: `io_destroy` returns when nothing is in flight, then a
new context reads again what is not known to have been read.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import weakref
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mlx_flash.engine.storage.linux_aio import Blocks, Kernel, places
from mlx_flash.errors import ReadError

from .extents import Source
from .pread_reader import FORKED, Crew, OpenFile, PreadReader, ReadJob, given_up
from .read_plan import Alike, Merging, Pieces
from .reader import Aside, Begun, Pending, ReadReport, Target

DEPTH = 256
# Given more than two at once the kernel joins reads that lie side by side: of a scan's long ones that makes a few huge
# ones, which keep the disk less busy.
LONG_BYTES, LONG_AT_ONCE = 1 << 17, 2
MANY = 4  # reads are worth handing to another thread, which is awake as a rule
_NONE = np.empty(0, np.int64)
_contexts: set[_Context] = set()  # until the kernel has let go of their requests' memory, whoever forgets the reader


class _Context:
    """The kernel's context: at most `depth` reads in flight, of the requests that were begun first.

    Used by the reader's thread only. What another thread submits counts as in flight at once: `settle` puts it right.
    """

    def __init__(self, depth: int, aside: Aside | None = None):
        self.kernel, self.depth, self.pid, self.aside = Kernel(), depth, os.getpid(), aside
        self.requests: dict[int, _Request] = {}  # by number; also keeps their memory alive
        self.in_flight = 0
        self.torn = self.closed = False
        self._begun: tuple[Begun, _Request, np.ndarray] | None = None  # which pieces another thread submits
        self._taken = np.zeros(1, np.int64)
        self._failures = 0  # contexts lost
        self._name = ctypes.c_ulong(0)
        self.blocks, self.events = Blocks(depth), np.empty((depth, 4), np.int64)
        self._events_at = self.events.ctypes.data
        self.numbers = itertools.count()
        problem = self._renew()
        if problem:
            raise OSError(-problem, os.strerror(-problem))
        _contexts.add(self)

    def add(self, request: _Request) -> None:
        """Begin a request. Known to `drain` before anything of it is in flight."""
        self.mend()
        self.requests = {number: each for number, each in self.requests.items() if not each.over}
        self.requests[request.number] = request
        self.fill(self.aside)

    def mend(self) -> None:
        """After an interrupt: make what is recorded here and what the kernel holds agree again."""
        if self.torn:
            self._renew()

    def _renew(self) -> int:
        """A new context in which nothing is in flight; returns the kernel's error number, negative, or 0."""
        self.torn = True
        if os.getpid() == self.pid:  # a forked child has none of its parent's
            if self._begun is not None:
                self._begun[0].finish()
            if self._name.value:
                self.kernel.destroy(self._name.value)
        self._begun = None
        self._name.value = 0
        self.in_flight = 0
        for request in self.requests.values():
            request.restart()
        problem = 0
        if not self.closed and self._failures < 3:  # without a context all goes to the threads
            problem = self.kernel.setup(self.depth, self._name)
        self.torn = False
        return problem

    def fill(self, aside: Aside | None = None) -> bool:
        """Begin reads until `depth` are in flight or none is left; whether some may be left. aside: does the first."""
        for request in list(self.requests.values()):
            if request.jobs and request.failed:
                request.todo = _NONE
            while len(request.todo):
                if self.in_flight >= self.depth:
                    return True
                self.settle()
                which = request.todo[: min(request.at_once, self.depth - self.in_flight)]
                self.blocks.fill(request.number, request.file.fd, request.plan.start, request.places, which)
                if aside is not None and len(which) >= MANY and self._submit_aside(aside, request, which):
                    return True
                if not self._submit(request, which):
                    return True
        return False

    def _submit_aside(self, aside: Aside, request: _Request, which: np.ndarray) -> bool:
        """Let another thread begin these reads, whose blocks are filled; False where there is none."""
        name, count = self._name.value if os.getpid() == self.pid else 0, len(which)
        job = self.kernel.prepare_submit(aside, name, count, self.blocks.pointers, self._taken) if name else None
        if job is None:
            return False
        self.torn = True
        request.todo = request.todo[count:]
        request.in_flight += count
        self.in_flight += count
        self._begun = job, request, which
        job.begin()
        self.torn = False
        return True

    def submitting(self) -> bool:
        """Whether another thread submits reads, which need not be waited for."""
        return self._begun is not None and not self._begun[0].done()

    def settle(self) -> None:
        """Wait until nobody else submits: what was not taken is to be begun again."""
        if self._begun is None:
            return
        job, request, which = self._begun
        if os.getpid() == self.pid:  # in a forked child nobody else is there
            job.finish()
        self.torn = True
        taken = max(0, int(self._taken[0]))
        if taken < len(which):
            request.in_flight -= len(which) - taken
            self.in_flight -= len(which) - taken
            if not request.given_up:
                request.todo = np.concatenate([which[taken:], request.todo])
        self._begun = None
        self.torn = False

    def _submit(self, request: _Request, which: np.ndarray) -> bool:
        """Begin these reads of a request, whose blocks are filled, or hand them to the threads; False when that must
        wait."""
        self.torn = True
        taken = -errno.ENOSYS
        if self._name.value:
            taken = self.kernel.submit(self._name.value, len(which), self.blocks.pointers)
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
        got = self.kernel.events(self._name.value, at_least, self.depth, self._events_at)
        if got > 0:
            self._note(self.events[:got])
        elif got < 0 and got != -errno.EINTR:
            self._lost()
        self.torn = False

    def _lost(self) -> None:
        """The kernel does not know the context: a reader that was interrupted took it for its own, and ended it."""
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

    def finish(self, request: _Request) -> None:
        """Return when nothing of this request is in flight or to be begun."""
        self.mend()
        if self._begun is not None and request.in_flight and request is not self._begun[1]:
            self.reap(0)  # if that was all, whoever submits need not be waited for
        if request.in_flight or len(request.todo):
            self.settle()
        while request.in_flight or len(request.todo):
            # Wake up once, or, where reads wait for their turn, before the disk runs out of them.
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
        """Drain, and give the context back; a second call does nothing."""
        self.closed = True
        for request in self.requests.values():
            request.give_up()
        self._renew()
        self.requests = {}
        _contexts.discard(self)


class _Request:
    """One request's pieces: to be begun (`todo`), in flight, read, or with the threads."""

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
        self.number = next(context.numbers) & 0x7FFFFFFF  # shares an int64 with a piece's
        # Unread pieces are not known to have been read, nor handed over. Every one in flight is one of them.
        self.left, self.alike = len(plan.start), plan.nbytes if isinstance(plan, Alike) else 0
        self.nbytes = self.left * self.alike or int(self.length.sum())
        self.at_once = LONG_AT_ONCE if self.nbytes >= LONG_BYTES * self.left else context.depth
        self.places = places(plan, scrap)
        self.jobs: list[ReadJob] = []
        self.in_flight, self.given_up = 0, False
        self.todo, self._odd = np.arange(self.left), _NONE
        if file.align == 1 or isinstance(plan, Alike) and not plan.alike:
            self.todo, self._odd = _NONE, self.todo  # not to be read directly
        elif not isinstance(plan, Alike):
            self.todo, self._odd = np.flatnonzero(plan.aligned), np.flatnonzero(~plan.aligned)

    @cached_property
    def unread(self) -> np.ndarray:
        """Which pieces are unread, where some are; when all have been read only `left` says so."""
        return np.ones(len(self.plan.start), bool)

    @cached_property
    def handed(self) -> np.ndarray:
        """Which pieces were handed over, where any was."""
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
        """Nothing is in flight any more: what is not known to have been read is to be read again."""
        self.in_flight = 0
        unread = np.flatnonzero(self.unread) if self.left else _NONE
        self.left = len(unread)
        self.todo = _NONE if self.given_up else unread
        for job in self.jobs:
            if not job.over:
                self.crew.start(job)  # which an interrupt may have prevented

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
        """These reads have ended, with so many bytes or a negative error number."""
        self.in_flight -= len(events)
        results = events[:, 2]
        if self.alike and len(events) == self.left == np.count_nonzero(results == self.alike):
            self.left = 0
            return
        which = events[:, 0] & 0xFFFFFFFF
        whole = results == self.length[which]
        self._read(which[whole])
        if not whole.all():
            self.hand_over(which[~whole])  # they read on, or tell what is wrong

    def _read(self, which: np.ndarray) -> None:
        """These pieces are no longer unread."""
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
        """Wait for the threads; returns the bytes that they asked for."""
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


class AioReader(PreadReader):
    """PreadReader's, but for reads that may go around the page cache: these the kernel does by itself.

    depth: reads in flight. Where it is more than the device takes, whoever submits them waits for the device.
    Raises OSError where the system has no asynchronous I/O, or no room for another context (fs.aio-max-nr).
    """

    def __init__(
        self,
        files: Sequence[Source],
        threads: int = 8,
        direct: bool = True,
        merging: Merging | None = None,
        depth: int = DEPTH,
        aside: Aside | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth {depth}: out of range")
        super().__init__(files, threads, direct, merging)
        self._context = _Context(depth, aside)
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
