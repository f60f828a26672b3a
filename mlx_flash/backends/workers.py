"""Threads that help with one kernel call: whoever is awake takes the next task, and nobody waits for a thread that
has not begun.

Not Numba's own pool: its calls end when every thread has shown up, which takes milliseconds where another process
holds a core; and it aborts the process, or spins, where readers' threads work beside it. Knows no arithmetic.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

TASK_BYTES = 1 << 16  # less work than this for each of two threads is done before the second is awake
TASKS_PER_THREAD = 8  # so that a thread that is held up does not hold up the rest
DEFAULT_THREADS = 8  # memory is the limit: more threads than this add little


class Job:
    """A call's kernel, its arguments, and what must stay in memory while it runs."""

    def __init__(self, kernel: Callable[..., int], arguments: tuple[Any, ...], keep: Any):
        self.kernel, self.arguments, self.keep = kernel, arguments, keep

    def work(self) -> int:
        """Take part; returns how many tasks are done."""
        return self.kernel(*self.arguments)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """`count` threads, the calling one among them. Helpers are started when they are first needed; they never end, so
    all Workers of a process share them."""

    _wake: ClassVar[list[threading.Lock]] = []  # one per helper; held while it sleeps
    _job: ClassVar[Job | None] = None

    def __init__(self) -> None:
        self._count = min(available_cores(), DEFAULT_THREADS)

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

    def run(self, kernel: Callable[..., int], tasks: int, *arguments: Any, alone: bool = False) -> None:
        """Do tasks 0..tasks-1 of `kernel(state, tasks, *arguments)`.

        The kernel, which lets go of the interpreter's lock, takes the next task by adding 1 to state[0], adds 1 to
        state[1] when it has done it, and returns state[1] when no task is left; both atomically.
        """
        self.start(kernel, tasks, *arguments, alone=alone)()

    def start(
        self, kernel: Callable[..., int], tasks: int, *arguments: Any, alone: bool = False, keep: Any = None
    ) -> Callable[[], None]:
        """The same, begun: helpers work on it while the caller does something else, until it calls what is returned,
        which takes part and returns when all is done. keep: held in memory as long as a helper may use it."""
        job = Job(kernel, (np.zeros(2, np.int64), tasks, *arguments), keep)
        try:
            if tasks > 1 and not alone and self._count > 1:
                Workers._job = job
                for helper in range(min(self._count, tasks) - 1):
                    self._rouse(helper)
        except BaseException:
            self._finish(job, tasks)  # on Ctrl-C too: helpers would go on with arrays that the caller uses again
            raise
        return lambda: self._complete(job, tasks)

    def _complete(self, job: Job, tasks: int) -> None:
        try:
            self._finish(job, tasks)
        except BaseException:
            self._finish(job, tasks)
            raise

    @staticmethod
    def _finish(job: Job, tasks: int) -> None:
        while job.work() < tasks:
            time.sleep(0)
        job.keep = None  # the newest job stays known

    def _rouse(self, helper: int) -> None:
        if helper == len(self._wake):
            lock = threading.Lock()
            self._wake.append(lock)
            threading.Thread(target=self._help, args=(lock,), daemon=True, name=f"kernel-{helper}").start()
        elif self._wake[helper].locked():
            with suppress(RuntimeError):  # another thread's call has just done so
                self._wake[helper].release()

    @staticmethod
    def _help(wake: threading.Lock) -> None:
        while True:
            wake.acquire()
            job = Workers._job  # the newest: one that is over has no task left
            if job is not None:
                job.work()
