"""How fast this machine reads and computes, as `mlx_flash bench --probe` measured it, and the file with the figures.

There is one file per storage device in the user's cache folder. This module neither reads bundles nor computes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.config import format_bytes
from mlx_flash.errors import FormatError, SpaceError, UsageError

VERSION = 1  # in the file's name: what another version measured is not looked at
MAX_FILE_BYTES = 1 << 20
MOST, MOST_RATE = 1 << 40, 1e18
SELECTORS = ("all", "selected")
KERNELS = (
    *("linear.bfloat16", "linear.float16", "linear.float32"),
    *("rows.bfloat16", "rows.float16", "rows.float32"),
    "predictor.int8",
)


def _check(value: Any, name: str, zero: bool = False) -> None:
    """Raise ValueError unless it is a number above zero, or zero where that is possible, that a machine can reach."""
    if type(value) not in (int, float) or not (0 < value <= MOST_RATE or (zero and value == 0)):
        raise ValueError(f"has the {name} {str(value)[:40]!r}, which is not a possible number above 0")


def _check_count(value: object, name: str) -> None:
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"has the {name} {str(value)[:40]!r}, which is not a whole number from 1 to {MOST}")


@dataclass(frozen=True)
class ReadRate:
    """The rate of reads of one kind.

    nbytes: of one read; depth: reads in flight; scattered: at random places, else one after the other; direct: around
    the page cache; bytes_per_s: of all of them together; cpu_s: processor time of one read
    """

    nbytes: int
    depth: int
    scattered: bool
    direct: bool
    bytes_per_s: float
    cpu_s: float

    def check(self) -> None:
        """Raise ValueError for impossible figures."""
        _check_count(self.nbytes, "read size")
        _check_count(self.depth, "depth")
        _check(self.bytes_per_s, "read rate")
        _check(self.cpu_s, "CPU time of a read", zero=True)
        if type(self.scattered) is not bool or type(self.direct) is not bool:
            raise ValueError("has a read that is neither scattered nor not, or neither direct nor not")


@dataclass(frozen=True)
class Machine:
    """One machine and one of its storage devices (see `device_of`).

    when: ISO date and time
    memory_bytes_per_s: reading, with as many threads as kernels use
    kernels: bytes of weights per second by KERNELS' names; "rows" is a gated FFN over scattered bundles of 18 KiB
    matmul_flops: of a prompt's matrix products, bf16 weights, 256 tokens
    layer_s: seconds per layer and token besides weights and reads, by SELECTORS' names
    reader: the class that `open_reader` picks here
    """

    device: str
    host: str
    cores: int
    when: str
    reads: tuple[ReadRate, ...]
    memory_bytes_per_s: float
    kernels: Mapping[str, float]
    matmul_flops: float
    layer_s: Mapping[str, float]
    reader: str

    def check(self) -> None:
        """Raise ValueError for impossible figures, and where some are missing."""
        for name in ("device", "host", "when", "reader"):
            if type(getattr(self, name)) is not str or not getattr(self, name):
                raise ValueError(f"has the {name} {str(getattr(self, name))[:40]!r}, which is not a text")
        datetime.fromisoformat(self.when)
        _check_count(self.cores, "number of cores")
        _check(self.memory_bytes_per_s, "memory bandwidth")
        _check(self.matmul_flops, "matmul rate")
        for names, figures, what in ((KERNELS, self.kernels, "kernels"), (SELECTORS, self.layer_s, "layer times")):
            if not isinstance(figures, Mapping) or not set(names) <= set(figures):
                raise ValueError(f"lacks some of the {what} {', '.join(names)}")
            for name, value in figures.items():
                _check(value, f"figure of {name[:40]}")
        for read in self.reads:
            read.check()
        kinds = {(read.nbytes, read.depth, read.scattered, read.direct) for read in self.reads}
        if len(kinds) < len(self.reads):
            raise ValueError("has two figures for the same reads")
        if {read.scattered for read in self.reads} != {True, False}:
            raise ValueError("lacks scattered or sequential reads")

    def measured(self, scattered: bool, direct: bool) -> bool:
        """Whether there are figures for such reads; where not, those of the other `direct` stand in for them."""
        return any(read.scattered == scattered and read.direct == direct for read in self.reads)

    def read_rate(self, nbytes: float, depth: float, scattered: bool, direct: bool = True) -> float:
        """Bytes per second of reads of `nbytes` with `depth` of them in flight: interpolated between the measured sizes
        and depths, linearly in logarithms; beyond them that of the nearest."""
        return math.exp(self._at(nbytes, depth, scattered, direct, lambda read: math.log(read.bytes_per_s)))

    def read_cpu_s(self, nbytes: float, depth: float, scattered: bool, direct: bool = True) -> float:
        """CPU seconds that one such read costs."""
        return self._at(nbytes, depth, scattered, direct, lambda read: read.cpu_s)

    def _at(
        self, nbytes: float, depth: float, scattered: bool, direct: bool, figure: Callable[[ReadRate], float]
    ) -> float:
        direct = direct if self.measured(scattered, direct) else not direct
        curves: dict[int, dict[int, float]] = {}  # size -> depth -> figure
        for read in self.reads:
            if read.scattered == scattered and read.direct == direct:
                curves.setdefault(read.nbytes, {})[read.depth] = figure(read)
        sizes = sorted(curves)
        values = [_between(depth, curves[size]) for size in sizes]
        return _between(nbytes, dict(zip(sizes, values, strict=True)))


def _between(x: float, curve: Mapping[int, float]) -> float:
    """The value of a curve of points at x, whose logarithm counts; beyond its ends that of the end."""
    points = sorted(curve)
    return float(np.interp(math.log(max(x, 1)), np.log(points), [curve[point] for point in points]))


def cache_folder() -> Path:
    """The folder of converted models and measurements: mlx_flash in the platform's cache folder."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mlx_flash"


def cache_file(device: str) -> Path:
    """Where the figures of a device are kept. Raises UsageError for a user without a home."""
    name = re.sub(r"\W", "", device.split()[0] if device.split() else "", flags=re.ASCII)[:32]
    digest = hashlib.sha256(device.encode()).hexdigest()[:12]
    try:
        folder = cache_folder()
    except RuntimeError as error:
        raise UsageError(f"there is no cache folder ({error}); set XDG_CACHE_HOME or HOME to one") from error
    return folder / f"machine-{VERSION}-{name}-{digest}.json"


def save_machine(machine: Machine) -> Path:
    """Write the figures to their file, whole or not at all; returns the file. Raises UsageError, SpaceError, and
    ValueError for figures that `load_machine` would refuse."""
    machine.check()
    path = cache_file(machine.device)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    text = json.dumps(asdict(machine), indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UsageError
        raise kind(
            f"cannot keep the probe's figures in {path} ({error.strerror or error}, {len(text)} bytes); make room or "
            "let XDG_CACHE_HOME name another folder"
        ) from error
    return path


def load_machine(path: str | os.PathLike[str]) -> Machine | None:
    """The figures of the device that holds a checkpoint; None when it was never probed, or where the user has no
    cache folder. Raises FormatError for a damaged file and for one of another device."""
    device = device_of(path)
    try:
        file = cache_file(device)
    except UsageError:
        return None
    advice = f"run mlx_flash bench --probe --dir {os.fspath(path)}"
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FormatError(f"cannot read the probe's figures in {file} ({error.strerror or error}); {advice}") from error
    try:
        machine = _from_json(data)
    except (ValueError, RecursionError) as error:  # what json raises, too
        raise FormatError(f"the probe's file {file} {str(error)[:300]}; {advice}") from error
    if machine.device != device:
        raise FormatError(f"{file} has the figures of {machine.device[:200]}, this is {device}; {advice}")
    return machine


def _from_json(data: bytes) -> Machine:
    """Raises ValueError, whose message goes on after "the file"."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {str(error)[:80]}") from error
    entry = _fields(value, Machine, "the object")
    if not isinstance(entry["reads"], list):
        raise ValueError(f"has the reads {str(entry['reads'])[:40]!r}, which are no list")
    entry["reads"] = tuple(ReadRate(**_fields(read, ReadRate, "a read")) for read in entry["reads"])
    machine = Machine(**entry)
    machine.check()
    return machine


def _fields(value: Any, kind: type[Any], what: str) -> dict[str, Any]:
    wanted = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or set(value) != wanted:
        found = ", ".join(value) if isinstance(value, dict) else str(value)
        raise ValueError(f"needs exactly the fields {', '.join(sorted(wanted))} in {what}, not {found[:80]!r}")
    return dict(value)


def device_of(path: str | os.PathLike[str]) -> str:
    """The storage device of a file or folder, which need not exist yet, and the machine, such as "nvme0n1 (Samsung 980,
    1.00 TB) on host (8 x processor)"."""
    place = Path(path).absolute()
    while True:
        with suppress(OSError, ValueError):  # not there; a name that cannot be
            place = place.resolve()
            number = place.stat().st_dev
            break
        if place == place.parent:
            number = 0
            break
        place = place.parent
    return f"{_storage(place, number)} on {_host()}"


def _storage(place: Path, number: int) -> str:
    if sys.platform == "linux":
        with suppress(OSError, ValueError, IndexError):
            return _block_device(number)
        with suppress(OSError, ValueError, IndexError):
            return _mounted(place)
    return f"device {number:#x}"


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text(errors="replace").split())
    except OSError:
        return ""


def _block_device(number: int, root: Path = Path("/")) -> str:
    """Raises OSError where the number is not that of a block device: a file system of several disks, or of none."""
    found = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    disk = found.parent if (found / "partition").exists() else found
    model = _text(disk / "device/model") or _text(disk / "device/name") or _text(disk / "dm/name")
    driver = disk / "device/driver"
    model = model or (driver.resolve().name if driver.exists() else "")
    serial = _text(disk / "serial") or _text(disk / "device/serial") or _text(disk / "wwid") or _text(disk / "dm/uuid")
    # Tells two disks of one kind apart without printing the serial number in published measurements.
    mark = "#" + hashlib.sha256(serial.encode()).hexdigest()[:6] if serial else ""
    about = [model, format_bytes(512 * int(_text(disk / "size"))), mark]
    return f"{disk.name} ({', '.join(part for part in about if part)})"


def _mounted(place: Path, root: Path = Path("/")) -> str:
    """The file system that a place belongs to, from the list of mounts."""
    best, line = -1, [""]
    for words in (text.split() for text in (root / "proc/self/mountinfo").read_text().splitlines()):
        mount = Path(_unescaped(words[4]))
        if place.is_relative_to(mount) and len(mount.parts) >= best:  # of two on one place the later one counts
            best, line = len(mount.parts), words
    kind, source = line[line.index("-") + 1], _unescaped(line[line.index("-") + 2])
    with suppress(OSError):
        return _block_device((root / source.lstrip("/")).stat().st_rdev, root)
    return f"{source} ({kind} at {_unescaped(line[4])})"


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _host() -> str:
    processor = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with suppress(OSError):
            found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            processor = " ".join(found[1].split()) if found else platform.machine()
    return f"{host_name()} ({os.cpu_count()} x {processor})"


def host_name() -> str:
    """The machine's name without the domain, which on a laptop changes with the network."""
    return platform.node().split(".")[0] or "this machine"
