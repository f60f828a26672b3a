"""What AioReader promises beyond the protocol: the kernel reads, and whatever interrupts it, memory is safe."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.engine.storage import aio_reader as aio
from mlx_flash.engine.storage import linux_aio as aio_calls
from mlx_flash.engine.storage import pread_reader as pread
from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.engine.storage.reader import LayerFile, Target
from mlx_flash.errors import ReadError, UsageError

from .test_pread_reader import direct_alignment, spans_of
from .test_readers import ALIGNED, HAS_AIO, NOTHING, check, make_file, page_aligned

ROOT = Path(__file__).parents[3]
WIDE = Layout((Part("all", "uint8", 16384),), 300)
IDS = np.random.default_rng(3).permutation(300)
ROWS = np.arange(300)
APART = np.arange(0, 300, 2)  # each a read of its own

pytestmark = pytest.mark.skipif(not HAS_AIO, reason="this system has no asynchronous I/O")


@pytest.fixture
def file(tmp_path):
    """A layer of 300 bundles of 2 KiB that may be read directly, and its bundles."""
    made = make_file(tmp_path, ALIGNED)
    if direct_alignment(made[0].path) == 1:
        pytest.skip("this file system has no direct reads")
    return made


@pytest.fixture
def wide(tmp_path):
    """The same with bundles of 16 KiB: reading all of it takes milliseconds."""
    made = make_file(tmp_path, WIDE, "wide")
    if direct_alignment(made[0].path) == 1:
        pytest.skip("this file system has no direct reads")
    return made


class Watched(aio.Kernel):
    """The kernel, noting what it is asked for; `act(name, call)` may do something else than `call`."""

    act = staticmethod(lambda name, call: call())

    def __init__(self):
        super().__init__()
        self.asked, self.waits, self.in_flight, self.deepest = [], [], 0, 0

    def setup(self, events, context):
        return self.act("setup", lambda: super(Watched, self).setup(events, context))

    def submit(self, context, count, pointers):
        self.asked.append(count)
        taken = self.act("submit", lambda: super(Watched, self).submit(context, count, pointers))
        self.in_flight += max(0, taken)
        self.deepest = max(self.deepest, self.in_flight)
        return taken

    def events(self, context, at_least, most, into):
        self.waits.append(at_least)
        got = self.act("events", lambda: super(Watched, self).events(context, at_least, most, into))
        self.in_flight -= max(0, got)
        return got

    def destroy(self, context):
        self.in_flight = 0
        return self.act("destroy", lambda: super(Watched, self).destroy(context))


@pytest.fixture
def kernel(monkeypatch):
    """Every reader's kernel is a `Watched`; yields the class."""
    monkeypatch.setattr(aio, "Kernel", Watched)
    monkeypatch.setattr(Watched, "act", staticmethod(lambda name, call: call()))
    return Watched


@contextmanager
def no_preadv():
    """Whatever the threads read in here is a failure."""
    real = os.preadv

    def refuse(fd, buffers, offset):
        if offset >= DATA_START:
            raise AssertionError("read by a thread")
        return real(fd, buffers, offset)

    os.preadv = refuse
    try:
        yield
    finally:
        os.preadv = real


def submit(reader, slab, ids=IDS):
    return reader.submit(0, ids, ROWS[: len(ids)], [Target(0, slab)])


def contexts():
    return Path("/proc/self/maps").read_text().count("[aio]")


@pytest.mark.parametrize("merging", [NOTHING, Merging(), Merging(4096, 1e9, 8192)])
def test_the_kernel_reads_what_is_aligned(file, merging):
    with no_preadv(), AioReader([file[0]], merging=merging) as reader:
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)
        check(reader, 0, file[1], range(300), range(300), spans_of(ALIGNED, "gate"), 300)
        check(reader, 0, file[1], IDS[:50], ROWS[:50], spans_of(ALIGNED, "up", "down"), 50)
        check(reader, 0, file[1], [7, 9, 10], [2, 0, 1], spans_of(ALIGNED, "gate", "down"), 3)


def test_a_request_is_one_call(file, kernel):
    with AioReader([file[0]], merging=NOTHING) as reader:
        found = reader._context.kernel
        report = check(reader, 0, file[1], IDS[:200], ROWS[:200], [(0, 2048, 2048, 0)], 200)
        assert found.asked == [report.reads]


def test_a_request_that_is_longer_than_the_queue_takes_few_calls(wide, kernel):
    """Half of what may be in flight stays in flight while the thread sleeps."""
    with AioReader([wide[0]], depth=64, merging=NOTHING) as reader:
        found = reader._context.kernel
        report = check(reader, 0, wide[1], IDS, ROWS, [(0, 16384, 16384, 0)], 300)
        assert found.asked[0] == 64 and sum(found.asked) == report.reads
        assert all(32 <= waited <= 64 for waited in found.waits[:-1]) and len(found.waits) <= 1 + -(-(1200 - 64) // 32)


def test_long_reads_are_begun_two_at_a_time(wide, kernel):
    with no_preadv(), AioReader([wide[0]]) as reader:
        report = check(reader, 0, wide[1], range(300), range(300), [(0, 16384, 16384, 0)], 300)
        assert report.reads == 5 and reader._context.kernel.asked == [2, 2, 1]


def test_threads_read_what_is_not_aligned(tmp_path, file, kernel):
    layout = Layout((Part("a", "uint8", 700), Part("b", "uint8", 836)), 30)
    odd = make_file(tmp_path, layout, "odd")
    with AioReader([file[0], odd[0]], merging=NOTHING) as reader:
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 8)], 300)
        check(reader, 1, odd[1], range(0, 30, 2), range(15), spans_of(layout, "b"), 15)
        assert not reader._context.kernel.asked
        # Bundle by bundle, in one request: some of its rows lie well, others do not.
        rows = page_aligned(1, 40 * 2049)[0].reshape(40, 2049)[:, :2048]
        ids = np.arange(0, 80, 2)
        reader.submit(0, ids, np.arange(40), [Target(0, rows)]).wait()
        np.testing.assert_array_equal(rows, file[1][ids])
        assert reader._context.kernel.asked == [1]


def test_threads_read_what_goes_through_the_page_cache(file, kernel):
    """The kernel would read it within `submit`."""
    with AioReader([file[0]], direct=False) as reader:
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)
        assert not reader._context.kernel.asked


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_no_more_than_depth_is_in_flight(file, kernel, depth):
    with AioReader([file[0]], depth=depth, merging=NOTHING) as reader:
        slabs = [page_aligned(300, 2048) for _ in range(3)]
        pending = [submit(reader, slab) for slab in slabs]
        for each in reversed(pending):
            each.wait()
        assert reader._context.kernel.deepest == depth
        for slab in slabs:
            np.testing.assert_array_equal(slab, file[1][IDS])


def test_what_is_given_up_is_not_begun(wide, kernel):
    with AioReader([wide[0]], depth=4, merging=NOTHING) as reader:
        slab = page_aligned(300, 16384)
        pending = submit(reader, slab)
        pending.give_up()
        with pytest.raises(ReadError, match=f"{wide[0].path}, layer 0, bundle .* given up"):
            pending.wait()
        assert reader._context.kernel.asked == [4]


def test_a_kernel_that_takes_little(file, kernel, monkeypatch):
    """It may take a few reads only, or none while it is busy, and any call may be interrupted."""
    rng = random.Random(1)

    def act(name, call):
        return -errno.EINTR if name in ("submit", "events") and rng.random() < 0.2 else call()

    def few(self, context, count, pointers):
        if self.in_flight and rng.random() < 0.3:
            return -errno.EAGAIN
        return real(self, context, min(count, rng.randint(1, 9)), pointers)

    real = kernel.submit
    monkeypatch.setattr(kernel, "submit", few)
    with no_preadv(), AioReader([file[0]], depth=32, merging=NOTHING) as reader:
        monkeypatch.setattr(kernel, "act", staticmethod(act))
        for _ in range(5):
            check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)


@pytest.mark.parametrize("broken", ["submit", "events", "setup"])
@pytest.mark.parametrize("problem", [errno.EAGAIN, errno.EPERM, errno.EINVAL])
def test_threads_take_over_from_a_kernel_that_refuses(file, kernel, monkeypatch, broken, problem):
    calls = []

    def act(name, call):
        calls.append(name)
        return -problem if name == broken else call()

    with AioReader([file[0]], merging=NOTHING) as reader:
        monkeypatch.setattr(kernel, "act", staticmethod(act))
        reader._context.torn = True  # as after an interrupt: a new context is asked for
        for _ in range(2):
            check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)
            slab = page_aligned(300, 2048)
            pending = submit(reader, slab)
            while not pending.ended():
                time.sleep(0.001)
            np.testing.assert_array_equal(slab, file[1][IDS])
        assert calls.count(broken) < 20


def spoil(kernel, monkeypatch, bundle, result):
    """The read of this bundle, a piece by itself, ends with `result`, and nothing of it in memory."""
    spoiled = []

    def act(name, call):
        got = call()
        if name == "events":
            for context in aio._contexts:
                for event in context.events[: max(0, got)]:
                    request, piece = context.requests.get(int(event[0]) >> 32), int(event[0]) & 0xFFFFFFFF
                    if request is None:
                        continue
                    plan = request.plan
                    if plan.start[piece] == DATA_START + bundle * 2048 and not spoiled:
                        missing = int(plan.end[piece] - plan.start[piece]) - max(0, result)
                        place = int(plan.address[plan.first[piece]]) + max(0, result)
                        aio.ctypes.memset(place, 0xEE, missing)
                        event[2] = result
                        spoiled.append(bundle)
        return got

    monkeypatch.setattr(kernel, "act", staticmethod(act))
    return spoiled


@pytest.mark.parametrize("result", [0, 512, 700, -errno.EIO, -errno.EAGAIN, -errno.EINTR, -errno.EINVAL])
def test_what_ended_short_is_read_on(file, kernel, monkeypatch, result):
    spoiled = spoil(kernel, monkeypatch, 40, result)
    with AioReader([file[0]], merging=NOTHING) as reader:
        report = check(reader, 0, file[1], APART, ROWS[:150], [(0, 2048, 2048, 0)], 150)
        assert spoiled and report.bytes == 150 * 2048 and report.reads == 150


@pytest.mark.parametrize("bundle", [0, 120, 298])
def test_what_ended_short_among_many_that_did_not(file, kernel, monkeypatch, bundle):
    """In whichever of several batches."""
    spoiled = spoil(kernel, monkeypatch, bundle, 512)
    with AioReader([file[0]], merging=NOTHING, depth=16) as reader:
        report = check(reader, 0, file[1], APART, ROWS[:150], [(0, 2048, 2048, 0)], 150)
        assert spoiled and report.bytes == 150 * 2048 and report.reads == 150


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_while_it_is_noted_what_was_read(file, kernel, monkeypatch, at):
    """1: the whole ones; 2: the one that threads are to read on."""
    calls = []

    def read(request, which):
        calls.append(which)
        if len(calls) != at:
            return real(request, which)
        request.unread[which] = False
        raise KeyboardInterrupt

    real = aio._Request._read
    spoil(kernel, monkeypatch, 40, 512)
    monkeypatch.setattr(aio._Request, "_read", read)
    with AioReader([file[0]], merging=NOTHING) as reader:
        slab = page_aligned(150, 2048)
        pending = submit(reader, slab, APART)
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
        assert pending.wait().reads == 150
        np.testing.assert_array_equal(slab, file[1][APART])


def test_requests_of_all_kinds_in_turn(file):
    """What the kernel is told of one must not be left over for the next."""
    whole, gate = [(0, 2048, 2048, 0)], spans_of(ALIGNED, "gate")
    kinds = [(APART, whole), (APART, gate), (IDS[:100], spans_of(ALIGNED, "gate", "down")), (np.arange(290), whole)]
    with no_preadv(), AioReader([file[0]], merging=Merging(512, 9, 8192)) as reader:
        for first in kinds:
            for second in kinds:
                for ids, spans in (first, second):
                    check(reader, 0, file[1], ids, ROWS[: len(ids)], spans, 300)


def test_an_interrupt_before_threads_know_what_to_read_on(file, kernel, monkeypatch):
    def interrupt(crew, job):
        monkeypatch.setattr(pread.Crew, "start", real)
        raise KeyboardInterrupt

    real = pread.Crew.start
    spoil(kernel, monkeypatch, 40, 512)
    with AioReader([file[0]], merging=NOTHING) as reader:
        slab = page_aligned(150, 2048)
        pending = submit(reader, slab, APART)
        monkeypatch.setattr(pread.Crew, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
        assert pending.wait().reads == 150
        np.testing.assert_array_equal(slab, file[1][APART])


def test_a_disk_error_is_told_when_nothing_is_in_flight(file, kernel, monkeypatch):
    failed = threading.Event()

    def fail(fd, buffers, offset):
        if offset >= DATA_START:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    def submit_later(self, context, count, pointers):
        if spoiled:
            failed.wait(5)
            time.sleep(0.01)
        return real_submit(self, context, count, pointers)

    real, real_submit = os.preadv, kernel.submit
    spoiled = spoil(kernel, monkeypatch, 40, -errno.EIO)
    monkeypatch.setattr(kernel, "submit", submit_later)
    monkeypatch.setattr(os, "preadv", fail)
    with AioReader([file[0]], merging=NOTHING, depth=8) as reader:
        pending = submit(reader, page_aligned(300, 2048), APART[20:])
        for _ in range(2):
            with pytest.raises(ReadError, match=rf"{file[0].path}, layer 0, bundle 40: Input/output error"):
                pending.wait()
        assert not reader._context.in_flight and pending.ended()
        assert sum(reader._context.kernel.asked) < 60, "the rest should not have been read"
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)


def test_of_several_errors_the_first_in_the_file_is_told(file):
    with AioReader([file[0]], merging=NOTHING) as reader:
        os.truncate(file[0].path, DATA_START + 90 * 2048 + 100)
        pending = submit(reader, page_aligned(300, 2048))
        with pytest.raises(ReadError, match=r"bundle 90: .* ends at byte"):
            pending.wait()


def test_closing_gives_the_context_back(file):
    before = contexts()
    reader = AioReader([file[0]])
    assert contexts() == before + 1
    slab = page_aligned(300, 2048)
    pending = submit(reader, slab)
    reader.close()
    assert contexts() == before and aio._contexts.isdisjoint({reader._context})
    with pytest.raises(ReadError, match="given up"):
        pending.wait()
    assert pending.ended()
    reader.drain()
    reader.close()
    with pytest.raises(UsageError, match="closed"):
        submit(reader, slab)


@pytest.mark.parametrize("kept", ["nothing", "pending"])
def test_a_reader_that_is_forgotten_lets_go_of_memory(wide, kept):
    before = contexts()
    slab = page_aligned(300, 16384)
    reader = AioReader([wide[0]], merging=NOTHING)
    pending = submit(reader, slab)
    if kept == "nothing":
        del pending
    del reader
    gc.collect()
    slab[:] = 0xA5
    assert contexts() == before
    time.sleep(0.02)
    assert (slab == 0xA5).all(), "written to after the reader was gone"
    if kept == "pending":
        with pytest.raises(ReadError, match="given up"):
            pending.wait()


def check_drained(reader, slab, bundles, pending=None):
    """Drain: nothing is written any more, and the reader reads on."""
    reader.drain()
    slab[:] = 0xA5
    if pending is not None and not pending.ended():
        raise AssertionError("drained, and not ended")
    check(reader, 0, bundles, range(3), range(3), [(0, bundles.shape[1], bundles.shape[1], 0)], 3)
    time.sleep(0.005)
    assert (slab == 0xA5).all(), "written to after it was drained"


def test_drain_ends_what_is_in_flight(wide):
    with AioReader([wide[0]], depth=100, merging=NOTHING) as reader:
        slab = page_aligned(300, 16384)
        for _ in range(3):
            pending = submit(reader, slab)
            check_drained(reader, slab, wide[1], pending)
            with pytest.raises(ReadError, match="given up"):
                pending.wait()


@pytest.mark.parametrize("name", ["submit", "events", "destroy", "setup"])
@pytest.mark.parametrize("repeat", ["wait", "drain"])
def test_what_a_system_call_returned_may_be_lost(wide, kernel, monkeypatch, name, repeat):
    """Ctrl-C just after the 1st, 2nd, 3rd ... call, until a run passes."""
    for at in range(1, 100):
        left, lost = at, False

        def act(call_name, call):
            nonlocal left, lost
            result = call()
            left -= call_name == name
            if not left and not lost:
                lost = True
                raise KeyboardInterrupt
            return result

        with AioReader([wide[0]], depth=100, merging=NOTHING) as reader:
            slab, pending = page_aligned(300, 16384), None
            if name in ("destroy", "setup"):
                reader._context.torn = True
            monkeypatch.setattr(kernel, "act", staticmethod(act))
            try:
                pending = submit(reader, slab)
                pending.wait()
            except KeyboardInterrupt:
                if repeat == "wait" and pending is not None:
                    pending.wait()
                    np.testing.assert_array_equal(slab, wide[1][IDS])
                check_drained(reader, slab, wide[1], pending)
            monkeypatch.setattr(kernel, "act", staticmethod(lambda name, call: call()))
        if not lost:
            break
    assert 1 < at < 100


class Interrupt:
    """Raises KeyboardInterrupt at one line or bytecode run by the package's readers, the `at`-th; counts them."""

    FILES = (aio.__file__, aio_calls.__file__, pread.__file__)

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


def read_and_drain(reader, slab, at):
    """(steps, pending) of a request that is read in two goes and given up in the third, interrupted at step `at`."""
    pending = None
    with Interrupt(at) as interrupt:
        try:
            pending = submit(reader, slab)
            pending.ended()
            pending.wait()
            pending = submit(reader, slab)
            pending.give_up()
            reader.drain()
        except KeyboardInterrupt:
            pass
    return interrupt.count, pending


def check_interrupts(file, samples, aside=None):
    """All steps of a request, of `wait` and of `drain`, one interrupt each, a sample of them."""
    slab = page_aligned(300, 2048)
    with AioReader([file[0]], depth=64, merging=NOTHING, aside=aside) as reader:
        submit(reader, slab).wait()
        steps, _ = read_and_drain(reader, slab, -1)
        for at in random.Random(4).sample(range(1, steps), min(steps - 1, samples)):
            _, pending = read_and_drain(reader, slab, at)
            try:
                if pending is not None:
                    pending.wait()
                    np.testing.assert_array_equal(slab, file[1][IDS])
            except ReadError as error:
                assert "given up" in str(error) and pending.given_up
            reader.drain()
            slab[:] = 0xA5
            check(reader, 0, file[1], range(0, 300, 7), range(43), [(0, 2048, 2048, 0)], 43)
            assert (slab == 0xA5).all(), f"written to after an interrupt at step {at}"
            context = reader._context
            assert context.in_flight == 0 and not context.torn and context._begun is None
    assert steps > 150


def test_an_interrupt_at_any_step(file):
    check_interrupts(file, 150)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a file's __del__
def test_an_interrupt_while_it_is_closed_or_forgotten(file):
    before = contexts()
    for at in range(1, 3000, 67):
        reader, slab = AioReader([file[0]], threads=1, merging=NOTHING), page_aligned(300, 2048)
        submit(reader, slab)
        with Interrupt(at) as interrupt, suppress(KeyboardInterrupt):
            reader.close()
        del reader
        gc.collect()
        slab[:] = 0xA5
        assert contexts() == before
        if interrupt.count < at:
            break
    assert 50 < at < 2900


def test_a_context_that_somebody_else_destroyed(wide):
    """What an interrupted reader believes to be its own may be another's by now."""
    with AioReader([wide[0]], merging=NOTHING, depth=64) as reader:
        slab = page_aligned(300, 16384)
        for when in ("before", "after"):
            if when == "after":
                pending = submit(reader, slab)
            assert reader._context.kernel.destroy(reader._context._name.value) == 0
            if when == "before":
                pending = submit(reader, slab)
            assert pending.wait().bytes == slab.nbytes
            np.testing.assert_array_equal(slab, wide[1][IDS])
            slab[:] = 0


def read_under_signals(path, seconds, raising):
    """(signals, wrong replies): one reader, signals at random moments."""
    signals = wrong = 0

    def handle(*_):
        nonlocal signals
        signals += 1
        if raising:
            raise KeyboardInterrupt

    file, bundles = LayerFile(Path(path), WIDE), None
    slab, rng = page_aligned(300, 16384), random.Random(1)
    reader = AioReader([file], merging=NOTHING, depth=100)
    submit(reader, slab).wait()
    bundles = slab.copy()
    signal.signal(signal.SIGALRM, handle)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0003, 0.02), 0 if raising else 0.001)
        try:
            slab[:] = 0
            submit(reader, slab).wait()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            reader.drain()
            slab[:] = 0xA5
            submit(reader, page_aligned(300, 16384)).wait()
            wrong += not (slab == 0xA5).all()
        else:
            wrong += not np.array_equal(slab, bundles)
    signal.setitimer(signal.ITIMER_REAL, 0)
    submit(reader, slab)  # and ends with reads in flight
    return signals, wrong


@pytest.mark.parametrize("raising", [True, False])
def test_signals_at_random_moments(wide, raising):
    """In a process of its own: one that hangs can be ended."""
    code = (
        "import sys; from tests.engine.storage.test_aio_reader import *\n"
        f"print(*read_under_signals(sys.argv[1], 1.5, {raising}))"
    )
    command = [sys.executable, "-c", code, str(wide[0].path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    signals, wrong = map(int, done.stdout.split())
    assert signals > 5 and wrong == 0


def test_a_forked_child_is_told(wide):
    """Its parent's context is not there. The child reports by its exit status."""
    code = """
import os, sys
from tests.engine.storage.test_aio_reader import *
reader, slab = AioReader([LayerFile(Path(sys.argv[1]), WIDE)], merging=NOTHING, depth=50), page_aligned(300, 16384)
submit(reader, slab).wait()
whole = slab.copy()
under_way = submit(reader, slab)
child = os.fork()
if not child:
    told = 0
    for pending in (under_way, submit(reader, slab)):
        assert pending.ended()
        try:
            pending.wait()
        except ReadError as error:
            told += "forked" in str(error)
    reader.drain()
    reader.close()
    del reader, pending, under_way
    gc.collect()
    os._exit(told)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
slab[:] = 0
print(status, under_way.wait().reads, submit(reader, slab).wait().reads, np.array_equal(slab, whole))
"""
    command = [sys.executable, "-c", code, str(wide[0].path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["2", "1200", "1200", "True"], done.stderr


@pytest.mark.parametrize(("name", "value"), [("machine", "riscv64"), ("platform", "darwin")])
def test_other_systems_have_none(monkeypatch, name, value):
    if name == "machine":
        monkeypatch.setattr(aio_calls.platform, "machine", lambda: value)
    else:
        monkeypatch.setattr(aio_calls.sys, "platform", value)
    before = len(aio._contexts)
    with pytest.raises(OSError):
        AioReader([])
    assert len(aio._contexts) == before


def test_a_wrong_depth_is_refused():
    with pytest.raises(ValueError):
        AioReader([], depth=0)
