"""Linux's own asynchronous I/O as the kernel has it: four system calls, and the records they take.

Knows addresses and numbers; what they mean, and what becomes of an interrupt, is `aio_reader.py`'s business.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
from typing import NamedTuple

import numpy as np

from mlx_flash.engine.storage.read_plan import Alike, Pieces
from mlx_flash.engine.storage.reader import Aside, Begun

_NUMBERS = {"x86_64": (206, 209, 208, 207), "aarch64": (0, 2, 4, 1)}  # io_setup, io_submit, io_getevents, io_destroy
_PREAD, _PREADV = 0, 7
_NONE = np.empty(0, np.int64)
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


class Kernel:
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

    def submit(self, context: int, count: int, pointers: int) -> int:
        """Begin the reads of `count` control blocks, whose addresses are at `pointers`; returns how many were taken."""
        return self._result(self._call(self._numbers[1], context, count, pointers, None, None))

    def prepare_submit(self, aside: Aside, context: int, count: int, pointers: int, taken: np.ndarray) -> Begun | None:
        """The same, by another thread; `taken` (1,) int64 tells how many, or -1."""
        return aside.prepare_call(self._numbers[1], (context, count, pointers), taken)

    def events(self, context: int, at_least: int, most: int, into: int) -> int:
        """Wait for so many ended reads; memory at `into` takes data, block, result, 0 (int64) of each."""
        return self._result(self._call(self._numbers[2], context, at_least, most, into, None))

    def destroy(self, context: int) -> int:
        """Return when nothing is in flight; the context is gone."""
        return self._result(self._call(self._numbers[3], context, 0, 0, None, None))


class Places(NamedTuple):
    """Where the kernel is to put pieces (n,): the buffer of each, its nbytes and opcode, or `alike` bytes for all.

    vectors (m, 2): what the buffers of pieces with several segments are: address and length of each.
    """

    buffer: np.ndarray
    nbytes: np.ndarray
    opcode: np.ndarray
    alike: int
    vectors: np.ndarray


class Blocks:
    """The control blocks of one submission, filled anew for every one: the kernel copies them.

    pointers: the address of the blocks' addresses
    """

    def __init__(self, depth: int):
        self._blocks = np.zeros(depth, CONTROL_BLOCK)
        self._pointers = self._blocks.ctypes.data + np.arange(depth) * CONTROL_BLOCK.itemsize
        self.pointers = self._pointers.ctypes.data
        names = ("data", "fd", "opcode", "offset", "buffer", "nbytes")
        self._columns = [self._blocks[name] for name in names]
        self._alike = 0  # the length of the read that each block describes, where it is the same

    def fill(self, number: int, fd: int, start: np.ndarray, places: Places, which: np.ndarray) -> None:
        """Describe these pieces, at most `depth`, of request `number`; piece k reads from byte start[k]."""
        count = len(which)
        data, file, opcode, offset, buffer, nbytes = self._columns
        data[:count] = which + (number << 32)
        file[:count] = fd
        offset[:count] = start[which]
        buffer[:count] = places.buffer[which]
        if not places.alike:
            self._alike = 0
            nbytes[:count], opcode[:count] = places.nbytes[which], places.opcode[which]
        elif places.alike != self._alike:
            nbytes[:], opcode[:] = places.alike, _PREAD
            self._alike = places.alike


def places(plan: Pieces, scrap: memoryview) -> Places:
    """Where a plan's pieces go; what lies between their segments goes to `scrap`."""
    if isinstance(plan, Alike):
        return Places(plan.address, _NONE, _NONE, plan.nbytes, _NONE)
    found, opcode = plan.segments, np.zeros(len(plan.start), np.int64)
    if len(opcode) == len(found.offset):
        return Places(plan.address, found.nbytes, opcode, 0, _NONE)
    first, count = plan.first[:-1], plan.first[1:] - plan.first[:-1]
    buffer, size = plan.address[first], found.nbytes[first]
    several = count > 1
    among = np.repeat(several, count)  # the segments of those pieces
    address, offset, nbytes = plan.address[among], found.offset[among], found.nbytes[among]
    gap = np.zeros(len(offset), np.int64)  # before each segment; of a piece's first it does not matter
    gap[1:] = offset[1:] - offset[:-1] - nbytes[:-1]
    place = np.cumsum(1 + (gap > 0)) - 1
    vectors = np.empty((place[-1] + 1, 2), np.int64)
    vectors[place, 0], vectors[place, 1] = address, nbytes
    gaps = np.flatnonzero(gap > 0)
    vectors[place[gaps] - 1, 0], vectors[place[gaps] - 1, 1] = np.frombuffer(scrap, np.uint8).ctypes.data, gap[gaps]
    last = np.cumsum(count[several])
    begin, end = place[last - count[several]], place[last - 1] + 1
    opcode[several], size[several] = _PREADV, end - begin
    buffer[several] = vectors.ctypes.data + begin * vectors.itemsize * 2
    return Places(buffer, size, opcode, 0, vectors)
