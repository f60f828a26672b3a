"""Reads that an executor submits: whatever it takes and whenever it comes, bytes are right and memory is safe."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.system.executor import InlineExecutor
from mlx_flash.errors import ReadError

from .aio import IDS, ROOT, WatchedAio, check_drained, contexts, needs_aio, submit
from .test_aio_interrupts import check_interrupts
from .test_readers import NOTHING, page_aligned

pytestmark = needs_aio
QUEUES = [32, 100, 512]


class PartialExecutor(InlineExecutor):
    """The kernel takes only this share of the reads, late; without any the call fails."""

    def __init__(self, share):
        super().__init__(deferred=True)
        self.share, syscall = share, self.syscall
        self.syscall = lambda number, context, count, pointers: (
            syscall(number, context, int(count * share), pointers) if share else -1
        )


class SlowExecutor(InlineExecutor):
    """Each call is made by a thread of its own, after `act(k)` for the k-th call, from 1; at first after a while."""

    def __init__(self, act=lambda k: time.sleep(0.001)):
        super().__init__()
        self.act, self.calls = act, 0

    def system_call(self, number):
        return SlowCall(self, number)


class SlowCall:
    def __init__(self, executor, number):
        self.executor, self.number = executor, number
        self.thread, self.result = None, 0

    def start(self, *arguments):
        self.executor.calls += 1
        self.thread = threading.Thread(target=self.work, args=(self.executor.calls, arguments))
        self.thread.start()
        return True

    def work(self, k, arguments):
        self.executor.act(k)
        self.result = self.executor.syscall(self.number, *arguments)

    def done(self):
        return self.thread is None or not self.thread.is_alive()

    def wait(self):
        if self.thread is not None:
            self.thread.join()
        return self.result


class NoExecutor(InlineExecutor):
    """Has no thread to spare."""

    def system_call(self, number):
        call = super().system_call(number)
        call.start = lambda *arguments: False
        return call


KINDS = {
    "inline": InlineExecutor,
    "late": lambda: InlineExecutor(deferred=True),
    "slow": SlowExecutor,
    "half": lambda: PartialExecutor(0.5),
    "none": lambda: PartialExecutor(0),
    "nobody": NoExecutor,
}


def open_wide(wide, executor, depth, aio=None):
    return AioReader([wide[0]], merging=NOTHING, depth=depth, executor=executor, aio=aio)


@pytest.mark.parametrize("depth", QUEUES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_the_same(wide, kind, depth):
    slab, other = page_aligned(300, 16384), page_aligned(300, 16384)
    with open_wide(wide, KINDS[kind](), depth) as reader:
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
        slab[:] = other[:] = 0xA5
        time.sleep(0.005)
        assert (slab == 0xA5).all() and (other == 0xA5).all(), "written to after all had ended"


@pytest.mark.parametrize("kind", KINDS)
def test_small_requests_one_after_the_other(wide, kind):
    slabs = [page_aligned(30, 16384) for _ in range(6)]
    with open_wide(wide, KINDS[kind](), 4096) as reader:
        ids = [IDS[30 * k : 30 * (k + 1)] for k in range(len(slabs))]
        requests = [submit(reader, slab, chosen) for slab, chosen in zip(slabs, ids, strict=True)]
        for k in (3, 0, 5, 1, 2, 4):
            assert requests[k].wait().reads == 120
            np.testing.assert_array_equal(slabs[k], wide[1][ids[k]])


def test_a_request_is_submitted_by_the_executor(wide):
    executor, aio = SlowExecutor(), WatchedAio()
    with open_wide(wide, executor, 512, aio) as reader:
        assert submit(reader, page_aligned(30, 16384), IDS[:30]).wait().reads == 120
        assert executor.calls == 1 and not aio.asked


def test_an_interrupt_while_another_thread_submits(wide):
    """What was lost is read again once that thread is done."""
    executor, aio = SlowExecutor(lambda k: time.sleep(0.03)), WatchedAio()
    slab, other = page_aligned(30, 16384), page_aligned(200, 16384)
    with open_wide(wide, executor, 4096, aio) as reader:
        for _ in range(3):
            first, second = submit(reader, slab, IDS[:30]), submit(reader, other, IDS[30:230])
            aio.interrupt_next("events")
            with pytest.raises(KeyboardInterrupt):
                first.wait()
            assert second.wait().reads == 800 and first.wait().reads == 120
            np.testing.assert_array_equal(slab, wide[1][IDS[:30]])
            np.testing.assert_array_equal(other, wide[1][IDS[30:230]])
            slab[:] = other[:] = 0xA5
            time.sleep(0.05)
            assert (slab == 0xA5).all() and (other == 0xA5).all()


def test_a_request_that_has_ended_does_not_wait_for_a_later_submission(wide):
    go_on, in_time = threading.Event(), []
    executor = SlowExecutor(lambda k: in_time.append(go_on.wait(5)) if k == 2 else None)
    with open_wide(wide, executor, 512) as reader:
        first = submit(reader, page_aligned(30, 16384), IDS[:30])
        second = submit(reader, page_aligned(30, 16384), IDS[30:60])
        time.sleep(0.05)  # the disk reads all of the first
        assert first.wait().reads == 120 and executor.calls == 2
        go_on.set()
        assert second.wait().reads == 120 and in_time == [True]


@pytest.mark.parametrize("kind", ["inline", "late", "slow"])
def test_drain_and_close_wait_until_nobody_submits(wide, kind):
    before = contexts()
    with open_wide(wide, KINDS[kind](), 100) as reader:
        slab = page_aligned(300, 16384)
        pending = submit(reader, slab)
        check_drained(reader, slab, wide[1], pending)
        with pytest.raises(ReadError, match="given up"):
            pending.wait()
        submit(reader, slab)
    slab[:] = 0xA5
    reader = open_wide(wide, KINDS[kind](), 100)
    submit(reader, slab)
    del reader
    gc.collect()
    slab[:] = 0xA5
    time.sleep(0.01)
    assert (slab == 0xA5).all() and contexts() == before


@pytest.mark.parametrize("kind", ["inline", "late", "slow", "half"])
def test_an_interrupt_at_any_step(file, kind):
    check_interrupts(file, 100, KINDS[kind]())


def test_a_lost_context_is_replaced(wide):
    with open_wide(wide, InlineExecutor(deferred=True), 64, aio := WatchedAio()) as reader:
        slab = page_aligned(300, 16384)
        pending = submit(reader, slab)
        assert aio.destroy(aio.context) == 0
        assert pending.wait().bytes == slab.nbytes
        np.testing.assert_array_equal(slab, wide[1][IDS])


FORKING = """
import os, sys
from tests.engine.storage.test_aio_interrupts import *
from mlx_flash.engine.backends.numpy.kernels.thread_pool import Workers
pool = Workers()
pool.count = 2
reader = AioReader([LayerFile(Path(sys.argv[1]), WIDE)], merging=NOTHING, depth=512, executor=pool)
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


def test_kernels_threads_submit_also_when_interrupted_and_not_in_a_forked_child(wide):
    pytest.importorskip("numba", reason="helpers live in compiled code")
    command = [sys.executable, "-c", FORKING, str(wide[0].path), "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "True", "True", "0"], done.stdout + done.stderr
