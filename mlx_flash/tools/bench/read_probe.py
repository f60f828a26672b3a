"""Measures this machine's storage by size and depth of reads, with the project's own readers or with fio.

Owns the temporary file beside the checkpoint, which is removed when the probe ends, also after an error. Knows no
kernels.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from tqdm import tqdm

from mlx_flash.config import format_bytes
from mlx_flash.engine.backends.numpy.slab import NumpySlab
from mlx_flash.engine.storage.aio_reader import DEPTH, AioReader
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part
from mlx_flash.engine.storage.pread_reader import OpenFile, PreadReader
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.engine.storage.reader import LayerFile, Pending, Reader, Target
from mlx_flash.engine.storage.readers import PlainReader, open_reader
from mlx_flash.engine.storage.writer import check_free_space, lock_folder, remove_stale, sync_folder
from mlx_flash.errors import SpaceError, UsageError
from mlx_flash.runtime.machine import ReadRate

from .kernel_probe import Clock

NAME = "mlx_flash-probe"
FILE_BYTES, LEAST_FILE_BYTES = 1 << 30, 1 << 26
ROUNDS = 5
SIZES = (1536, 5120, 6144, 18432, 36864, 1 << 18)
DEPTHS = (1, 8, 32, 128, DEPTH)
SCAN_BYTES, SCAN_BUNDLE, SCAN_SIZE, SCAN_DEPTHS = 1 << 20, 1 << 14, 512, (1, 4, 16)
BUFFERED_SIZES, THREADS = (5120, 18432, 36864), 8
IN_FLIGHT_BYTES = 1 << 24  # more makes no disk faster
UNDER_WAY = 2  # requests, as when a layer's reads begin before the last one's are used
FIO_ROUNDS, FIO_SECONDS = 3, 0.3  # fio takes a while to start, too
Measurement = Callable[
    ["Kind", float], tuple[float, float]
]  # for so many seconds: bytes per second, CPU seconds a read


@dataclass(frozen=True)
class Kind:
    """One kind of reads, as in `ReadRate`."""

    nbytes: int
    depth: int
    scattered: bool
    direct: bool = True


def silent(message: str) -> None:
    """Announces nothing."""


# The file.


@contextmanager
def probe_file(folder: str | os.PathLike[str], nbytes: int = FILE_BYTES, progress: bool = False) -> Iterator[Path]:
    """A file of random bytes in a hidden folder, both removed afterwards. Its size is `nbytes`, or half of the free
    space of the disk if that is less. Also removes files of probes that were killed. Raises UsageError, SpaceError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"cannot probe {folder}: it is no folder; give one on the disk that the model will lie on")
    made = folder / f".{NAME}.partial-{os.getpid()}"
    lock = -1
    try:
        try:
            remove_stale(folder, NAME)
            # Fails if the folder exists, which then belongs to another probe of this process.
            made.mkdir()
        except OSError as error:
            raise UsageError(
                f"cannot write in {folder} ({error.strerror or error}); name a folder on the same disk that can be "
                "written with --dir"
            ) from error
        try:
            lock = lock_folder(made)
            _write(made / "reads.bin", _file_bytes(folder, nbytes), progress)
            yield made / "reads.bin"
        finally:
            shutil.rmtree(made, ignore_errors=True)
    finally:
        if lock >= 0:
            os.close(lock)


def _file_bytes(folder: Path, nbytes: int) -> int:
    fitting = min(nbytes, shutil.disk_usage(folder).free // 2) >> 20 << 20
    if fitting < min(nbytes, LEAST_FILE_BYTES):
        check_free_space(folder, 2 * min(nbytes, LEAST_FILE_BYTES))
    return max(fitting, min(nbytes, LEAST_FILE_BYTES))


def _write(path: Path, nbytes: int, progress: bool) -> None:
    """Write random bytes, which neither a disk nor a file system can compress."""
    numbers = np.random.Generator(np.random.SFC64())
    try:
        with (
            open(path, "xb", buffering=0) as file,
            tqdm(total=nbytes, desc="writing", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            if sys.platform == "darwin":  # else its pages answer reads that should go to the disk; not run here
                import fcntl

                fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
            while left := nbytes - file.tell():
                piece = numbers.integers(1 << 64, size=1 << 17, dtype=np.uint64)
                bar.update(file.write(piece.view(np.uint8)[:left].data))
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
        raise SpaceError(
            f"no room for the probe's file {path}: {format_bytes(nbytes)} ({nbytes} bytes) are needed; make room, or "
            "name another folder with --dir"
        ) from error


# Which reads, and by whom.


def reader_name(file: Path) -> str:
    """The class that `open_reader` picks for this file's system."""
    with open_reader([LayerFile(file, _layout(file, SCAN_BUNDLE))]) as reader:
        return type(reader).__name__


def _layout(file: Path, nbytes: int) -> Layout:
    """The file as bundles of `nbytes`, a multiple of 512."""
    return Layout((Part("all", "float32", nbytes // 4),), (file.stat().st_size - DATA_START) // nbytes)


def goes_around(file: Path) -> bool:
    """Whether reads of this file can go around the page cache."""
    if not hasattr(os, "preadv"):
        return False
    return sys.platform == "darwin" or OpenFile(file, True).align > 1


def _drop(file: Path) -> None:
    """Remove the file from the page cache. That needs no root: the file is this user's, and written."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_drop(file: Path) -> bool:
    """Whether `_drop` empties the page cache, judged by reads that only the page cache can answer."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return False
    _drop(file)
    there, tried, size = 0, 64, file.stat().st_size
    with open(file, "rb", buffering=0) as opened:
        for k in range(tried):
            try:
                there += os.preadv(opened.fileno(), [bytearray(1)], size * k // tried, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # a file system that cannot tell
                return False
    return there <= tried // 16


def kinds(reader: str, direct: bool, can_drop: bool, announce: Callable[[str], None] = silent) -> list[Kind]:
    """The kinds of reads to measure, given what the file and the reader can do."""
    deepest = {"AioReader": DEPTH, "PreadReader": 32}.get(reader, 1)
    found = [Kind(size, depth, True) for size in SIZES for depth in DEPTHS if size * depth <= IN_FLIGHT_BYTES]
    found = [kind for kind in found if kind.depth <= deepest]
    found += [Kind(SCAN_BYTES, depth, False) for depth in SCAN_DEPTHS if depth <= deepest]
    buffered = [Kind(size, min(THREADS, deepest), True, False) for size in BUFFERED_SIZES]
    buffered.append(Kind(SCAN_BYTES, min(THREADS, deepest), False, False))
    if not can_drop:
        missing = "the page cache cannot be emptied of a file here: "
        if direct:
            announce(missing + "reads through it are not measured, for they may never reach the disk")
            return found
        announce(missing + "reads cannot go around it either, so the figures may be those of memory")
    return found + buffered if direct else buffered


# Reading.


def measure_reads(
    asked: Sequence[Kind],
    runs: Mapping[str, Measurement],
    seconds: float,
    step: Callable[[], object] = lambda: None,
    rounds: int = ROUNDS,
) -> dict[str, tuple[ReadRate, ...]]:
    """The rates that each contestant reaches in each kind of reads: medians of rounds in which they take turns."""
    found: dict[tuple[str, Kind], list[tuple[float, float]]] = {(name, kind): [] for name in runs for kind in asked}
    each = seconds / rounds / len(asked) / len(runs)
    for number in range(rounds):
        turn = number % len(runs)  # a disk that was spared is faster for a while
        for kind in asked:
            for name in [*runs][turn:] + [*runs][:turn]:
                found[name, kind].append(runs[name](kind, each))
            step()
    medians = {key: [statistics.median(column) for column in zip(*each, strict=True)] for key, each in found.items()}
    return {
        name: tuple(
            ReadRate(kind.nbytes, kind.depth, kind.scattered, kind.direct, *medians[name, kind]) for kind in asked
        )
        for name in runs
    }


def _requests(kind: Kind, size: int, count: int) -> list[np.ndarray]:
    """Ids of up to 64 requests of `size` bundles, none twice."""
    number = max(1, min(64, count // size))
    if not kind.scattered:
        begin = np.random.default_rng().integers(count // size - number + 1) * size
        return [np.arange(begin + k * size, begin + (k + 1) * size) for k in range(number)]
    ids = np.random.default_rng().choice(count, number * size, replace=False)
    return [np.sort(part) for part in np.split(ids, number)]


class Reading:
    """Measures the project's reader `name` on a file. Opened readers are kept, one for each depth, as the system may
    take 30 ms to end one. A context manager. open_kind, clock: for tests."""

    def __init__(
        self, file: Path, name: str, *, open_kind: Callable[[Kind], Reader] | None = None, clock: Clock = time
    ):
        self.file, self.name, self.clock = file, name, clock
        self._open = open_kind or self._open_own
        self.sizes = sorted({*SIZES, *BUFFERED_SIZES, SCAN_BUNDLE})  # a bundle size is a layer to the reader
        self.layers = [LayerFile(file, _layout(file, size)) for size in self.sizes]
        self._readers: dict[tuple[int, bool, bool], Reader] = {}
        layout = Layout((Part("all", "float32", IN_FLIGHT_BYTES // 4),), 1)
        self.memory = [NumpySlab(layout, 1, ["all"]).targets[0].rows[0] for _ in range(UNDER_WAY)]
        for each in self.memory:
            each[:] = 0  # its pages exist before a clock runs

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers.values():
            reader.close()

    def __call__(self, kind: Kind, seconds: float) -> tuple[float, float]:
        """Measure requests, UNDER_WAY at a time. Through the page cache, which is emptied first, every byte is read
        at most once, so the time may be shorter."""
        nbytes = kind.nbytes if kind.scattered else SCAN_BUNDLE
        layer = self.sizes.index(nbytes)
        count = self.layers[layer].layout.count
        size = max(64, min(8 * kind.depth, DEPTH, IN_FLIGHT_BYTES // nbytes)) if kind.scattered else SCAN_SIZE
        size = min(size, count)
        asked, rows = _requests(kind, size, count), np.arange(size)
        targets = [[Target(0, each[: size * nbytes].reshape(size, nbytes))] for each in self.memory]
        reader = self._reader(kind)
        reader.submit(layer, asked[0][:1], rows[:1], targets[0]).wait()  # opens the file
        if not kind.direct and hasattr(os, "posix_fadvise"):
            _drop(self.file)
        done = reads = 0
        under_way: list[Pending] = []
        cpu, begin = self.clock.process_time(), self.clock.perf_counter()
        while True:
            more = (not done or self.clock.perf_counter() - begin < seconds) and (kind.direct or done < len(asked))
            if more and len(under_way) < UNDER_WAY:
                slab = targets[done % UNDER_WAY]
                under_way.append(reader.submit(layer, asked[done % len(asked)], rows, slab))
                done += 1
            elif under_way:
                reads += under_way.pop(0).wait().reads
            else:
                break
        took = self.clock.perf_counter() - begin
        return done * size * nbytes / took, (self.clock.process_time() - cpu) / reads

    def _reader(self, kind: Kind) -> Reader:
        key = kind.depth, kind.scattered, kind.direct
        if key not in self._readers:
            self._readers[key] = self._open(kind)
        return self._readers[key]

    def _open_own(self, kind: Kind) -> Reader:
        merging = Merging(share=0) if kind.scattered else Merging(piece_bytes=SCAN_BYTES)
        if self.name == "PlainReader":
            return PlainReader(self.layers)
        if self.name == "PreadReader" or not kind.direct:
            return PreadReader(self.layers, threads=kind.depth, direct=kind.direct, merging=merging)
        return AioReader(self.layers, merging=merging, depth=kind.depth)


# fio.


def fio_rates(
    file: Path, seconds: float = FIO_SECONDS, announce: Callable[[str], None] = silent
) -> list[tuple[ReadRate, ReadRate]] | None:
    """Pairs of rates, the project's reader and fio in turn, with the same size, depth and file (one of
    `probe_file`). None where fio is missing or cannot read like this; `announce` is called with the reason."""
    name = reader_name(file)
    if not shutil.which("fio"):
        announce("fio is not installed: nothing to compare the reader with (apt install fio)")
        return None
    if not goes_around(file) or sys.platform != "linux":
        announce("this system has no libaio, or this file no direct reads: fio's would not be the same")
        return None
    asked = kinds(name, True, False)
    deepest = {kind.nbytes: kind.depth for kind in asked}
    asked = [kind for kind in asked if kind.depth in (1, deepest[kind.nbytes])]
    try:
        with Reading(file, name) as reading:
            runs: dict[str, Measurement] = {name: reading, "fio": lambda kind, limit: run_fio(file, kind, limit)}
            found = measure_reads(asked, runs, seconds * len(runs) * len(asked) * FIO_ROUNDS, rounds=FIO_ROUNDS)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        announce(f"fio failed: {str(error)[:300]}")
        return None
    return list(zip(found[name], found["fio"], strict=True))


def run_fio(file: Path, kind: Kind, seconds: float) -> tuple[float, float]:
    """The same reads by fio. Raises OSError where fio fails; a JSON answer of another form raises other errors."""
    command = ["fio", "--name=reads", f"--filename={file}", "--readonly", "--ioengine=libaio", "--direct=1"]
    command += [f"--rw={'randread' if kind.scattered else 'read'}", f"--bs={kind.nbytes}", f"--iodepth={kind.depth}"]
    command += [f"--runtime={max(1, round(1000 * seconds))}ms", "--time_based", "--norandommap"]
    done = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True)
    if done.returncode:
        raise OSError((done.stderr or done.stdout).strip()[-300:])
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return job["read"]["io_bytes"] / (job["read"]["runtime"] / 1000), cpu / job["read"]["total_ios"]
