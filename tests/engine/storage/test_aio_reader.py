"""What AioReader promises beyond the protocol: the kernel reads in few calls, and lets go of memory at the end."""

from __future__ import annotations

import gc
import os
import time
from contextlib import contextmanager

import numpy as np
import pytest

from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.engine.storage.reader import Target
from mlx_flash.errors import ReadError, UsageError

from .aio import APART, IDS, ROWS, WatchedAio, contexts, needs_aio, submit
from .test_readers import ALIGNED, NOTHING, check, make_file, page_aligned, spans_of

pytestmark = needs_aio


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


@pytest.mark.parametrize("merging", [NOTHING, Merging(), Merging(4096, 1e9, 8192)])
def test_the_kernel_reads_what_is_aligned(file, merging):
    with no_preadv(), AioReader([file[0]], merging=merging) as reader:
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)
        check(reader, 0, file[1], range(300), range(300), spans_of(ALIGNED, "gate"), 300)
        check(reader, 0, file[1], IDS[:50], ROWS[:50], spans_of(ALIGNED, "up", "down"), 50)
        check(reader, 0, file[1], [7, 9, 10], [2, 0, 1], spans_of(ALIGNED, "gate", "down"), 3)


def test_a_request_is_one_call(file):
    with AioReader([file[0]], merging=NOTHING, aio=(aio := WatchedAio())) as reader:
        report = check(reader, 0, file[1], IDS[:200], ROWS[:200], [(0, 2048, 2048, 0)], 200)
        assert aio.asked == [report.reads]


def test_a_request_that_is_longer_than_the_queue_takes_few_calls(wide):
    """Half of what may be in flight stays in flight while the thread sleeps."""
    with AioReader([wide[0]], depth=64, merging=NOTHING, aio=(aio := WatchedAio())) as reader:
        report = check(reader, 0, wide[1], IDS, ROWS, [(0, 16384, 16384, 0)], 300)
        assert aio.asked[0] == 64 and sum(aio.asked) == report.reads
        assert all(32 <= waited <= 64 for waited in aio.waits[:-1]) and len(aio.waits) <= 1 + -(-(1200 - 64) // 32)


def test_long_reads_are_begun_two_at_a_time(wide):
    with no_preadv(), AioReader([wide[0]], aio=(aio := WatchedAio())) as reader:
        report = check(reader, 0, wide[1], range(300), range(300), [(0, 16384, 16384, 0)], 300)
        assert report.reads == 5 and aio.asked == [2, 2, 1]


def test_threads_read_what_is_not_aligned(tmp_path, file):
    layout = Layout((Part("a", "uint8", 700), Part("b", "uint8", 836)), 30)
    odd = make_file(tmp_path, layout, "odd")
    with AioReader([file[0], odd[0]], merging=NOTHING, aio=(aio := WatchedAio())) as reader:
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 8)], 300)
        check(reader, 1, odd[1], range(0, 30, 2), range(15), spans_of(layout, "b"), 15)
        assert not aio.asked
        # Bundle by bundle, in one request: some of its rows lie well, others do not.
        rows = page_aligned(1, 40 * 2049)[0].reshape(40, 2049)[:, :2048]
        ids = np.arange(0, 80, 2)
        reader.submit(0, ids, np.arange(40), [Target(0, rows)]).wait()
        np.testing.assert_array_equal(rows, file[1][ids])
        assert aio.asked == [1]


def test_threads_read_what_goes_through_the_page_cache(file):
    """The kernel would read it within `submit`."""
    with AioReader([file[0]], direct=False, aio=(aio := WatchedAio())) as reader:
        check(reader, 0, file[1], IDS, ROWS, [(0, 2048, 2048, 0)], 300)
        assert not aio.asked


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_no_more_than_depth_is_in_flight(file, depth):
    with AioReader([file[0]], depth=depth, merging=NOTHING, aio=(aio := WatchedAio())) as reader:
        slabs = [page_aligned(300, 2048) for _ in range(3)]
        pending = [submit(reader, slab) for slab in slabs]
        for each in reversed(pending):
            each.wait()
        assert aio.deepest == depth
        for slab in slabs:
            np.testing.assert_array_equal(slab, file[1][IDS])


def test_what_is_given_up_is_not_begun(wide):
    with AioReader([wide[0]], depth=4, merging=NOTHING, aio=(aio := WatchedAio())) as reader:
        slab = page_aligned(300, 16384)
        pending = submit(reader, slab)
        pending.give_up()
        with pytest.raises(ReadError, match=f"{wide[0].path}, layer 0, bundle .* given up"):
            pending.wait()
        assert aio.asked == [4]


def test_requests_of_all_kinds_in_turn(file):
    """What the kernel is told of one must not be left over for the next."""
    whole, gate = [(0, 2048, 2048, 0)], spans_of(ALIGNED, "gate")
    kinds = [(APART, whole), (APART, gate), (IDS[:100], spans_of(ALIGNED, "gate", "down")), (np.arange(290), whole)]
    with no_preadv(), AioReader([file[0]], merging=Merging(512, 9, 8192)) as reader:
        for first in kinds:
            for second in kinds:
                for ids, spans in (first, second):
                    check(reader, 0, file[1], ids, ROWS[: len(ids)], spans, 300)


def test_closing_gives_the_context_back(file):
    before = contexts()
    reader = AioReader([file[0]])
    assert contexts() == before + 1
    slab = page_aligned(300, 2048)
    pending = submit(reader, slab)
    reader.close()
    assert contexts() == before
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


def test_a_wrong_depth_is_refused():
    with pytest.raises(ValueError):
        AioReader([], depth=0)
