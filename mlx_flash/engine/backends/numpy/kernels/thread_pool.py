"""The thread pool of the compiled kernels: a call is cut into tasks, and each thread that is awake takes the next one.

The helper threads run compiled code only and never hold Python's interpreter lock, so the caller can run Python
meanwhile. Numba's own pool is not used: its calls end only when every thread has taken part, which takes milliseconds
if another process holds a core; and it aborts the process, or spins, if readers' threads work beside it. Knows no
arithmetic.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from typing import Any, ClassVar

import numpy as np

from mlx_flash.engine.system.cores import default_threads

from . import thread_pool_loops
from .thread_pool_loops import DONE, END, HELPER_ITEMS, ITEM, JOB_ITEMS, JOBS, PARAMETERS, STEP_ITEMS

TASK_BYTES = 1 << 16  # with less work for each of two threads, the first is done before the second is awake
TASKS_PER_THREAD = 8  # so that one slow thread does not delay the rest
MOST_HELPERS = 63
JOB_BYTES = JOB_ITEMS * ITEM
PACK_INTO = [Struct(f"{count}q").pack_into for count in range(JOB_ITEMS - PARAMETERS)]
URGENT_PLACES, PLACES = range(JOBS), range(1, JOBS)


def pages(items: int) -> np.ndarray:
    """Zeros (items,) int64 that begin at a multiple of 64 bytes."""
    memory = np.zeros(items + 8, np.int64)
    skip = -memory.ctypes.data % 64 // 8
    return memory[skip : skip + items]


class Board:
    """The shared memory through which callers give jobs to helpers. A process has one board for all pools, and never
    frees it: helpers look at it at any time."""

    def __init__(self) -> None:
        self.jobs = pages(JOBS * JOB_ITEMS).reshape(JOBS, JOB_ITEMS)
        self.helpers = pages(MOST_HELPERS * HELPER_ITEMS).reshape(MOST_HELPERS, HELPER_ITEMS)
        self.at, self.helpers_at = int(self.jobs.ctypes.data), int(self.helpers.ctypes.data)
        self.items = self.jobs.reshape(-1).data  # written to in a fraction of the array's time
        self.open: dict[int, Job] = {}  # by place, oldest first: a place is free if it is not in here
        # A garbage collection may finish a forgotten job while this thread holds the lock.
        self._lock = threading.RLock()
        self._started = 0
        self._threads: list[threading.Thread] = []
        atexit.register(self.dismiss)
        self._hiring = threading.Lock()

    def take(self, job: Job, urgent: bool) -> None:
        """Give a job a free place. An urgent job gets the first place, which helpers look at between any two tasks, if
        that is free. If none is free, wait for a job that has begun, or drop one that was forgotten."""
        places = URGENT_PLACES if urgent else PLACES
        while True:
            with self._lock:
                for place in places:
                    if place not in self.open:
                        job.place, job.at = place, self.at + place * JOB_BYTES
                        # So that `finish` does nothing until the job begins.
                        self.items[place * JOB_ITEMS + DONE] = job.tasks
                        self.open[place] = job
                        return
            self._finish_one()

    def release(self, job: Job) -> None:
        """Free a job's place. Does nothing if that was done before and another job has the place by now."""
        with self._lock:
            if self.open.get(job.place) is job:
                del self.open[job.place]

    def _finish_one(self) -> None:
        """Finish the oldest job that has begun. If there is none, finish one that was forgotten before it began: one of
        this thread, or of a thread that has ended. A job of another thread may be about to begin, or run steps."""
        jobs = list(self.open.values())
        threads = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        for job in [job for job in jobs if job.begun] or [job for job in jobs if job.thread not in threads]:
            job.finish()
            return
        time.sleep(0)

    def hire(self, count: int) -> int:
        """Start helpers until there are `count`; returns how many of them there are. None can be started on a system
        without pipes, on which helpers sleep."""
        if count > self._started and os.name == "posix":
            with self._hiring, suppress(OSError, RuntimeError):  # no more pipes or threads to be had: fewer helpers
                while self._started < min(count, MOST_HELPERS):
                    mine = self.helpers[self._started]
                    mine[1], mine[2] = os.pipe()
                    os.set_blocking(int(mine[2]), False)
                    arguments = self.at, self.helpers_at + self._started * mine.nbytes
                    name = f"kernel-{self._started}"
                    thread = threading.Thread(target=thread_pool_loops.serve, args=arguments, daemon=True, name=name)
                    thread.start()
                    self._threads.append(thread)
                    self._started += 1
        return min(count, self._started)

    def dismiss(self) -> None:
        """End the helpers at the end of the process, which frees the code that they run."""
        for mine in self.helpers[: len(self._threads)]:
            mine[END] = 1
            with suppress(OSError):
                os.write(int(mine[2]), b"\0")
        for thread in self._threads:
            thread.join(1.0)


class Job:
    """One call of a kernel: its arguments on the board, and its arrays, which are kept while a helper may use them.

    helpers: how many are woken
    urgent: helpers take it before the next task of any other job
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
        at = self.place * JOB_BYTES + PARAMETERS * ITEM
        PACK_INTO[2 + len(arguments)](board.items, at, kernel, tasks, *map(as_item, arguments))

    def begin(self) -> None:
        """Let helpers take tasks. Before this `finish` does nothing."""
        thread_pool_loops.begin(self.at, self.tasks, self.board.helpers_at, self.helpers)
        self.begun = True

    def done(self) -> bool:
        """Whether `finish` would return at once."""
        return self.keep is None or self.board.items[self.place * JOB_ITEMS + DONE] >= self.tasks

    def finish(self) -> None:
        """Do tasks until none is left, and return when all are done; a second call does nothing."""
        try:
            self._finish()
        except BaseException:
            self._finish()  # after Ctrl-C too: helpers would go on with arrays that the caller uses again
            raise

    def _finish(self) -> None:
        while self.keep is not None and not thread_pool_loops.finish(self.at, self.tasks):
            time.sleep(0)
        self.keep = None
        self.board.release(self)


def as_item(argument: Any) -> int:
    """An argument as the int64 that a kernel receives: a number, or an array's address."""
    if isinstance(argument, np.ndarray):
        if argument.flags.carray and argument.size:
            return ctypes.addressof(ctypes.c_char.from_buffer(argument.data))  # in a third of the time
        address: int = argument.__array_interface__["data"][0]
        return address
    if isinstance(argument, np.float32):
        return int(argument.view(np.int32))
    return int(argument)


def when(finish: Callable[[], Any], result: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that waits for `finish` and returns `result`, which is then complete."""

    def wait() -> np.ndarray:
        finish()
        return result

    return wait


class Workers:
    """A pool of `count` threads, the calling one included. Helpers are started when first needed, never end, and are
    shared by all pools of the process."""

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
        """How many tasks to cut work on `nbytes` into: at most `most`, and 1 if helpers would wake up too late."""
        if self._count == 1:
            return 1
        return max(1, min(most, nbytes // TASK_BYTES, self._count * TASKS_PER_THREAD))

    def run(self, kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
        """Do tasks 0..tasks-1 of a kernel marked by `task_kernel`. arguments: integers, np.float32 and arrays."""
        self.start(kernel, tasks, *arguments)()

    def start(self, kernel: Callable[..., None], tasks: int, *arguments: Any, keep: Any = None) -> Callable[[], None]:
        """Start the same on the helpers. The function that is returned takes part and returns when all tasks are done;
        it must be called. keep: objects to keep alive until then."""
        board, helpers = self.shared_board(), 0
        if tasks > 1 and self._count > 1:
            helpers = board.hire(min(self._count, tasks) - 1)
        job = Job(board, thread_pool_loops.address_of(kernel), tasks, arguments, helpers, keep)
        job.begin()
        return job.finish

    def system_call(self, number: int) -> ThreadCall:
        """See `Executor.system_call`."""
        return ThreadCall(self, number)

    def run_steps(self, steps: np.ndarray) -> None:
        """Do kernel calls one after the other, without Python between them; see `Steps`."""
        board = self.shared_board()
        job = Job(board, 0, 0, (), 0, steps)
        helpers = board.hire(self._count - 1) if self._count > 1 else 0
        thread_pool_loops.run_steps(job.at, steps.ctypes.data, len(steps), board.helpers_at, helpers)
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
        kernel = thread_pool_loops.address_of(thread_pool_loops.system_call)
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
    """A list of kernel calls that is run again and again with the same arguments, without Python between the calls.
    Only the contents of the arrays change."""

    def __init__(self, workers: Workers):
        self.workers = workers
        self._steps: list[tuple[Any, ...]] = []
        self._kept: tuple[Any, ...] = ()
        self._table = np.empty((0, STEP_ITEMS), np.int64)

    def add(self, kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
        """Add a call, cut into `tasks` tasks."""
        self._steps.append((kernel, tasks, *arguments))  # keeps the arrays in memory

    def keep(self, *what: Any) -> None:
        """Keep these objects alive too."""
        self._kept += what

    def run(self) -> None:
        """Do all calls, in order."""
        if len(self._table) < len(self._steps):
            table = np.zeros((len(self._steps), STEP_ITEMS), np.int64)
            for row, (kernel, tasks, *arguments) in zip(table, self._steps, strict=True):
                row[: 2 + len(arguments)] = (thread_pool_loops.address_of(kernel), tasks, *map(as_item, arguments))
            self._table = table  # only now: an interrupt must not leave half of one
        self.workers.run_steps(self._table)
