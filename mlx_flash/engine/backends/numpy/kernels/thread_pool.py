"""Threads that help with one kernel call: whoever is awake takes the next task, and nobody waits for a thread that
has not begun.

Helpers live in compiled code and never touch Python's interpreter, which whoever called the kernel needs meanwhile.
Not Numba's own pool: its calls end when every thread has shown up, which takes milliseconds where another process
holds a core; and it aborts the process, or spins, where readers' threads work beside it. Knows no arithmetic.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from mlx_flash.engine.system.cores import default_threads

from . import thread_pool_loops as compiled
from .thread_pool_loops import DONE, END, HELPER_ITEMS, JOB_ITEMS, JOBS, PARAMETERS, STEP_ITEMS

TASK_BYTES = 1 << 16  # less work than this for each of two threads is done before the second is awake
TASKS_PER_THREAD = 8  # so that a thread that is held up does not hold up the rest
MOST_HELPERS = 63


def pages(items: int) -> np.ndarray:
    """Zeros (items,) int64 that begin at a multiple of 64 bytes."""
    memory = np.zeros(items + 8, np.int64)
    skip = -memory.ctypes.data % 64 // 8
    return memory[skip : skip + items]


class Board:
    """Where jobs are put up, and the helpers' places: one for all, never freed, as helpers look at it at any time."""

    def __init__(self) -> None:
        self.jobs = pages(JOBS * JOB_ITEMS).reshape(JOBS, JOB_ITEMS)
        self.helpers = pages(MOST_HELPERS * HELPER_ITEMS).reshape(MOST_HELPERS, HELPER_ITEMS)
        self.at, self.helpers_at = int(self.jobs.ctypes.data), int(self.helpers.ctypes.data)
        self.open: dict[int, Job] = {}  # by place, oldest first: a place is free if it is not in here
        # A garbage collection may finish a forgotten job while this thread holds the lock.
        self._places = threading.RLock()
        self._started = 0
        self._threads: list[threading.Thread] = []
        atexit.register(self.dismiss)
        self._hiring = threading.Lock()

    def take(self, job: Job, urgent: bool) -> None:
        """Give a job a free place. An urgent job gets the first place, which helpers look at between any two tasks, if
        that is free. If none is free, wait for a job that has begun, or drop one that was forgotten."""
        while True:
            with self._places:
                for place in range(0 if urgent else 1, JOBS):
                    if place not in self.open:
                        job.place, job.at = place, self.at + place * self.jobs.strides[0]
                        self.jobs[place, DONE] = job.tasks  # so that `finish` does nothing until the job begins
                        self.open[place] = job
                        return
            self._finish_one()

    def release(self, job: Job) -> None:
        """Free a job's place. Does nothing if that was done before and another job has the place by now."""
        with self._places:
            if self.open.get(job.place) is job:
                self.open.pop(job.place, None)

    def _finish_one(self) -> None:
        """Finish the oldest job that is begun, or else one that was forgotten before it was: by this thread, or by one
        that has ended. Another thread's may be about to begin, or run steps."""
        jobs = list(self.open.values())
        threads = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        for job in [job for job in jobs if job.begun] or [job for job in jobs if job.thread not in threads]:
            job.finish()
            return
        time.sleep(0)

    def hire(self, count: int) -> int:
        """See to it that so many helpers live; returns how many do: none where the system has no pipes to sleep on."""
        if count > self._started and os.name == "posix":
            with self._hiring, suppress(OSError, RuntimeError):  # no more pipes or threads: fewer helpers
                while self._started < min(count, MOST_HELPERS):
                    mine = self.helpers[self._started]
                    mine[1], mine[2] = os.pipe()
                    os.set_blocking(int(mine[2]), False)
                    arguments = self.at, self.helpers_at + self._started * mine.nbytes
                    name = f"kernel-{self._started}"
                    thread = threading.Thread(target=compiled.serve, args=arguments, daemon=True, name=name)
                    thread.start()
                    self._threads.append(thread)
                    self._started += 1
        return min(count, self._started)

    def dismiss(self) -> None:
        """End the helpers, at the end of the process: one that is awake would run code that is no longer there."""
        for mine in self.helpers[: len(self._threads)]:
            mine[END] = 1
            with suppress(OSError):
                os.write(int(mine[2]), b"\0")
        for thread in self._threads:
            thread.join(1.0)


class Job:
    """A call's kernel and arguments, put up on the board. Arrays stay in memory while a helper may use them.

    helpers: how many are woken; urgent: helpers take it before the next task of what they are at
    """

    keep: tuple[Any, ...] | None
    place: int  # on the board
    at: int  # its address

    def __init__(
        self,
        board: Board,
        kernel: int,
        tasks: int,
        arguments: tuple[Any, ...],
        helpers: int,
        keep: Any = None,
        urgent: bool = False,
    ):
        self.board, self.tasks, self.helpers, self.keep = board, tasks, helpers, (arguments, keep)
        self.thread, self.begun = threading.get_ident(), False
        board.take(self, urgent)
        items = (kernel, tasks, *map(as_item, arguments))
        board.jobs[self.place, PARAMETERS : PARAMETERS + len(items)] = items

    def begin(self) -> None:
        """Until here `finish` does nothing; now helpers take tasks."""
        compiled.begin(self.at, self.tasks, self.board.helpers_at, self.helpers)
        self.begun = True

    def done(self) -> bool:
        """Whether `finish` would return at once."""
        return self.keep is None or bool(self.board.jobs[self.place, DONE] >= self.tasks)

    def finish(self) -> None:
        """Take part, and return when all is done; a second call does nothing."""
        try:
            self._finish()
        except BaseException:
            self._finish()  # on Ctrl-C too: helpers would go on with arrays that the caller uses again
            raise

    def _finish(self) -> None:
        while self.keep is not None and not compiled.finish(self.at, self.tasks):
            time.sleep(0)
        self.keep = None
        self.board.release(self)


def as_item(argument: Any) -> int:
    """A number, or an array's address, as a kernel gets it."""
    if isinstance(argument, np.ndarray):
        if argument.flags.carray and argument.size:
            return ctypes.addressof(ctypes.c_char.from_buffer(argument.data))  # in a third of the time
        address: int = argument.__array_interface__["data"][0]
        return address
    if isinstance(argument, np.float32):
        return int(argument.view(np.int32))
    return int(argument)


class Workers:
    """`count` threads, the calling one among them. Helpers are started when they are first needed; they never end, so
    all Workers of a process share them."""

    _board: ClassVar[Board | None] = None

    def __init__(self) -> None:
        self._count = default_threads()

    @property
    def count(self) -> int:
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} threads; at least 1 is needed")
        self._count = count

    def tasks(self, nbytes: int, most: int) -> int:
        """Into how many tasks to cut work on so many bytes: at most `most`, 1 where help would come too late."""
        if self._count == 1:
            return 1
        return max(1, min(most, nbytes // TASK_BYTES, self._count * TASKS_PER_THREAD))

    def run(self, kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
        """Do tasks 0..tasks-1 of a kernel made by `task_kernel`; arguments are integers, np.float32 and arrays."""
        self.start(kernel, tasks, *arguments)()

    def start(self, kernel: Callable[..., None], tasks: int, *arguments: Any, keep: Any = None) -> Callable[[], None]:
        """The same, begun: helpers work on it while the caller does something else, until it calls what is returned,
        which takes part and returns when all is done. keep: what else stays in memory until then."""
        board, helpers = self.shared_board(), 0
        if tasks > 1 and self._count > 1:
            helpers = board.hire(min(self._count, tasks) - 1)
        job = Job(board, compiled.address_of(kernel), tasks, arguments, helpers, keep)
        job.begin()
        return job.finish

    def system_call(self, number: int) -> ThreadCall:
        """See `Executor.system_call`."""
        return ThreadCall(self, number)

    def run_steps(self, steps: np.ndarray) -> None:
        """Do jobs one after the other, without Python between them; see `Steps`."""
        board = self.shared_board()
        job = Job(board, 0, 0, (), 0, steps)
        helpers = board.hire(self._count - 1) if self._count > 1 else 0
        compiled.run_steps(job.at, steps.ctypes.data, len(steps), board.helpers_at, helpers)
        job.finish()

    def shared_board(self) -> Board:
        if Workers._board is None:
            Workers._board = Board()
        return Workers._board


class ThreadCall:
    """A system call that a helper makes; see `executor.SystemCall`."""

    def __init__(self, workers: Workers, number: int):
        self._workers, self._number = workers, number
        self._result = np.zeros(1, np.int64)
        self._result_at = int(self._result.ctypes.data)
        self._job: Job | None = None  # known before it begins, so that an interrupt cannot lose it

    def start(self, a: int, b: int, c: int) -> bool:
        """See `SystemCall.start`."""
        board = self._workers.shared_board()
        helpers = board.hire(1) if self._workers.count > 1 else 0
        if not helpers:
            return False
        arguments = self._number, a, b, c, self._result_at
        kernel = compiled.address_of(compiled.system_call)
        self._job = Job(board, kernel, 1, arguments, helpers, self._result, urgent=True)
        self._job.begin()
        return True

    def done(self) -> bool:
        """See `SystemCall.done`."""
        return self._job is None or self._job.done()

    def wait(self) -> int:
        """See `SystemCall.wait`."""
        if self._job is not None:
            self._job.finish()
        return int(self._result[0])


class Steps:
    """Kernels to be called one after the other, again and again, with the same arguments: what changes is in memory
    that they name."""

    def __init__(self, workers: Workers):
        self.workers = workers
        self._steps: list[tuple[Any, ...]] = []
        self._kept: tuple[Any, ...] = ()
        self._table = np.empty((0, STEP_ITEMS), np.int64)

    def add(self, kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
        """One more, in so many tasks."""
        self._steps.append((kernel, tasks, *arguments))  # keeps the arrays in memory

    def keep(self, *what: Any) -> None:
        """These stay in memory too."""
        self._kept += what

    def run(self) -> None:
        """Do them all."""
        if len(self._table) < len(self._steps):
            table = np.zeros((len(self._steps), STEP_ITEMS), np.int64)
            for row, (kernel, tasks, *arguments) in zip(table, self._steps, strict=True):
                row[: 2 + len(arguments)] = (compiled.address_of(kernel), tasks, *map(as_item, arguments))
            self._table = table  # only now: an interrupt must not leave half of one
        self.workers.run_steps(self._table)
