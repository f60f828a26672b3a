"""Which reads fetch a request; for one target, planned in a few steps, the same ones as the general way finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mlx_flash.engine.storage import read_plan
from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part
from mlx_flash.engine.storage.control_blocks import places
from mlx_flash.engine.storage.read_plan import FEW, Alike, Merging, Pieces, is_scan, pieces, plan_reads, segments
from mlx_flash.engine.storage.reader import Target

from .test_readers import ALIGNED, HAS_AIO, NOTHING, check, make_file, page_aligned

COUNT = 400
COLUMNS = ("offset", "target", "memory", "nbytes")
ARRAYS = ("address", "first", "start", "end", "aligned")


@st.composite
def requests(draw):
    """(layout, ids, rows, (offset, nbytes, pitch, skew)) of one target: here and there, runs, or both; in any order."""
    layout = Layout((Part("all", "uint8", draw(st.sampled_from([512, 1000, 2048, 6144]))),), COUNT)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(["sparse", "sparse", "sparse", "dense", "run", "any order", "one amiss", "twice"]))
    ids = np.flatnonzero(
        rng.random(COUNT) < draw(st.sampled_from([0.01, 0.03, 0.06] if kind in ("sparse", "one amiss") else [0.3, 0.9]))
    )
    if kind == "run":
        first = int(rng.integers(COUNT))
        ids = np.arange(first, int(rng.integers(first, COUNT)) + 1)
    elif kind == "any order":
        ids = rng.permutation(ids)
    elif kind == "one amiss":
        ids[-2:] = ids[-2:][::-1]
    elif kind == "twice":
        ids = np.sort(np.append(ids, ids[: len(ids) // 2]))
    ids = ids if len(ids) else np.array([COUNT - 1])
    rows = np.arange(len(ids)) + 3
    if draw(st.booleans()):
        rows = np.sort(rng.permutation(COUNT * 2)[: len(ids)]) if draw(st.booleans()) else rng.permutation(rows)
    stride = layout.stride
    span = draw(
        st.sampled_from([(0, stride, stride), (0, stride, stride + 512), (0, 512, 512), (stride - 256, 256, 512)])
    )
    return layout, ids, rows, (*span, draw(st.sampled_from([0, 0, 0, 8, 512])))


mergings = st.builds(
    Merging, st.sampled_from([0, 511, 512, 4096, 8192]), st.sampled_from([0, 0.1, 5]), st.sampled_from([4096, 1 << 20])
)


def target_of(offset, nbytes, pitch, skew, rows):
    memory = page_aligned(1, skew + (int(rows.max()) + 1) * pitch)[0][skew:].reshape(-1, pitch)
    return Target(offset, memory[:, :nbytes])


def general(layout, ids, rows, target, merging, align):
    return pieces(segments(layout, ids, rows, [target]), [target], merging, align, is_scan(ids))


def check_same(found: Pieces, expected: Pieces) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found.segments, name), getattr(expected.segments, name), name)
    assert found.lists == expected.lists


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests(), mergings, st.sampled_from([1, 512, 4096]))
def test_the_short_way_finds_what_the_general_one_does(request_, merging, align):
    layout, ids, rows, span = request_
    target = target_of(*span, rows)
    found, expected = plan_reads(layout, ids, rows, [target], merging, align), None
    if isinstance(found, Alike):
        gap = (ids[1:] - ids[:-1]) * layout.stride - target.nbytes
        near = int((gap <= merging.gap).sum())
        assert near * FEW < len(ids) and (ids[1:] >= ids[:-1]).all()
        event("apart" if not near else "few neighbours")
        apart = Merging(0, 0, 1 << 30)
        expected = [general(layout, ids[k : k + 1], rows[k : k + 1], target, apart, align) for k in range(len(ids))]
        for name in ("address", "start", "end", "aligned"):
            np.testing.assert_array_equal(getattr(found, name), np.concatenate([getattr(e, name) for e in expected]))
        assert found.aligned.all() == found.alike and set(found.end - found.start) == {found.nbytes}
        if near:
            return
    event(type(found).__name__)
    check_same(found, general(layout, ids, rows, target, merging, align))


@pytest.mark.parametrize(
    ("ids", "rows", "short"),
    [
        (np.arange(0, 300, 7), np.arange(43), True),
        (np.arange(3, 300), np.arange(297), True),
        (np.append(np.arange(0, 300, 7), 295), np.arange(44), True),
        (np.arange(3, 300), np.arange(297)[::-1].copy(), False),
        (np.arange(0, 300, 7)[::-1].copy(), np.arange(43), False),
        (np.array([5, 6, 40, 41]), np.arange(4), False),
    ],
)
def test_which_requests_are_planned_in_a_few_steps(monkeypatch, ids, rows, short):
    layout = Layout((Part("all", "uint8", 18432),), 300)
    asked = []
    monkeypatch.setattr(read_plan, "segments", lambda *rest: asked.append(rest) or segments(*rest))
    plan_reads(layout, ids, rows, [target_of(0, 18432, 18432, 0, rows)], Merging(), 512)
    assert short == (not asked)


def test_a_piece_of_one_segment_is_told_without_a_vector():
    """Beside pieces of several, with and without gaps."""
    layout = Layout((Part("all", "uint8", 512),), 300)
    ids, rows = np.array([3, 10, 12, 13, 40, 41, 90]), np.array([9, 1, 4, 2, 5, 6, 0])
    target = target_of(0, 512, 512, 0, rows)
    plan = general(layout, ids, rows, target, Merging(512, 9), 512)
    scrap = memoryview(bytearray(8192))
    found = places(plan, scrap)
    assert found.opcode.tolist() == [0, 7, 0, 0] and found.nbytes.tolist() == [512, 4, 1024, 512]
    address = target.address + rows * 512
    assert found.buffer[[0, 2, 3]].tolist() == address[[0, 4, 6]].tolist()
    begin = (found.buffer[1] - found.vectors.ctypes.data) // 16
    named = found.vectors[begin : begin + 4]
    assert named[:, 1].tolist() == [512] * 4
    assert named[[0, 2, 3], 0].tolist() == address[1:4].tolist()
    assert named[1, 0] == np.frombuffer(scrap, np.uint8).ctypes.data
    assert plan.start.tolist() == (DATA_START + 512 * np.array([3, 10, 40, 90])).tolist()


@pytest.mark.skipif(not HAS_AIO, reason="this system has no asynchronous I/O")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests(), mergings, st.sampled_from([1, 7, 256]))
def test_the_bytes_are_those_of_the_bundles(tmp_path_factory, request_, merging, depth):
    layout, ids, rows, span = request_
    file, bundles = make_file(tmp_path_factory.getbasetemp(), layout, "pieces")
    with AioReader([file], threads=2, merging=merging, depth=depth) as reader:
        report = check(reader, 0, bundles, ids, rows, [span], int(rows.max()) + 1)
    assert report.bytes >= len(set(ids.tolist())) * span[1]


@pytest.mark.parametrize(
    ("skew", "offset", "nbytes", "aligned"),
    [
        (0, 0, 2048, True),
        (0, 512, 1024, True),
        (8, 0, 2048, False),
        (0, 8, 512, False),
        (0, 512, 1000, False),
    ],
)
def test_which_pieces_are_aligned(skew, offset, nbytes, aligned):
    """A read that is thought aligned and is not would fall back to the page cache, unnoticed."""
    memory = page_aligned(1, 4 * 4096)[0][skew : skew + 3 * 4096].reshape(3, 4096)[:, :nbytes]
    targets = [Target(offset, memory)]
    found = segments(ALIGNED, np.array([7]), np.array([2]), targets)
    assert pieces(found, targets, NOTHING, 512).aligned.tolist() == [aligned]


@settings(max_examples=60, deadline=None)
@given(
    part=st.sampled_from([512, 2048, 6144]),
    density=st.floats(0.001, 0.999),
    names=st.sampled_from([["up", "down"], ["gate"], ["gate", "down"], ["gate", "up", "down"]]),
    seed=st.integers(0, 99),
)
def test_no_request_reads_much_more_than_it_asks_for(part, density, names, seed):
    """Bundles here and there: gaps are at most a tenth, however they lie; and every segment is read once."""
    layout = Layout(tuple(Part(name, "uint8", part) for name in ("gate", "up", "down")), 900)
    ids = np.flatnonzero(np.random.default_rng(seed).random(900) < density)
    if not len(ids) or is_scan(ids):
        return
    targets = [Target(layout.offset(name), page_aligned(len(ids), part)) for name in names]
    found = segments(layout, ids, np.arange(len(ids)), targets)
    plan = pieces(found, targets, Merging(), 512)
    asked = len(ids) * len(names) * part
    assert asked <= (plan.end - plan.start).sum() <= 1.1 * asked
    assert (plan.start[1:] >= plan.end[:-1]).all() and plan.first[-1] == len(found.offset)
    read_in = np.searchsorted(plan.start, found.offset, side="right") - 1
    np.testing.assert_array_equal(read_in, np.repeat(np.arange(len(plan.start)), np.diff(plan.first)))
    assert (found.offset + found.nbytes <= plan.end[read_in]).all()


def test_small_gaps_are_read_over_before_large_ones():
    layout = Layout((Part("all", "uint8", 512),), 4000)
    ids = np.sort([0, 3, *range(100, 1000, 50), 1005, 1007, 1009])  # gaps of 2, 96, 49, 54 and 1 bundles
    targets = [Target(0, page_aligned(len(ids), 512))]
    found = segments(layout, ids, np.arange(len(ids)), targets)

    def merged(share):
        plan = pieces(found, targets, Merging(8192, share), 512)
        starts = set(((plan.start - DATA_START) // 512).tolist())
        return sorted(set(ids.tolist()) - starts)

    assert merged(0) == merged(0.99 / len(ids)) == []
    assert merged(1 / len(ids)) == [1007] and merged(3.9 / len(ids)) == [1007, 1009]
    assert merged(4 / len(ids)) == [3, 1007, 1009] and merged(9) == [3, 1007, 1009]
