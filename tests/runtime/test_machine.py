"""Figures of a machine: between the measured points, and in a cache that may be missing, damaged or another's."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flash.errors import FormatError, SpaceError, UsageError
from mlx_flash.runtime import machine
from mlx_flash.runtime.machine import KERNELS, Machine, ReadRate, cache_file, device_of, load_machine, save_machine


def read(nbytes: int, depth: int, scattered: bool, direct: bool, rate: float, cpu_s: float = 4e-6) -> ReadRate:
    return ReadRate(nbytes, depth, scattered, direct, rate, cpu_s)


READS = (
    read(4096, 1, True, True, 1e8, 60e-6),
    read(4096, 64, True, True, 4e8, 4e-6),
    read(65536, 1, True, True, 4e8, 60e-6),
    read(65536, 64, True, True, 16e8, 12e-6),
    read(1 << 20, 4, False, True, 2e9, 50e-6),
    read(65536, 8, True, False, 3e8, 30e-6),
)
FIGURES: dict[str, Any] = dict(memory_bytes_per_s=2e10, matmul_flops=2e11, layer_s={"all": 2e-4, "selected": 3e-4})
FIGURES |= dict(host="here", cores=2, when="2025-01-31T12:00:00+00:00", reader="AioReader")
MACHINE = Machine(device="disk", reads=READS, kernels=dict.fromkeys(KERNELS, 1.5e10), **FIGURES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "device_of", lambda path: "disk")
    return tmp_path / "cache"


# Between the points.


@pytest.mark.parametrize("point", READS, ids=str)
def test_measured_points_are_met(point: ReadRate) -> None:
    asked = point.nbytes, point.depth, point.scattered, point.direct
    assert MACHINE.read_rate(*asked) == pytest.approx(point.bytes_per_s)
    assert MACHINE.read_cpu_s(*asked) == pytest.approx(point.cpu_s)


def test_between_the_points_logarithms_count_and_beyond_them_the_nearest() -> None:
    assert MACHINE.read_rate(16384, 1, True) == pytest.approx(2e8)  # halfway from 4 to 64 KiB
    assert MACHINE.read_rate(4096, 8, True) == pytest.approx(2e8)
    assert MACHINE.read_rate(16384, 8, True) == pytest.approx(4e8)
    assert MACHINE.read_cpu_s(4096, 8, True) == pytest.approx(32e-6)
    assert MACHINE.read_rate(1, 0, True) == pytest.approx(1e8)
    assert MACHINE.read_rate(1e9, 1e6, True) == pytest.approx(16e8)


@given(st.floats(1, 1e7), st.floats(1, 1e4), st.floats(1, 100))
def test_more_bytes_and_more_in_flight_are_no_slower_here(nbytes: float, depth: float, factor: float) -> None:
    rate = MACHINE.read_rate(nbytes, depth, True)
    assert 1e8 * 0.999 <= rate <= 16e8 * 1.001
    assert MACHINE.read_rate(nbytes * factor, depth, True) >= rate * 0.999
    assert MACHINE.read_rate(nbytes, depth * factor, True) >= rate * 0.999


def test_what_was_not_measured_one_way_around_the_cache_is_taken_from_the_other() -> None:
    assert MACHINE.measured(True, False) and not MACHINE.measured(False, False)
    assert MACHINE.read_rate(65536, 8, True, direct=False) == pytest.approx(3e8)
    assert MACHINE.read_rate(1 << 20, 4, False, direct=False) == pytest.approx(2e9)


# The cache.


def test_figures_come_back(cache: Path) -> None:
    assert load_machine(cache) is None
    path = save_machine(MACHINE)
    assert path.is_relative_to(cache) and load_machine(cache) == MACHINE
    save_machine(replace(MACHINE, cores=3))
    assert load_machine(cache) == replace(MACHINE, cores=3)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")
    assert load_machine(cache) is None
    with pytest.raises(UsageError, match="cannot keep the probe's figures"):
        save_machine(MACHINE)

    def no_home() -> Path:
        raise RuntimeError("could not determine the home")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", no_home)
    assert load_machine(cache) is None
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        save_machine(MACHINE)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left"), SpaceError),
        (OSError(errno.EIO, "Input/output error"), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_kept_whole_or_not_at_all(
    step: str, problem: BaseException, expected: type[BaseException], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_machine(MACHINE)

    def fail(*arguments: object) -> None:
        raise problem

    with monkeypatch.context() as patch, pytest.raises(expected):
        patch.setattr(os, step, fail)
        save_machine(replace(MACHINE, cores=3))
    assert load_machine(cache) == MACHINE
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_figures_that_cannot_be_are_not_kept(cache: Path) -> None:
    for wrong in (
        replace(MACHINE, matmul_flops=math.nan),
        replace(MACHINE, reads=READS[:4]),
        replace(MACHINE, kernels={}),
    ):
        with pytest.raises(ValueError):
            save_machine(wrong)
    assert load_machine(cache) is None


def test_figures_of_another_device(cache: Path) -> None:
    path = save_machine(replace(MACHINE, device="another disk"))
    path.rename(cache_file("disk"))
    with pytest.raises(FormatError, match=r"another disk.* this is disk; run mlx_flash bench --probe"):
        load_machine(cache)


def test_an_unreadable_cache(cache: Path) -> None:
    cache_file("disk").mkdir(parents=True)
    with pytest.raises(FormatError, match="bench --probe"):
        load_machine(cache)


def damaged(cache: Path, data: bytes) -> Machine | None:
    """What is loaded from these bytes; None where they are refused as they should be."""
    path = cache_file("disk")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        return load_machine(cache)
    except FormatError as error:
        assert str(path) in str(error) and "run mlx_flash bench --probe" in str(error) and len(str(error)) < 900
        return None


WRONG = st.sampled_from(
    [None, True, "", "x", -1, 0, 0.5, 1e400, -math.inf, math.nan, 10**400, [], {}, [1], {"a": 1}, [[[]]], "9" * 5000]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, each in inner for place in places(each, (*path, key))]


VALUE = json.loads(json.dumps(asdict(MACHINE)))
PLACES = places(VALUE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), wrong=WRONG, act=st.sampled_from(["change", "remove", "add"]))
def test_a_wrong_value_anywhere(cache: Path, place: tuple[Any, ...], wrong: Any, act: str) -> None:
    changed = copy.deepcopy(VALUE)
    at = changed
    for key in place[:-1]:
        at = at[key]
    if act == "change":
        at[place[-1]] = wrong
    elif act == "remove":
        del at[place[-1]]
    elif isinstance(at, dict):
        at["another"] = wrong
    else:
        at.append(wrong)
    found = damaged(cache, json.dumps(changed).encode())
    if found is not None:  # another figure, which is as good
        found.check()
        assert found.read_rate(5000, 20, True) > 0 and found.read_rate(1 << 20, 4, False) > 0
        assert act != "change" or place[0] not in ("device", "when")
        assert act != "change" or wrong is not True or place[-1] in ("scattered", "direct")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes(cache: Path, data: bytes) -> None:
    assert damaged(cache, data) is None


def test_files_cut_short_or_endless(cache: Path) -> None:
    whole = save_machine(MACHINE).read_bytes()
    for length in range(0, len(whole) - 2, 37):
        assert damaged(cache, whole[:length]) is None
    for data in (b"[" * 100_000, b'"' + b"x" * (1 << 20) + b'"', whole + whole, b"9" * 5000):
        assert damaged(cache, data) is None


# Devices.


def fake_disk(root: Path, number: str, name: str, partition: str = "", **about: str) -> None:
    disk = root / "sys/devices" / name
    (disk / "device").mkdir(parents=True)
    for key, value in {"size": "1953525168", **about}.items():
        (disk / key.replace("__", "/")).write_text(value + "\n")
    target = disk
    if partition:
        target = disk / partition
        target.mkdir()
        (target / "partition").write_text("1\n")
    links = root / "sys/dev/block"
    links.mkdir(parents=True, exist_ok=True)
    (links / number).symlink_to(target)


@pytest.mark.skipif(not hasattr(os, "makedev"), reason="this system has no device numbers")
def test_disks_are_told_apart(tmp_path: Path) -> None:
    for k, (number, serial) in enumerate([("259:0", "A1"), ("259:7", "B2"), ("8:1", "")]):
        fake_disk(tmp_path, number, f"disk{k}", "disk0p1" if k == 0 else "", device__model="Fast  1TB ", serial=serial)
    (first, second, third) = (machine._block_device(os.makedev(*n), tmp_path) for n in ((259, 0), (259, 7), (8, 1)))
    assert first.startswith("disk0 (Fast 1TB, 1000 GB, #") and second.startswith("disk1 (Fast 1TB, 1000 GB, #")
    assert first[5:] != second[5:], "the same model twice, but for the name that a reboot may swap"
    assert third == "disk2 (Fast 1TB, 1000 GB)"
    with pytest.raises(OSError):
        machine._block_device(os.makedev(0, 45), tmp_path)


def test_file_systems_without_a_disk_of_their_own(tmp_path: Path) -> None:
    lines = ["23 22 0:41 / /data rw shared:1 - nfs4 server:/one rw", r"24 22 0:42 / /my\040disk rw - 9p host rw"]
    lines += ["22 1 0:39 / / rw - ext4 /dev/hidden rw", "22 1 0:40 / / rw - overlay overlay rw"]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")
    assert machine._mounted(Path("/data/models"), tmp_path) == "server:/one (nfs4 at /data)"
    assert machine._mounted(Path("/database"), tmp_path) == "overlay (overlay at /)"
    assert machine._mounted(Path("/my disk/x"), tmp_path) == "host (9p at /my disk)"


def test_machines_are_told_apart_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for system in (sys.platform, "darwin", "win32"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", system)
            patch.setattr(machine.platform, "node", lambda: "one.local")
            here = device_of(tmp_path)
            assert here == device_of(tmp_path / "not" / "there") and " on one (" in here
            patch.setattr(machine.platform, "node", lambda: "two")
            assert device_of(tmp_path) != here
            assert cache_file(device_of(tmp_path)) != cache_file(here)


@given(st.text())
def test_a_cache_file_lies_in_the_cache(device: str) -> None:
    path = cache_file(device)
    assert path.parent == machine.cache_folder() and path.name.isascii() and len(path.name) < 80
