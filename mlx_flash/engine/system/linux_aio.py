"""Linux's asynchronous I/O as the kernel has it: four system calls, and the record that describes one read.

Knows addresses and numbers only, not what is read into which memory.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

import numpy as np

from .executor import Executor, SystemCall

_NUMBERS = {"x86_64": (206, 209, 208, 207), "aarch64": (0, 2, 4, 1)}  # io_setup, io_submit, io_getevents, io_destroy
PREAD, PREADV = 0, 7  # opcodes
CONTROL_BLOCK = np.dtype(  # struct iocb, little-endian
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


class LinuxAio:
    """The four system calls. Each returns a count, or a negative error number.

    Raises OSError on a system that has no such calls.
    """

    def __init__(self, system: str = sys.platform, machine: str | None = None) -> None:
        numbers = _NUMBERS.get(machine or platform.machine())
        if system != "linux" or numbers is None or sys.maxsize < 1 << 32 or sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "no asynchronous I/O is known for this system")
        self._numbers = numbers
        long, pointer = ctypes.c_long, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(long, long, ctypes.c_ulong, long, long, pointer, pointer, use_errno=True)
        self._call = kind(("syscall", ctypes.CDLL(None)))

    def _result(self, value: int) -> int:
        return value if value >= 0 else -ctypes.get_errno()

    def setup(self, events: int, context: ctypes.c_ulong) -> int:
        """Make a context. `context` must hold 0 and receives the context's id."""
        return self._result(self._call(self._numbers[0], events, ctypes.addressof(context), 0, None, None))

    def submit(self, context: int, count: int, pointers: int) -> int:
        """Start the reads of `count` control blocks, whose addresses are at `pointers`; returns how many were taken."""
        return self._result(self._call(self._numbers[1], context, count, pointers, None, None))

    def submit_call(self, executor: Executor) -> SystemCall:
        """`submit` on another thread, with the same arguments; its result is -1 for every error."""
        return executor.system_call(self._numbers[1])

    def events(self, context: int, at_least: int, most: int, into: int) -> int:
        """Wait until `at_least` reads have ended; returns how many have. The memory at `into` receives four int64 for
        each: the control block's data and address, the result, 0."""
        return self._result(self._call(self._numbers[2], context, at_least, most, into, None))

    def destroy(self, context: int) -> int:
        """Wait until nothing is in flight, and remove the context."""
        return self._result(self._call(self._numbers[3], context, 0, 0, None, None))
