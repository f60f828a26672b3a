"""What PreadReader promises beyond the protocol: few reads, around the page cache, and failing well."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from mlx_flash.engine.storage import pread_reader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part
from mlx_flash.engine.storage.pread_reader import PreadReader
from mlx_flash.engine.storage.read_plan import Merging, pieces, segments
from mlx_flash.engine.storage.reader import ReadReport, Target
from mlx_flash.errors import ReadError, UsageError

from .test_readers import ALIGNED, NOTHING, READERS, check, make_file, page_aligned, spans_of

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")


class Calls:
    """Stands in for os.preadv: notes every call, and lets a test decide how it ends."""

    def __init__(self, monkeypatch, act=None):
        self.real, self.act, self.calls, self.lock = os.preadv, act, [], threading.Lock()
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd, buffers, offset):
        if offset < DATA_START:  # the probe for alignment
            return self.real(fd, buffers, offset)
        with self.lock:
            self.calls.append((offset, [len(buffer) for buffer in buffers]))
            number = len(self.calls)
        return self.real(fd, buffers, offset) if self.act is None else self.act(self, number, fd, buffers, offset)


def test_whole_runs_are_few_long_reads(tmp_path, monkeypatch):
    layout = Layout((Part("all", "uint8", 18432),), 300)
    file, bundles = make_file(tmp_path, layout)
    calls = Calls(monkeypatch)
    with PreadReader([file]) as reader:
        report = check(reader, 0, bundles, range(20, 276), range(256), [(0, 18432, 18432, 0)], 256)
    assert report == ReadReport(256 * 18432, 5)
    lengths = [n for _, buffers in sorted(calls.calls) for n in buffers]
    assert lengths == [1 << 20] * 4 + [256 * 18432 - (4 << 20)]


def test_near_neighbours_are_one_read(tmp_path, monkeypatch):
    file, bundles = make_file(tmp_path, ALIGNED)
    calls = Calls(monkeypatch)
    spans = spans_of(ALIGNED, "up", "down")
    with PreadReader([file], merging=Merging(512, 1.0)) as reader:
        report = check(reader, 0, bundles, [12, 10, 11, 14], [5, 0, 2, 1], spans, 6)
    assert report.reads == 2 and report.bytes == (3 * 2048 - 512) + 1536
    assert sorted(calls.calls) == [
        (DATA_START + 10 * 2048 + 512, [1024, 512, 512, 1024, 512, 512, 1024, 512]),
        (DATA_START + 14 * 2048 + 512, [1024, 512]),
    ]
    calls.calls.clear()
    with PreadReader([file], merging=Merging(511, 1.0)) as reader:
        assert check(reader, 0, bundles, [12, 10, 11, 14], [5, 0, 2, 1], spans, 6).reads == 4


def test_one_part_of_a_whole_layer_is_a_few_long_reads(tmp_path):
    file, bundles = make_file(tmp_path, ALIGNED)
    with PreadReader([file]) as reader:
        report = check(reader, 0, bundles, range(300), range(300), spans_of(ALIGNED, "gate"), 300)
        assert report == ReadReport(300 * 2048 - 1536, 1)
        report = check(reader, 0, bundles, [0, 1, 2, 3, 9], range(5), spans_of(ALIGNED, "gate"), 5)
        assert report == ReadReport(5 * 512, 5)


def test_more_buffers_than_one_read_may_name(tmp_path, monkeypatch):
    layout = Layout((Part("a", "uint8", 1), Part("b", "uint8", 2), Part("c", "uint8", 3)), 3000)
    file, bundles = make_file(tmp_path, layout)
    calls = Calls(monkeypatch)
    with PreadReader([file], merging=Merging(piece_bytes=1 << 30), direct=False) as reader:
        check(reader, 0, bundles, range(3000), range(2999, -1, -1), spans_of(layout, "a", "c"), 3000)
    assert len(calls.calls) < 20 and max(len(buffers) for _, buffers in calls.calls) <= 1024


def test_unaligned_extents_are_read_aligned(tmp_path, monkeypatch):
    layout = Layout((Part("a", "uint8", 700), Part("b", "uint8", 700)), 30)
    file, bundles = make_file(tmp_path, layout)
    align = pread_reader.OpenFile(file.path, True).align
    calls = Calls(monkeypatch)
    with PreadReader([file], merging=NOTHING) as reader:
        report = check(reader, 0, bundles, [20, 9], [0, 1], spans_of(layout, "b"), 2)
    assert len(calls.calls) == 2
    if align > 1:
        for offset, lengths in calls.calls:
            assert offset % align == 0 and len(lengths) == 1 and lengths[0] % align == 0
        assert report.bytes == sum(lengths[0] for _, lengths in calls.calls)


def short_reads(calls, number, fd, buffers, offset):
    """At most 1 to 700 bytes, ending within a buffer or between two."""
    count = min(1 + number * 137 % 700, sum(map(len, buffers)))
    with open(calls.path, "rb") as file:
        file.seek(offset)
        data = file.read(count)
    for buffer in buffers:
        part, data = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(part)] = part
    return count


def is_direct(fd):
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


@pytest.mark.parametrize("name", ["direct", "direct-merged", "buffered"])
def test_short_reads_are_continued(tmp_path, monkeypatch, name):
    file, bundles = make_file(tmp_path, ALIGNED)
    Calls(monkeypatch, short_reads).path = file.path
    with READERS[name]([file], []) as reader:
        check(reader, 0, bundles, [1, 2, 3, 9, 50, 49], [0, 1, 2, 5, 4, 3], spans_of(ALIGNED, "gate", "down"), 6)


def test_interrupted_reads_are_continued(tmp_path, monkeypatch):
    def interrupt(calls, number, fd, buffers, offset):
        if number % 3:
            raise InterruptedError
        return calls.real(fd, buffers, offset)

    file, bundles = make_file(tmp_path, ALIGNED)
    Calls(monkeypatch, interrupt)
    with PreadReader([file]) as reader:
        check(reader, 0, bundles, [1, 2, 9, 50], [0, 1, 2, 3], spans_of(ALIGNED, "up"), 4)


def test_a_refused_direct_read_is_read_buffered(tmp_path, monkeypatch):
    def refuse(calls, number, fd, buffers, offset):
        if is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return calls.real(fd, buffers, offset)

    file, bundles = make_file(tmp_path, ALIGNED)
    Calls(monkeypatch, refuse)
    with PreadReader([file]) as reader:
        check(reader, 0, bundles, range(0, 60, 20), range(3), [(0, 2048, 2048, 0)], 3)


def test_no_direct_reads_at_all(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **more)

    file, bundles = make_file(tmp_path, ALIGNED)
    monkeypatch.setattr(os, "open", refuse)
    with PreadReader([file]) as reader:
        check(reader, 0, bundles, range(60), range(60), spans_of(ALIGNED, "up"), 60)


@pytest.mark.parametrize("fail_at", [1, 2, 5, 20])
def test_an_error_ends_after_every_read_has(tmp_path, monkeypatch, fail_at):
    under_way = []

    def fail(calls, number, fd, buffers, offset):
        if number == fail_at:
            raise OSError(errno.EIO, "Input/output error")
        under_way.append(number)
        time.sleep(0.02)
        got = calls.real(fd, buffers, offset)
        under_way.remove(number)
        return got

    file, bundles = make_file(tmp_path, ALIGNED)
    calls = Calls(monkeypatch, fail)
    with PreadReader([file], threads=4, merging=NOTHING) as reader:
        ids = np.arange(0, 60, 3)
        pending = reader.submit(0, ids, np.arange(20), [Target(0, page_aligned(20, 2048))])
        with pytest.raises(ReadError, match=rf"{file.path}, layer 0, bundle \d+: Input/output error") as caught:
            pending.wait()
        assert not under_way
        failed = (calls.calls[fail_at - 1][0] - DATA_START) // 2048
        assert f"bundle {failed}:" in str(caught.value)
        with pytest.raises(ReadError, match=f"bundle {failed}:"):
            pending.wait()
        assert len(calls.calls) < 20 or fail_at == 20, "the rest should not have been read"
        calls.act = None
        check(reader, 0, bundles, ids, range(20), [(0, 2048, 2048, 0)], 20)


def test_of_several_errors_the_first_in_the_file_is_told(tmp_path, monkeypatch):
    barrier = threading.Barrier(2, timeout=10)

    def fail(calls, number, fd, buffers, offset):
        barrier.wait()
        raise OSError(errno.EIO, "Input/output error")

    file, _ = make_file(tmp_path, ALIGNED)
    Calls(monkeypatch, fail)
    with PreadReader([file], threads=2, merging=NOTHING) as reader:
        ids = np.array([90, 30])
        pending = reader.submit(0, ids, np.arange(2), [Target(0, page_aligned(2, 2048))])
        with pytest.raises(ReadError, match="bundle 30:"):
            pending.wait()


def test_an_error_skips_only_what_comes_after_it_in_the_file(tmp_path, monkeypatch):
    """However the threads take turns, the first error is told."""

    def fail(calls, number, fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    file, _ = make_file(tmp_path, ALIGNED)
    calls = Calls(monkeypatch, fail)
    targets = [Target(0, page_aligned(3, 2048))]
    plan = pieces(segments(ALIGNED, np.array([30, 60, 90]), np.arange(3), targets), targets, NOTHING, 512)
    job = pread_reader.ReadJob(
        pread_reader.OpenFile(file.path, True, [file]), plan, targets, memoryview(b""), [1, 2, 0]
    )
    job.work()
    with pytest.raises(ReadError, match="bundle 30:"):
        job.wait()
    assert len(calls.calls) == 2


def test_files_are_opened_once(tmp_path, monkeypatch):
    file, bundles = make_file(tmp_path, ALIGNED)
    with PreadReader([file]) as reader:
        check(reader, 0, bundles, [1], [0], [(0, 2048, 2048, 0)], 1)
        opened = []
        real = os.open
        monkeypatch.setattr(os, "open", lambda *rest: opened.append(rest) or real(*rest))
        check(reader, 0, bundles, [2], [0], [(0, 2048, 2048, 0)], 1)
        assert not opened
    reader.close()
    with pytest.raises(UsageError, match="closed"):
        reader.submit(0, np.array([0]), np.array([0]), [Target(0, page_aligned(1, 2048))])


def test_drain_ends_what_an_interrupted_submit_began(tmp_path, monkeypatch):
    """Afterwards nothing is written to the rows, and the reader reads on."""
    slow = threading.Event()

    def delay(calls, number, fd, buffers, offset):
        time.sleep(0.02)
        return calls.real(fd, buffers, offset)

    class Interrupted(SimpleQueue):
        def put(self, job):
            if not slow.is_set():
                slow.set()
                raise KeyboardInterrupt
            super().put(job)

    file, bundles = make_file(tmp_path, ALIGNED)
    calls = Calls(monkeypatch, delay)
    monkeypatch.setattr(pread_reader, "SimpleQueue", Interrupted)
    with PreadReader([file], threads=2, merging=NOTHING) as reader:
        slab, request = page_aligned(20, 2048), (0, np.arange(0, 60, 3), np.arange(20))
        with pytest.raises(KeyboardInterrupt):
            reader.submit(*request, [Target(0, slab)])
        pending = reader.submit(*request, [Target(0, slab)])
        while len(calls.calls) < 2:
            time.sleep(0.001)
        reader.drain()
        after, made = slab.copy(), len(calls.calls)
        time.sleep(0.1)
        np.testing.assert_array_equal(slab, after)
        assert len(calls.calls) == made < 20
        with pytest.raises(ReadError, match="given up"):
            pending.wait()
        check(reader, 0, bundles, range(3), range(3), [(0, 2048, 2048, 0)], 3)


def test_a_wait_that_was_interrupted_may_be_repeated(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    def delay(calls, number, fd, buffers, offset):
        time.sleep(0.2)
        return calls.real(fd, buffers, offset)

    file, bundles = make_file(tmp_path, ALIGNED)
    Calls(monkeypatch, delay)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with PreadReader([file]) as reader:
            slab = page_aligned(1, 2048)
            pending = reader.submit(0, np.array([4]), np.array([0]), [Target(0, slab)])
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                pending.wait()
            for _ in range(2):
                assert pending.wait() == ReadReport(2048, 1)
            np.testing.assert_array_equal(slab[0], bundles[4])
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_told(tmp_path):
    """Its parent's threads are not there: a read would never end. The child reports by its exit status."""
    file, _ = make_file(tmp_path, ALIGNED)
    code = f"""
import os, sys, threading
import numpy as np
from pathlib import Path
from mlx_flash.errors import ReadError
from mlx_flash.engine.storage.reader import LayerFile, Target
from mlx_flash.engine.storage.pread_reader import PreadReader
from tests.engine.storage.test_readers import ALIGNED
real = os.preadv
reader = PreadReader([LayerFile(Path({str(file.path)!r}), ALIGNED)])
request = (0, np.array([2]), np.array([0]), [Target(0, np.empty((1, 2048), np.uint8))])
reader.submit(*request).wait()
held = threading.Event()
os.preadv = lambda *rest: held.wait() and real(*rest)
under_way = reader.submit(*request)
child = os.fork()
if not child:
    told = 0
    for pending in (under_way, reader.submit(*request)):
        try:
            pending.wait()
        except ReadError as error:
            told += "forked" in str(error)
    reader.close()
    os._exit(told)
held.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), under_way.wait().reads)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["2", "1"], done.stderr


def test_a_reader_that_is_forgotten_gives_its_files_and_threads_back(tmp_path):
    file, bundles = make_file(tmp_path, ALIGNED)

    def held():
        named = [thread for thread in threading.enumerate() if thread.name.startswith("mlx_flash-read")]
        return sum(not dead(fd) for fd in range(256)), len(named)

    def dead(fd):
        try:
            os.fstat(fd)
        except OSError:
            return True
        return False

    gc.collect()
    before = held()
    reader = PreadReader([file])
    check(reader, 0, bundles, [2], [0], [(0, 2048, 2048, 0)], 1)
    assert held() > before
    del reader
    gc.collect()
    deadline = time.monotonic() + 5
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() == before


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, *({"merging": Merging(*each)} for each in ((-1,), (0, -0.1), (0, 0, 0), (0, 0, 4097)))]
)
def test_pread_reader_refuses_wrong_options(wrong):
    with pytest.raises(ValueError):
        PreadReader([], **wrong)
