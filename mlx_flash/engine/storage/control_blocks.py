"""The kernel's records for a plan's reads: where each piece goes in memory, and the control blocks of a submission.

Knows read plans and the records of Linux's asynchronous I/O; makes no system call.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_flash.engine.system.linux_aio import CONTROL_BLOCK, PREAD, PREADV

from .read_plan import Alike, Pieces

_NONE = np.empty(0, np.int64)


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
            nbytes[:], opcode[:] = places.alike, PREAD
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
    opcode[several], size[several] = PREADV, end - begin
    buffer[several] = vectors.ctypes.data + begin * vectors.itemsize * 2
    return Places(buffer, size, opcode, 0, vectors)
