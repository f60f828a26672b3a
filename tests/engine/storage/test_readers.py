"""Every reader against one oracle: plain assignment from the same bundles in memory."""

from __future__ import annotations

import errno
import mmap
import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flash.engine.storage import readers
from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part, layer_header
from mlx_flash.engine.storage.pread_reader import PreadReader
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.engine.storage.reader import Done, LayerFile, ReadReport, Target
from mlx_flash.engine.storage.readers import FaultyReader, MemoryReader, PlainReader, open_reader
from mlx_flash.errors import ReadError

ALIGNED = Layout((Part("gate", "uint8", 512), Part("up", "uint8", 1024), Part("down", "uint8", 512)), 300)

EVERYTHING = Merging(1 << 20, 1e9, 8192)  # merged over any gap
NOTHING = Merging(0, 0, 4096)


def has_aio() -> bool:
    try:
        AioReader([]).close()
    except OSError:
        return False
    return True


HAS_AIO = has_aio()
READERS = {
    "memory": lambda files, layers: MemoryReader(layers),
    "faulty": lambda files, layers: FaultyReader(MemoryReader(layers), 10**9),
    "plain": lambda files, layers: PlainReader(files),
    "direct": lambda files, layers: PreadReader(files),
    "direct-unmerged": lambda files, layers: PreadReader(files, threads=2, merging=NOTHING),
    "direct-merged": lambda files, layers: PreadReader(files, threads=1, merging=EVERYTHING),
    "buffered": lambda files, layers: PreadReader(files, direct=False, merging=Merging(piece_bytes=4096)),
}
if HAS_AIO:
    READERS |= {
        "aio": lambda files, layers: AioReader(files),
        "aio-shallow": lambda files, layers: AioReader(files, depth=3, merging=NOTHING),
        "aio-merged": lambda files, layers: AioReader(files, depth=2, merging=EVERYTHING),
        "aio-buffered": lambda files, layers: AioReader(files, direct=False),
    }
ON_DISK = [name for name in READERS if name not in ("memory", "faulty")]


def make_bundles(layout, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (layout.count, layout.stride), np.uint8)


def make_file(folder, layout, name="layer", seed=0):
    """A layer file and its bundles."""
    bundles = make_bundles(layout, seed)
    (folder / name).write_bytes(layer_header(layout) + bundles.tobytes())
    return LayerFile(folder / name, layout), bundles


def page_aligned(rows, width):
    return np.frombuffer(mmap.mmap(-1, max(1, rows * width)), np.uint8)[: rows * width].reshape(rows, width)


def spans_of(layout, *names):
    return [(layout.offset(name), layout.part(name).nbytes, layout.part(name).nbytes, 0) for name in names]


@st.composite
def requests(draw):
    """A layout, and a request on it: (layout, ids, rows, [(offset, nbytes, pitch, skew)], capacity)."""
    lengths = draw(st.lists(st.sampled_from([1, 3, 100, 511, 512, 1024, 4096, 5000]), min_size=1, max_size=4))
    layout = Layout(tuple(Part(str(i), "uint8", n) for i, n in enumerate(lengths)), draw(st.integers(1, 40)))
    if draw(st.booleans()):  # a run of neighbours, as prefill asks for
        first = draw(st.integers(0, layout.count - 1))
        ids = list(range(first, draw(st.integers(first, layout.count))))
    else:
        ids = draw(st.lists(st.integers(0, layout.count - 1), unique=draw(st.booleans()), max_size=40))
    capacity = len(ids) + draw(st.integers(0, 3))
    rows = list(range(len(ids))) if draw(st.booleans()) else draw(st.permutations(range(capacity)))[: len(ids)]
    kind = draw(st.sampled_from(["whole", "parts", "cut"]))
    if kind == "whole":
        spans = [(0, layout.stride)]
    elif kind == "parts":
        chosen = draw(st.permutations([part.name for part in layout.parts]))
        spans = [(layout.offset(name), layout.part(name).nbytes) for name in chosen]
        spans = spans[: draw(st.integers(1, len(spans)))]
    else:
        cuts = sorted(draw(st.lists(st.integers(0, layout.stride), min_size=2, max_size=5)))
        spans = [(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)][:: draw(st.integers(1, 2))]
    gaps = draw(st.sampled_from([0, 0, 1, 512]))
    skew = draw(st.sampled_from([0, 0, 1, 512]))
    return layout, ids, rows, [(at, n, n + gaps, skew) for at, n in spans], capacity


def check(reader, layer, bundles, ids, rows, spans, capacity):
    """Read, and compare memory, between and beside the rows too, with plain assignment."""
    memories, targets, expected = [], [], []
    for at, nbytes, pitch, skew in spans:
        memory = page_aligned(1, skew + (capacity + 1) * max(1, pitch))[0]
        memory[:] = 0xA5
        view = np.lib.stride_tricks.as_strided(memory[skew:], (capacity, nbytes), (pitch, 1))
        wanted = memory.copy()
        for i, row in zip(ids, rows, strict=True):
            wanted[skew + row * pitch : skew + row * pitch + nbytes] = bundles[i, at : at + nbytes]
        memories.append(memory)
        expected.append(wanted)
        targets.append(Target(at, view))
    pending = reader.submit(layer, np.array(ids, np.int32), np.array(rows, np.int64), targets)
    report = pending.wait()
    assert pending.ended()
    for memory, wanted in zip(memories, expected, strict=True):
        np.testing.assert_array_equal(memory, wanted)
    return report


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request_=requests(), seed=st.integers(0, 9))
def test_readers_obey_the_protocol(tmp_path_factory, name, request_, seed):
    layout, ids, rows, spans, capacity = request_
    other = Layout((Part("x", "uint8", 7),), 3)
    folder = tmp_path_factory.getbasetemp()
    files, bundles = zip(make_file(folder, other, "first"), make_file(folder, layout, "second", seed), strict=True)
    with READERS[name](files, list(zip((other, layout), bundles, strict=True))) as reader:
        report = check(reader, 1, bundles[1], ids, rows, spans, capacity)
        asked = len(set(ids)) * sum(nbytes for _, nbytes, _, _ in spans)
        assert report.bytes >= asked and (report.reads > 0) == (asked > 0)
        check(reader, 0, bundles[0], [2, 0], [0, 1], [(0, 7, 7, 0)], 2)


@pytest.mark.parametrize("name", READERS)
def test_several_requests_may_be_under_way(tmp_path, name):
    file, bundles = make_file(tmp_path, ALIGNED)
    with READERS[name]([file], [(ALIGNED, bundles)]) as reader:
        slabs = [page_aligned(300, ALIGNED.stride) for _ in range(3)]
        order = np.random.default_rng(1).permutation(300)
        pending = [reader.submit(0, order, np.arange(300), [Target(0, slab)]) for slab in slabs]
        reports = [each.wait() for each in reversed(pending)]
        assert pending[0].wait() == reports[-1]
        for slab in slabs:
            np.testing.assert_array_equal(slab, bundles[order])


@pytest.mark.parametrize("name", READERS)
def test_a_request_ends_though_nobody_waits(tmp_path, name):
    """All of it, also what did not fit among the reads in flight."""
    file, bundles = make_file(tmp_path, ALIGNED)
    with READERS[name]([file], [(ALIGNED, bundles)]) as reader:
        slab, order = page_aligned(300, ALIGNED.stride), np.random.default_rng(1).permutation(300)
        pending = reader.submit(0, order, np.arange(300), [Target(0, slab)])
        deadline = time.monotonic() + 20
        while not pending.ended():
            assert time.monotonic() < deadline
        np.testing.assert_array_equal(slab, bundles[order])
        pending.give_up()  # which changes nothing any more
        assert pending.wait().bytes == slab.nbytes and pending.ended()


@pytest.mark.parametrize("name", READERS)
def test_a_request_that_is_given_up(tmp_path, name):
    """Ends, whole or in an error, and then writes no more; others are not given up with it."""
    file, bundles = make_file(tmp_path, ALIGNED)
    with READERS[name]([file], [(ALIGNED, bundles)]) as reader:
        slabs = [page_aligned(300, ALIGNED.stride) for _ in range(3)]
        order = np.random.default_rng(1).permutation(300)
        pending = [reader.submit(0, order, np.arange(300), [Target(0, slab)]) for slab in slabs]
        pending[1].give_up()
        for k, each in enumerate(pending):
            try:
                assert each.wait().bytes == slabs[k].nbytes
            except ReadError as error:
                assert k == 1 and "given up" in str(error)
                with pytest.raises(ReadError, match="given up"):
                    each.wait()
            else:
                np.testing.assert_array_equal(slabs[k], bundles[order])
            assert each.ended()
        after = slabs[1].copy()
        check(reader, 0, bundles, range(300), range(300), [(0, 2048, 2048, 0)], 300)
        np.testing.assert_array_equal(slabs[1], after)


def test_what_has_ended_may_be_given_up():
    for outcome in (ReadReport(5, 1), None):
        done = Done(outcome)
        done.give_up()
        assert done.ended() and done.wait() == (outcome or ReadReport(0, 0))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("ids", "rows", "spans"),
    [
        ([300], [0], [(0, 8)]),
        ([-1], [0], [(0, 8)]),
        ([0], [4], [(0, 8)]),
        ([0], [-1], [(0, 8)]),
        ([0, 1], [0], [(0, 8)]),
        ([0.0], [0], [(0, 8)]),
        ([[0]], [[0]], [(0, 8)]),
        ([0], [0], [(0, 8), (7, 8)]),
        ([0], [0], [(2041, 8)]),
    ],
)
def test_readers_refuse_what_is_out_of_range(tmp_path, name, ids, rows, spans):
    file, bundles = make_file(tmp_path, ALIGNED)
    targets = [Target(at, np.zeros((4, nbytes), np.uint8)) for at, nbytes in spans]
    with READERS[name]([file], [(ALIGNED, bundles)]) as reader, pytest.raises(ValueError):
        reader.submit(0, np.array(ids), np.array(rows), targets)


def test_a_target_needs_writable_rows_of_bytes():
    good = np.zeros((4, 8), np.uint8)
    readonly = good.copy()
    readonly.flags.writeable = False
    for rows in (
        good.view(np.uint16),
        good[0],
        readonly,
        good[:, ::2],
        good[::-1],
        np.broadcast_to(good[:1], (4, 8)),
    ):
        with pytest.raises(ValueError):
            Target(0, rows)
    with pytest.raises(ValueError):
        Target(-1, good)
    assert Target(3, good[::2]).nbytes == 8
    assert len(Target(0, good[:0]).flat) == 0


@pytest.mark.parametrize("name", ON_DISK)
def test_a_file_that_shrank(tmp_path, name):
    file, bundles = make_file(tmp_path, ALIGNED)
    with READERS[name]([file], []) as reader:
        check(reader, 0, bundles, [299], [0], [(0, 2048, 2048, 0)], 1)
        os.truncate(file.path, DATA_START + 17 * 2048 + 100)
        check(reader, 0, bundles, [3, 16], [1, 0], [(0, 2048, 2048, 0)], 2)
        pending = reader.submit(0, np.array([5, 17]), np.array([0, 1]), [Target(0, page_aligned(2, 2048))])
        for _ in range(2):
            with pytest.raises(ReadError, match=rf"{file.path}, layer 0, bundle 17: .* ends at byte \d+"):
                pending.wait()


@pytest.mark.parametrize("name", ON_DISK)
def test_a_missing_file(tmp_path, name):
    with READERS[name]([LayerFile(tmp_path / "none", ALIGNED)], []) as reader:
        pending = reader.submit(0, np.array([9, 7]), np.array([0, 1]), [Target(0, page_aligned(2, 2048))])
        with pytest.raises(ReadError, match="none, layer 0, bundle 7: No such file"):
            pending.wait()


def test_faulty_reader_fails_once(tmp_path):
    bundles = make_bundles(ALIGNED)
    reader = FaultyReader(MemoryReader([(ALIGNED, bundles)]), 2)
    slab = page_aligned(4, 2048)
    ids, rows = np.array([4, 3, 2, 1]), np.arange(4)
    reader.submit(0, ids, rows, [Target(0, slab)]).wait()
    slab[:] = 0
    pending = reader.submit(0, ids, rows, [Target(0, slab)])
    with pytest.raises(ReadError, match="bundle 2"):
        pending.wait()
    np.testing.assert_array_equal(slab[:2], bundles[[4, 3]])
    assert not slab[2:].any()
    assert reader.submit(0, ids, rows, [Target(0, slab)]).wait() == ReadReport(4 * 2048, 4)
    np.testing.assert_array_equal(slab, bundles[ids])


def test_open_reader_takes_what_the_system_has(tmp_path, monkeypatch):
    def no_context(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    file, bundles = make_file(tmp_path, ALIGNED)
    if hasattr(os, "preadv"):
        best = AioReader if HAS_AIO else PreadReader
        with open_reader([file], threads=2) as reader:
            assert type(reader) is best and reader.threads == 2
        monkeypatch.setattr(readers, "AioReader", no_context)
        with open_reader([file], threads=2) as reader:
            assert type(reader) is PreadReader and reader.threads == 2
        monkeypatch.delattr(os, "preadv")
    with open_reader([file], threads=2) as reader:
        assert isinstance(reader, PlainReader)
        check(reader, 0, bundles, [2], [0], [(0, 2048, 2048, 0)], 1)
