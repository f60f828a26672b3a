"""What the tests of AioReader share: requests, and system calls that are watched, refused or spoiled."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.engine.storage import aio_reader, aio_requests, pread_reader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.system import linux_aio
from mlx_flash.engine.system.linux_aio import CONTROL_BLOCK, LinuxAio

from .test_readers import HAS_AIO, check

ROOT = Path(__file__).parents[3]
WIDE = Layout((Part("all", "uint8", 16384),), 300)
IDS = np.random.default_rng(3).permutation(300)
ROWS = np.arange(300)
APART = np.arange(0, 300, 2)  # each a read of its own

needs_aio = pytest.mark.skipif(not HAS_AIO, reason="this system has no asynchronous I/O")


class WatchedAio(LinuxAio):
    """The system calls, noting what is asked; `act(name, call)` may do something else than `call`."""

    def __init__(self, act=lambda name, call: call()):
        super().__init__()
        self.act = act
        self.asked, self.waits, self.in_flight, self.deepest, self.context = [], [], 0, 0, 0

    def setup(self, events, context):
        problem = self.act("setup", lambda: super(WatchedAio, self).setup(events, context))
        self.context = context.value
        return problem

    def submit(self, context, count, pointers):
        self.asked.append(count)
        taken = self.act("submit", lambda: super(WatchedAio, self).submit(context, count, pointers))
        self.in_flight += max(0, taken)
        self.deepest = max(self.deepest, self.in_flight)
        return taken

    def events(self, context, at_least, most, into):
        self.waits.append(at_least)
        got = self.act("events", lambda: super(WatchedAio, self).events(context, at_least, most, into))
        self.in_flight -= max(0, got)
        return got

    def destroy(self, context):
        self.in_flight = 0
        return self.act("destroy", lambda: super(WatchedAio, self).destroy(context))

    def interrupt_next(self, wanted):
        """The next call of this name is made, and its result lost to Ctrl-C."""

        def act(name, call):
            result = call()
            if name != wanted:
                return result
            self.act = lambda name, call: call()
            raise KeyboardInterrupt

        self.act = act


class SpoiledAio(WatchedAio):
    """One read of bundle `bundle` of 2 KiB, a piece by itself, ends with `result`, and nothing more of it in memory."""

    def __init__(self, bundle, result):
        super().__init__()
        self.offset, self.result, self.spoiled = DATA_START + bundle * 2048, result, False
        self.block = None

    def submit(self, context, count, pointers):
        for address in (ctypes.c_int64 * count).from_address(pointers):
            block = np.frombuffer(ctypes.string_at(address, CONTROL_BLOCK.itemsize), CONTROL_BLOCK)[0]
            if block["offset"] == self.offset and not self.spoiled:
                self.block = block
        return super().submit(context, count, pointers)

    def events(self, context, at_least, most, into):
        got = super().events(context, at_least, most, into)
        ended = np.frombuffer((ctypes.c_int64 * 4 * max(0, got)).from_address(into), np.int64).reshape(-1, 4)
        for event in ended:
            if self.block is not None and event[0] == self.block["data"] and not self.spoiled:
                left = max(0, self.result)
                ctypes.memset(int(self.block["buffer"]) + left, 0xEE, int(self.block["nbytes"]) - left)
                event[2] = self.result
                self.spoiled = True
        return got


class Interrupt:
    """Raises KeyboardInterrupt at one line or bytecode run by the package's readers, the `at`-th; counts them."""

    FILES = tuple(module.__file__ for module in (aio_reader, aio_requests, linux_aio, pread_reader))

    def __init__(self, at):
        self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self.called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def called(self, frame, event, _):
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes = True  # Python 3.12 traces lines all the same
        return self.stepped

    def stepped(self, frame, event, _):
        if event in ("opcode", "line"):
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self.stepped


def submit(reader, slab, ids=IDS):
    return reader.submit(0, ids, ROWS[: len(ids)], [Target(0, slab)])


def contexts():
    """How many contexts the kernel has for this process."""
    return Path("/proc/self/maps").read_text().count("[aio]")


def check_drained(reader, slab, bundles, pending=None):
    """Drain: nothing is written any more, and the reader reads on."""
    reader.drain()
    slab[:] = 0xA5
    if pending is not None and not pending.ended():
        raise AssertionError("drained, and not ended")
    check(reader, 0, bundles, range(3), range(3), [(0, bundles.shape[1], bundles.shape[1], 0)], 3)
    time.sleep(0.005)
    assert (slab == 0xA5).all(), "written to after it was drained"
