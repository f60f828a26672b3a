"""Bundles in place, part by part in several files, through every reader, against plain assignment."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flash.engine.storage import pread_reader, readers
from mlx_flash.engine.storage.bundle import Layout, Part
from mlx_flash.engine.storage.extents import LayerExtents
from mlx_flash.engine.storage.pread_reader import PreadReader
from mlx_flash.engine.storage.reader import ReadReport, Target, Together
from mlx_flash.engine.storage.readers import FaultyReader
from mlx_flash.errors import ReadError
from tests.engine.storage.test_readers import ON_DISK, READERS, check, make_bundles, make_file, requests

PARTS = Layout((Part("gate.weight", "uint8", 5000), Part("gate.scales", "uint8", 40), Part("down", "uint8", 512)), 12)


def scatter(folder, layout, files, seed=0, stacked=False):
    """A layer's bundles dealt out to files, each part where chance puts it (stacked: part after part, as tensors)."""
    rng = np.random.default_rng(seed)
    bundles = make_bundles(layout, seed)
    count, parts = layout.count, len(layout.parts)
    file, offset = np.zeros((parts, count), np.int64), np.zeros((parts, count), np.int64)
    contents = [rng.integers(0, 256, rng.integers(0, 40), np.uint8).tobytes() for _ in range(files)]
    places = [(p, e) for p in range(parts) for e in range(count)]
    for p, e in places if stacked else [places[i] for i in rng.permutation(len(places))]:
        part, at = layout.parts[p], layout.offset(layout.parts[p].name)
        number = p % files if stacked else int(rng.integers(files))
        file[p, e], offset[p, e] = number, len(contents[number])
        contents[number] += bundles[e, at : at + part.nbytes].tobytes()
        contents[number] += b"" if stacked else bytes(int(rng.integers(0, 3)) * 300)
    paths = tuple(folder / f"shard-{seed}-{k}" for k in range(files))
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    return LayerExtents(paths, layout, file, offset), bundles


@pytest.mark.parametrize("name", ON_DISK)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request_=requests(), seed=st.integers(0, 9), files=st.integers(1, 3), stacked=st.booleans())
def test_readers_read_in_place_as_from_a_layer_file(tmp_path_factory, name, request_, seed, files, stacked):
    layout, ids, rows, spans, capacity = request_
    spans = [(at, min(n, layout.bundle_bytes - at), pitch, skew) for at, n, pitch, skew in spans]  # no padding here
    spans = [span for span in spans if span[1] > 0]
    folder = tmp_path_factory.getbasetemp()
    extents, bundles = scatter(folder, layout, files, seed, stacked)
    beside, others = make_file(folder, layout, "layer", seed + 1)
    with READERS[name]([beside, extents, extents], []) as reader:
        report = check(reader, 1, bundles, ids, rows, spans, capacity)
        asked = len(set(ids)) * sum(nbytes for _, nbytes, _, _ in spans)
        assert report.bytes >= asked and (report.reads > 0) == (asked > 0)
        check(reader, 2, bundles, ids, rows, spans, capacity)
        check(reader, 0, others, ids, rows, spans, capacity)


@pytest.mark.parametrize("name", ON_DISK)
def test_padding_is_not_read(tmp_path, name):
    extents, bundles = scatter(tmp_path, PARTS, 1)
    with READERS[name]([extents], []) as reader:
        rows = np.full((2, PARTS.stride), 7, np.uint8)
        reader.submit(0, np.array([11, 3]), np.array([0, 1]), [Target(0, rows)]).wait()
        np.testing.assert_array_equal(rows[:, : PARTS.bundle_bytes], bundles[[11, 3], : PARTS.bundle_bytes])
        assert (rows[:, PARTS.bundle_bytes :] == 7).all()
        nothing = Target(PARTS.bundle_bytes, np.zeros((2, PARTS.stride - PARTS.bundle_bytes), np.uint8))
        assert reader.submit(0, np.array([1]), np.array([0]), [nothing]).wait().bytes == 0


@pytest.mark.parametrize("name", ON_DISK)
def test_the_error_names_file_layer_and_bundle_and_comes_last(tmp_path, name):
    """Of two files one is cut short: the other's bytes are there when the error comes, and later requests work."""
    extents, bundles = scatter(tmp_path, PARTS, 2, stacked=True)
    cut = extents.paths[1]  # of gate.scales, by the order of parts
    whole = cut.read_bytes()
    os.truncate(cut, int(extents.offset[1, 7]) + 3)
    with READERS[name]([make_file(tmp_path, PARTS)[0], extents], []) as reader:
        rows = np.zeros((12, PARTS.stride), np.uint8)
        pending = reader.submit(1, np.arange(12), np.arange(12), [Target(0, rows)])
        for _ in range(2):
            with pytest.raises(ReadError, match=rf"{cut}, layer 1, bundle (7|8|9|10|11): .* ends at byte \d+"):
                pending.wait()
            assert pending.ended()
        gate = PARTS.part("gate.weight").nbytes
        np.testing.assert_array_equal(rows[:, :gate], bundles[:, :gate])
        check(reader, 1, bundles, [6, 0], [0, 1], [(0, PARTS.bundle_bytes, PARTS.stride, 0)], 2)
        cut.write_bytes(whole)
        check(reader, 1, bundles, range(12), range(12), [(0, PARTS.bundle_bytes, PARTS.stride, 0)], 12)
        pending = reader.submit(1, np.arange(12), np.arange(12), [Target(0, rows)])
        reader.drain()
        cut.unlink()
    with READERS[name]([extents], []) as reader:
        pending = reader.submit(0, np.array([2]), np.array([0]), [Target(0, rows)])
        with pytest.raises(ReadError, match=rf"{cut}, layer 0, bundle 2: No such file"):
            pending.wait()


@pytest.mark.parametrize("name", ON_DISK)
def test_a_file_is_opened_once_for_all_layers(tmp_path, name, monkeypatch):
    extents, bundles = scatter(tmp_path, PARTS, 2)
    opened = []
    for module, function in ((pread_reader, "OpenFile"), (readers, "FileIO")):
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda path, *rest, real=real: opened.append(path) or real(path, *rest))
    with READERS[name]([extents] * 4, []) as reader:
        for layer in range(4):
            check(reader, layer, bundles, range(12), range(12), [(0, PARTS.bundle_bytes, PARTS.stride, 0)], 12)
    assert sorted(opened) == sorted(extents.paths)


class Slow:
    """A request that has ended when it was asked so often, in an error or not."""

    def __init__(self, error=None):
        self.error, self.waited, self.given_up, self.asked = error, 0, False, 0

    def wait(self):
        self.waited += 1
        if self.error:
            raise self.error
        return ReadReport(10, 2)

    def ended(self):
        self.asked += 1
        return self.asked > 1

    def give_up(self):
        self.given_up = True


def test_requests_begun_together_end_together():
    both = Together([Slow(), Slow()])
    assert not both.ended() and both.ended() and both.wait() == ReadReport(20, 4)
    both.give_up()
    assert all(each.given_up for each in both.requests)
    first, second = ReadError("first"), ReadError("second")
    failing = Together([Slow(), Slow(first), Slow(), Slow(second)])
    for waits in (1, 2):
        with pytest.raises(ReadError, match="first"):
            failing.wait()
        assert [each.waited for each in failing.requests] == [waits] * 4  # none may still write to the rows


def test_a_faulty_reader_fails_in_place(tmp_path):
    extents, bundles = scatter(tmp_path, PARTS, 3)
    with FaultyReader(PreadReader([extents]), 2) as reader:
        spans = [(0, PARTS.bundle_bytes, PARTS.stride, 0)]
        check(reader, 0, bundles, [4, 3], [0, 1], spans, 2)
        with pytest.raises(ReadError, match="bundle 3"):
            check(reader, 0, bundles, [4, 3], [0, 1], spans, 2)
        check(reader, 0, bundles, [4, 3], [0, 1], spans, 2)


def test_extents_must_fit_their_layout(tmp_path):
    extents, _ = scatter(tmp_path, PARTS, 2)
    for file, offset in (
        (extents.file[:2], extents.offset),
        (extents.file, extents.offset[:, :3]),
        (extents.file + 1, extents.offset),
        (extents.file, extents.offset - 10**6),
    ):
        with pytest.raises(ValueError):
            LayerExtents(extents.paths, PARTS, file, offset)
