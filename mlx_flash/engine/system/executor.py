"""System calls that another thread makes while the caller goes on: the protocol, and an executor without threads.

The kernels' thread pool is the executor of a run. It is handed to the reader, which owns its calls from start to end.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Protocol


class SystemCall(Protocol):
    """A system call of three arguments that can be made again and again, one at a time. Used by one thread."""

    def start(self, a: int, b: int, c: int) -> bool:
        """Let another thread make the call. Returns False, and makes no call, if there is no such thread. The last
        call must have been waited for."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> int:
        """Return the result of the last call, -1 if it failed; 0 if none was started. Makes the call itself if no
        thread has begun it. May be repeated, also after an interrupt."""


class Executor(Protocol):
    """Makes system calls on threads that need no Python."""

    def system_call(self, number: int) -> SystemCall:
        """A call by its number."""


class InlineExecutor:
    """Makes each call in the calling thread. For tests.

    deferred: in `done` or `wait`, as if no other thread found time before; otherwise in `start`
    """

    def __init__(self, deferred: bool = False):
        if sys.platform != "linux":
            raise OSError("system calls have no stable numbers on this system")
        self.deferred = deferred
        long = ctypes.c_long
        self.syscall: Any = ctypes.CFUNCTYPE(long, *[long] * 4)(("syscall", ctypes.CDLL(None)))

    def system_call(self, number: int) -> InlineCall:
        """See `Executor.system_call`."""
        return InlineCall(self, number)


class InlineCall:
    """See `SystemCall`."""

    def __init__(self, executor: InlineExecutor, number: int):
        self.executor, self.number = executor, number
        self.arguments: tuple[int, int, int] | None = None
        self.result = 0

    def start(self, a: int, b: int, c: int) -> bool:
        """See `SystemCall.start`."""
        self.arguments = a, b, c
        if not self.executor.deferred:
            self.wait()
        return True

    def done(self) -> bool:
        """See `SystemCall.done`."""
        self.wait()
        return True

    def wait(self) -> int:
        """See `SystemCall.wait`."""
        if self.arguments is not None:
            arguments, self.arguments = self.arguments, None
            self.result = self.executor.syscall(self.number, *arguments)
        return self.result
