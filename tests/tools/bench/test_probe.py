"""The probe: its figures, its file, which is always removed, and what it announces when it cannot measure."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import defaultdict, namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.engine.storage.reader import ReadReport
from mlx_flash.errors import SpaceError, UsageError
from mlx_flash.runtime.machine import ReadRate, load_machine, save_machine
from mlx_flash.tools.bench import kernel_probe, machine_probe, read_probe
from mlx_flash.tools.bench.machine_probe import machine_rows, print_machine, probe
from mlx_flash.tools.bench.read_probe import Kind, Reading, fio_rates, kinds, measure_reads, probe_file

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the probe, on little memory."""
    for name, value in dict(MEMORY_BYTES=MIB, LEAST_BYTES=MIB, DIM=96, SELECTED=20, RANK=8, LAYERS=2).items():
        monkeypatch.setattr(kernel_probe, name, value)
    for mod in (machine_probe, kernel_probe, read_probe):
        if hasattr(mod, "ROUNDS"):
            monkeypatch.setattr(mod, "ROUNDS", 2)
    monkeypatch.setattr(read_probe, "IN_FLIGHT_BYTES", 4 * MIB)
    monkeypatch.setattr(read_probe, "SIZES", (1536, 5120))
    monkeypatch.setattr(read_probe, "DEPTHS", (1, 256))
    monkeypatch.setattr(read_probe, "BUFFERED_SIZES", (5120,))
    monkeypatch.setattr(read_probe, "SCAN_SIZE", 64)
    monkeypatch.setattr(machine_probe, "FILE_BYTES", 4 * MIB)


def test_a_whole_probe(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    told: list[str] = []
    with probe_file(folder, 4 * MIB) as file:
        assert file.stat().st_size == 4 * MIB and len(np.unique(np.fromfile(file, np.uint8))) == 256
        found = probe(folder, 0.2, announce=told.append, file=file)
    assert list(folder.iterdir()) == []
    save_machine(found)
    assert load_machine(folder / "checkpoint") == found
    assert any(read.direct for read in found.reads) or told
    assert {name.split(".")[0] for name in found.kernels} == {"linear", "rows", "predictor"}
    print_machine(found, [(found.reads[0], found.reads[0])])
    shown = capsys.readouterr().out
    for text in (
        found.device,
        found.reader,
        "1.5 KiB",
        "1 MiB",
        "GB/s",
        "k reads/s",
        "us a token",
        "Gflop/s",
        "fio",
        "1.00",
    ):
        assert text in shown
    rows = machine_rows(found, [(found.reads[0], found.reads[0])])
    assert len(rows) == len(found.reads) + 2 + 1 + len(found.kernels) + 1 + 2
    assert all(row.keys() == rows[0].keys() and row["value"] > 0 for row in rows)


# Reads.


class FakeClock:
    now = cpu = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu


class FakeReader:
    """Each request takes 10 ms of time and 2 ms of CPU from when it is waited for."""

    def __init__(self, clock: FakeClock, nbytes: int):
        self.clock, self.nbytes, self.under_way, self.most = clock, nbytes, 0, 0
        self.asked: list[np.ndarray] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[object]) -> FakePending:
        self.asked.append(ids)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return FakePending(self, len(ids))


class FakePending:
    def __init__(self, reader: FakeReader, reads: int):
        self.reader, self.reads = reader, reads

    def wait(self) -> ReadReport:
        self.reader.under_way -= 1
        self.reader.clock.now += 0.010
        self.reader.clock.cpu += 0.002
        return ReadReport(self.reads * self.reader.nbytes, self.reads)


@pytest.mark.parametrize("direct", [True, False])
def test_a_rate_is_bytes_over_time_and_cpu_is_per_read(direct: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    clock, kind = FakeClock(), Kind(1536, 8, True, direct)
    reader = FakeReader(clock, 1536)
    with Reading(tmp_path / "file", "AioReader", open_kind=lambda kind: reader, clock=clock) as reading:
        rate, cpu_s = reading(kind, 1.0)
    assert reader.closed
    assert rate == pytest.approx(64 * 1536 / 0.010) and cpu_s == pytest.approx(0.002 / 64)
    assert reader.most == 2, "the next request begins before the last one's has ended"
    asked = np.concatenate(reader.asked[1:])
    if direct:
        assert len(reader.asked) - 1 >= 100
    else:
        assert len(np.unique(asked)) == len(asked), "what was read once would come from the page cache"
    assert not np.array_equal(asked[:64], np.arange(asked[0], asked[0] + 64))


def test_medians_of_rounds_in_which_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str, rates: list[float]) -> Callable[[Kind, float], tuple[float, float]]:
        left = iter(rates)

        def run(kind: Kind, seconds: float) -> tuple[float, float]:
            order.append(name)
            return next(left), 1 / 1000

        return run

    runs = {"a": contestant("a", [1, 50, 3, 2, 1000]), "b": contestant("b", [7] * 5)}
    found = measure_reads([Kind(512, 1, True)], runs, 1.0)
    assert found["a"] == (ReadRate(512, 1, True, True, 3, 1 / 1000),) and found["b"][0].bytes_per_s == 7
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]


def test_what_cannot_be_measured_is_left_out_and_said() -> None:
    told: list[str] = []
    every = kinds("AioReader", True, True, told.append)
    assert {kind.direct for kind in every} == {True, False} and max(kind.depth for kind in every) == 256 and not told
    direct = kinds("AioReader", True, False, told.append)
    assert all(kind.direct for kind in direct) and "page cache" in told.pop()
    buffered = kinds("PreadReader", False, False, told.append)
    assert not any(kind.direct for kind in buffered) and "may be those of memory" in told.pop()
    for reader, deepest in (("PreadReader", 32), ("PlainReader", 1)):
        found = kinds(reader, True, True)
        assert max(kind.depth for kind in found) == deepest
    for found in (every, direct, buffered):
        assert {kind.scattered for kind in found} == {True, False} and len(set(found)) == len(found)


@linux
def test_whether_the_page_cache_was_emptied_is_seen(tmp_path: Path) -> None:
    with probe_file(tmp_path, 4 * MIB) as file:
        if not read_probe.goes_around(file):
            pytest.skip("the tests' folder lies in memory")
        file.read_bytes()
        assert read_probe.can_drop(file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_probe, "_drop", lambda file: None)
            file.read_bytes()
            assert not read_probe.can_drop(file)


# The file, and what may go wrong.


def refuse(number: int) -> Callable[..., None]:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(100_000_000))
        with pytest.raises(SpaceError, match=r"134217728 bytes.*100000000 bytes"), probe_file(tmp_path):
            pass
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(11 * MIB))
        with probe_file(tmp_path, 5 * MIB) as file:
            assert file.stat().st_size == 5 * MIB
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.ENOSPC))
        with pytest.raises(SpaceError, match="3145728 bytes"), probe_file(tmp_path, 3 * MIB):
            pass
        patch.setattr(os, "fsync", refuse(errno.EIO))
        with pytest.raises(UsageError, match="cannot write"), probe_file(tmp_path, MIB):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_less_room_gets_a_smaller_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1_000_000_000))
    assert read_probe._file_bytes(Path("."), 1 << 30) == 500_000_000 >> 20 << 20


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(UsageError, match="no folder"):
            probe(folder)
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EACCES))
    with pytest.raises(UsageError, match="--dir"):
        probe(tmp_path)


@pytest.mark.parametrize("step", ["measure_reads", "kernel_rates", "layer_seconds"])
def test_ctrl_c_leaves_nothing(step: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        assert any(path.name == "reads.bin" for path in tmp_path.rglob("*"))
        raise KeyboardInterrupt

    for other in ("measure_reads", "kernel_rates", "layer_seconds"):
        monkeypatch.setattr(machine_probe, other, interrupt if other == step else lambda *arguments: defaultdict(tuple))
    with pytest.raises(KeyboardInterrupt):
        probe(tmp_path, 0.1)
    assert list(tmp_path.iterdir()) == []


@linux
def test_what_a_killed_probe_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".{read_probe.NAME}.partial-99999999"
    left.mkdir()
    (left / "reads.bin").write_bytes(b"x")
    other = tmp_path / f".{read_probe.NAME}.partial-note"
    other.mkdir()
    with probe_file(tmp_path, MIB) as file:
        assert not left.exists() and file.exists()
        with pytest.raises(UsageError), probe_file(tmp_path, MIB):
            pass
        assert file.exists(), "a second probe must not take the first one's file away"
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(("cpu_s", "noticed"), [(0.2, False), (0.17, False), (0.15, True)])
def test_a_busy_machine_is_noticed(cpu_s: float, noticed: bool) -> None:
    clock, told = FakeClock(), list[str]()

    def work() -> float:
        clock.now += 0.1
        clock.cpu += cpu_s
        return 7.0

    busy = kernel_probe.Busy(work, 2, clock)
    assert busy() == busy() == 7.0
    busy.tell(told.append)
    assert len(told) == noticed and all("75 % of 2 processors" in text for text in told)


# fio.


def fake_fio(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "bin" / "fio"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


ANSWER = {"read": {"io_bytes": 5_000_000, "runtime": 500, "total_ios": 1000}, "usr_cpu": 10.0, "sys_cpu": 30.0}
ANSWER |= {"job_runtime": 500}


@linux
def test_beside_fio(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    answer = json.dumps({"jobs": [ANSWER]})
    fake_fio(tmp_path, monkeypatch, f"echo \"$@\" >> {tmp_path}/calls; echo note: some text; echo '{answer}'")
    monkeypatch.setattr(read_probe, "FIO_ROUNDS", 1)
    with probe_file(tmp_path, 4 * MIB) as file:
        if not read_probe.goes_around(file):
            pytest.skip("the tests' folder lies in memory")
        pairs = fio_rates(file, 0.01, told.append)
        calls = (tmp_path / "calls").read_text().splitlines()
    assert pairs and not told
    for ours, fio in pairs:
        assert fio.bytes_per_s == 1e7 and fio.cpu_s == pytest.approx(0.4 * 0.5 / 1000)
        assert (ours.nbytes, ours.depth, ours.scattered) == (fio.nbytes, fio.depth, fio.scattered)
    assert len(calls) == len(pairs)
    for call, (ours, _) in zip(calls, pairs, strict=True):
        assert f"--bs={ours.nbytes} --iodepth={ours.depth} " in call and "--direct=1" in call
        assert ("--rw=randread" in call) == ours.scattered


@linux
@pytest.mark.parametrize("script", ["echo broken >&2; exit 1", "echo '{}'", "echo no answer", "echo '{\"jobs\": []}'"])
def test_fio_that_fails(script: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    fake_fio(tmp_path, monkeypatch, script)
    with probe_file(tmp_path, MIB) as file:
        if not read_probe.goes_around(file):
            pytest.skip("the tests' folder lies in memory")
        assert fio_rates(file, 0.01, told.append) is None
    assert len(told) == 1 and "fio failed" in told[0] and ("broken" in told[0]) == ("broken" in script)


def test_without_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with probe_file(tmp_path, MIB) as file:
        assert fio_rates(file, 0.01, told.append) is None
    assert len(told) == 1 and "not installed" in told[0]
