"""When the kernel refuses, reads less or fails, AioReader's threads read on, or the error names the place."""

from __future__ import annotations

import errno
import os
import random
import threading
import time

import numpy as np
import pytest

from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.storage.bundle import DATA_START
from mlx_flash.errors import ReadError

from .aio import APART, IDS, ROWS, SpoiledAio, WatchedAio, needs_aio, submit
from .test_aio_reader import no_preadv
from .test_readers import NOTHING, check, page_aligned

pytestmark = needs_aio


class BusyAio(WatchedAio):
    """Takes a few reads at a time, or none while some are in flight, and may be interrupted in any call."""

    def __init__(self):
        super().__init__()
        self.rng = random.Random(1)

    def submit(self, context, count, pointers):
        if self.rng.random() < 0.2:
            return -errno.EINTR
        if self.in_flight and self.rng.random() < 0.3:
            return -errno.EAGAIN
        return super().submit(context, min(count, self.rng.randint(1, 9)), pointers)

    def events(self, context, at_least, most, into):
        if self.rng.random() < 0.2:
            return -errno.EINTR
        return super().events(context, at_least, most, into)


def test_a_kernel_that_takes_little(file):
    with no_preadv(), AioReader([file[0]], depth=32, merging=NOTHING, aio=BusyAio()) as reader:
        for _ in range(5):
            check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)


@pytest.mark.parametrize("broken", ["submit", "events", "setup"])
@pytest.mark.parametrize("problem", [errno.EAGAIN, errno.EPERM, errno.EINVAL])
def test_threads_take_over_from_a_kernel_that_refuses(file, broken, problem):
    calls = []

    def act(name, call):
        calls.append(name)
        return -problem if name == broken else call()

    slab = page_aligned(300, 2048)
    with AioReader([file[0]], merging=NOTHING, aio=(aio := WatchedAio())) as reader:
        aio.interrupt_next("submit")  # so that a new context is needed
        with pytest.raises(KeyboardInterrupt):
            submit(reader, slab)
        aio.act = act
        for _ in range(2):
            check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)
            slab[:] = 0
            pending = submit(reader, slab)
            while not pending.ended():
                time.sleep(0.001)
            np.testing.assert_array_equal(slab, file[1][IDS])
        assert 0 < calls.count(broken) < 20


@pytest.mark.parametrize("result", [0, 512, 700, -errno.EIO, -errno.EAGAIN, -errno.EINTR, -errno.EINVAL])
def test_what_ended_short_is_read_on(file, result):
    with AioReader([file[0]], merging=NOTHING, aio=(aio := SpoiledAio(40, result))) as reader:
        report = check(reader, 0, file[1], APART, ROWS[:150], [(0, 2048, 2048, 0)], 150)
        assert aio.spoiled and report.bytes == 150 * 2048 and report.reads == 150


@pytest.mark.parametrize("bundle", [0, 120, 298])
def test_what_ended_short_among_many_that_did_not(file, bundle):
    """In whichever of several batches."""
    with AioReader([file[0]], merging=NOTHING, depth=16, aio=(aio := SpoiledAio(bundle, 512))) as reader:
        report = check(reader, 0, file[1], APART, ROWS[:150], [(0, 2048, 2048, 0)], 150)
        assert aio.spoiled and report.bytes == 150 * 2048 and report.reads == 150


class SpoiledAndSlowAio(SpoiledAio):
    """Submits nothing more until a thread has failed to read on."""

    failed = threading.Event()

    def submit(self, context, count, pointers):
        if self.spoiled:
            self.failed.wait(5)
            time.sleep(0.01)
        return super().submit(context, count, pointers)


def test_a_disk_error_is_told_when_nothing_is_in_flight(file, monkeypatch):
    aio, real = SpoiledAndSlowAio(40, -errno.EIO), os.preadv

    def fail(fd, buffers, offset):
        if offset >= DATA_START:
            aio.failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with AioReader([file[0]], merging=NOTHING, depth=8, aio=aio) as reader:
        pending = submit(reader, page_aligned(300, 2048), APART[20:])
        for _ in range(2):
            with pytest.raises(ReadError, match=rf"{file[0].path}, layer 0, bundle 40: Input/output error"):
                pending.wait()
        assert not aio.in_flight and pending.ended()
        assert sum(aio.asked) < 60, "the rest should not have been read"
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)


def test_of_several_errors_the_first_in_the_file_is_told(file):
    with AioReader([file[0]], merging=NOTHING) as reader:
        os.truncate(file[0].path, DATA_START + 90 * 2048 + 100)
        pending = submit(reader, page_aligned(300, 2048))
        with pytest.raises(ReadError, match=r"bundle 90: .* ends at byte"):
            pending.wait()


def test_a_context_that_somebody_else_destroyed(wide):
    """What an interrupted reader believes to be its own may be another's by now."""
    with AioReader([wide[0]], merging=NOTHING, depth=64, aio=(aio := WatchedAio())) as reader:
        slab = page_aligned(300, 16384)
        for when in ("before", "after"):
            if when == "after":
                pending = submit(reader, slab)
            assert aio.destroy(aio.context) == 0
            if when == "before":
                pending = submit(reader, slab)
            assert pending.wait().bytes == slab.nbytes
            np.testing.assert_array_equal(slab, wide[1][IDS])
            slab[:] = 0
