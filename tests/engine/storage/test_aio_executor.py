"""Reads that another thread submits: whatever it takes and whenever it comes, bytes are right and memory is safe."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mlx_flash.engine.storage import aio_reader as aio
from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.errors import ReadError

from .test_aio_reader import IDS, NOTHING, ROOT, check_drained, check_interrupts, contexts, file, submit, wide  # noqa: F401
from .test_readers import HAS_AIO, page_aligned

pytestmark = pytest.mark.skipif(not HAS_AIO, reason="this system has no asynchronous I/O")
QUEUES = [32, 100, 512]


class Late:
    """Nobody begins the call before it is asked for; `share` of the blocks are then taken."""

    def __init__(self, share: float = 1.0):
        self.kernel, self.share, self.calls = aio.Kernel(), share, 0

    def prepare_call(self, number, arguments, found):
        self.calls += 1
        return Call(self, arguments, found)


class Call:
    def __init__(self, aside, arguments, found):
        self.aside, (self.context, self.count, self.pointers), self.found, self.begun = aside, arguments, found, False

    def begin(self):
        self.begun = True

    def done(self):
        self.finish()  # what another thread would have done by now
        return True

    def finish(self):
        if not self.begun:
            return
        self.begun = False
        count, kernel = int(self.count * self.aside.share), self.aside.kernel
        self.found[0] = -1  # not through what `Interrupt` watches: nothing interrupts compiled code
        if count:
            self.found[0] = kernel._call(kernel._numbers[1], self.context, count, self.pointers, None, None)


class Slow(Late):
    """A thread makes the call, after a while."""

    after_s = 0.001

    def prepare_call(self, number, arguments, found):
        self.calls += 1
        return Threaded(self, arguments, found)


class Threaded(Call):
    thread = None

    def begin(self):
        self.begun = True
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        time.sleep(self.aside.after_s)
        super().finish()

    def done(self):
        return not self.thread.is_alive()

    def finish(self):
        if self.thread is not None:
            self.thread.join()


class Nobody:
    def prepare_call(self, number, arguments, found):
        return None


KINDS = {"late": Late, "slow": Slow, "half": lambda: Late(0.5), "none": lambda: Late(0), "nobody": Nobody}


@pytest.mark.parametrize("depth", QUEUES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_the_same(wide, kind, depth):  # noqa: F811
    slab, other = page_aligned(300, 16384), page_aligned(300, 16384)
    with AioReader([wide[0]], merging=NOTHING, depth=depth, aside=KINDS[kind]()) as reader:
        for wait_for_first in (True, False):
            slab[:] = other[:] = 0
            first, second = submit(reader, slab), submit(reader, other, IDS[::-1])
            requests = [first, second] if wait_for_first else [second, first]
            for request in requests:
                report = request.wait()
                assert (report.bytes, report.reads) == (slab.nbytes, 1200)
            np.testing.assert_array_equal(slab, wide[1][IDS])
            np.testing.assert_array_equal(other, wide[1][IDS[::-1]])
            polled = submit(reader, slab)
            while not polled.ended():
                time.sleep(0.0005)
            assert polled.wait().reads == 1200
            assert not reader._context.in_flight and reader._context._begun is None


@pytest.mark.parametrize("kind", KINDS)
def test_small_requests_one_after_the_other(wide, kind):  # noqa: F811
    slabs = [page_aligned(30, 16384) for _ in range(6)]
    with AioReader([wide[0]], merging=NOTHING, depth=4096, aside=KINDS[kind]()) as reader:
        ids = [IDS[30 * k : 30 * (k + 1)] for k in range(len(slabs))]
        requests = [submit(reader, slab, chosen) for slab, chosen in zip(slabs, ids, strict=True)]
        for k in (3, 0, 5, 1, 2, 4):
            assert requests[k].wait().reads == 120
            np.testing.assert_array_equal(slabs[k], wide[1][ids[k]])


def test_what_was_lost_is_read_again_when_nobody_submits_any_more(wide):  # noqa: F811
    """As after an interrupt in a system call, while another thread is about to submit."""
    slab, aside = page_aligned(300, 16384), Slow()
    aside.after_s = 0.03
    with AioReader([wide[0]], merging=NOTHING, depth=200, aside=aside) as reader:
        for _ in range(3):
            pending = submit(reader, slab)
            reader._context.torn = True
            assert pending.wait().reads == 1200
            np.testing.assert_array_equal(slab, wide[1][IDS])
            slab[:] = 0xA5
            time.sleep(0.05)
            assert (slab == 0xA5).all() and reader._context.in_flight == 0


def test_a_request_that_has_ended_waits_for_nobody_who_submits(wide):  # noqa: F811
    aside = Slow()
    with AioReader([wide[0]], merging=NOTHING, depth=512, aside=aside) as reader:
        slab, other = page_aligned(300, 16384), page_aligned(300, 16384)
        first = submit(reader, slab, IDS[:30])
        while not first.ended():
            time.sleep(0.001)
        first = submit(reader, slab, IDS[:30])
        reader._context.settle()
        time.sleep(0.05)
        second = submit(reader, other, IDS[30:60])
        assert first.wait().reads == 120 and reader._context._begun is not None
        assert second.wait().reads == 120 and aside.calls == 3


@pytest.mark.parametrize("kind", ["late", "slow"])
def test_drain_and_close_wait_until_nobody_submits(wide, kind):  # noqa: F811
    before = contexts()
    with AioReader([wide[0]], depth=100, merging=NOTHING, aside=KINDS[kind]()) as reader:
        slab = page_aligned(300, 16384)
        pending = submit(reader, slab)
        check_drained(reader, slab, wide[1], pending)
        with pytest.raises(ReadError, match="given up"):
            pending.wait()
        submit(reader, slab)
    slab[:] = 0xA5
    reader = AioReader([wide[0]], depth=100, merging=NOTHING, aside=KINDS[kind]())
    submit(reader, slab)
    del reader
    gc.collect()
    slab[:] = 0xA5
    time.sleep(0.01)
    assert (slab == 0xA5).all() and contexts() == before


@pytest.mark.parametrize("kind", ["late", "slow", "half"])
def test_an_interrupt_at_any_step(file, kind):  # noqa: F811
    check_interrupts(file, 100, KINDS[kind]())


def test_a_lost_context_is_replaced(wide):  # noqa: F811
    with AioReader([wide[0]], merging=NOTHING, depth=64, aside=Late()) as reader:
        slab = page_aligned(300, 16384)
        pending = submit(reader, slab)
        assert reader._context.kernel.destroy(reader._context._name.value) == 0
        assert pending.wait().bytes == slab.nbytes
        np.testing.assert_array_equal(slab, wide[1][IDS])


FORKING = """
import os, sys
from tests.engine.storage.test_aio_reader import *
from mlx_flash.engine.backends.numpy.kernels.thread_pool import Workers
crew = Workers()
crew.count = 2
reader = AioReader([LayerFile(Path(sys.argv[1]), WIDE)], merging=NOTHING, depth=512, aside=crew)
slab = page_aligned(300, 16384)
submit(reader, slab).wait()
whole = slab.copy()
under_way = submit(reader, slab)
child = os.fork()
if not child:
    told = 0
    for pending in (under_way, submit(reader, slab)):
        try:
            pending.wait()
        except ReadError as error:
            told += "forked" in str(error)
    reader.drain()
    reader.close()
    os._exit(told)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
same = under_way.wait().reads == 1200 and np.array_equal(slab, whole)
print(status, same)
end = time.monotonic() + float(sys.argv[2])
interrupts = wrong = 0

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
rng = random.Random(2)
while time.monotonic() < end:
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.01))
    slab[:] = 0
    try:
        submit(reader, slab).wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        wrong += not np.array_equal(slab, whole)
    except KeyboardInterrupt:
        interrupts += 1
        reader.drain()
        slab[:] = 0xA5
        submit(reader, page_aligned(300, 16384)).wait()
        wrong += not (slab == 0xA5).all()
signal.setitimer(signal.ITIMER_REAL, 0)
print(interrupts > 5, wrong)
"""


def test_kernels_threads_submit_also_when_interrupted_and_not_in_a_forked_child(wide):  # noqa: F811
    pytest.importorskip("numba", reason="helpers live in compiled code")
    command = [sys.executable, "-c", FORKING, str(wide[0].path), "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "True", "True", "0"], done.stdout + done.stderr
