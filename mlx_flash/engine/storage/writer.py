"""Writing a checkpoint folder atomically: it appears whole, with the hash of every file recorded, or not at all.

Knows files, bytes and hashes, not what the files mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_flash.config import format_bytes
from mlx_flash.errors import FlashError, ReadError, SpaceError, UsageError

CONFIG = "config.json"
CHUNK_BYTES = 8 << 20  # a multiple of every alignment that direct writes ask for
CHUNKS_IN_FLIGHT = 3
SYNC_BYTES = 32 << 20
NO_DIGEST = "0" * 64
_DIRECT = getattr(os, "O_DIRECT", 0)


def check_free_space(folder: str | os.PathLike[str], needed_bytes: int) -> None:
    """Raise SpaceError unless the disk of `folder`, which need not exist yet, has `needed_bytes` free."""
    free = _free_bytes(Path(folder))
    if free < needed_bytes:
        missing = format_bytes(needed_bytes - free)
        raise SpaceError(
            f"{folder} needs {format_bytes(needed_bytes)} ({needed_bytes} bytes), its disk has "
            f"{format_bytes(free)} ({free} bytes) free; make {missing} of room or choose another disk"
        )


def config_bytes(config: dict[str, Any]) -> bytes:
    """The bytes of config.json. Its "flash"."config_sha256" is the SHA-256 of these bytes with 64 zeros in place of the
    digest."""
    flash = {key: value for key, value in config["flash"].items() if key != "config_sha256"}
    whole = {**config, "flash": {**flash, "config_sha256": NO_DIGEST}}
    data = (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()
    if data.count(NO_DIGEST.encode()) != 1:
        raise ValueError("config.json must not hold 64 zeros in a row: they stand for its own digest")
    return data.replace(NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode())


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sync_folder(folder: Path) -> None:
    """Bring a folder to the disk: without it a new or renamed file is lost in a power cut."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class HashedFile:
    """A file that is being written. Two other threads hash and write copies of its data meanwhile.

    Direct writes where the file system has them, else the page cache is emptied as it fills: a checkpoint is
    larger than memory.
    """

    def __init__(self, folder: FolderWriter, name: str, path: Path):
        self.name, self.path, self.nbytes = name, path, 0
        self._folder, self._digest = folder, hashlib.sha256()
        self._chunk: memoryview | None = None
        self._filled = 0
        self._in_flight: deque[tuple[memoryview, Future[None], Future[None]]] = deque()
        self._unsynced = 0
        self._closed = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._fd, self._direct = self._create(flags)

    def write(self, buffer: Any) -> None:
        """Append the bytes of any C-contiguous buffer, which may be changed as soon as this returns.

        Raises SpaceError, or FlashError when the disk fails; perhaps only at a later call.
        """
        if self._closed:
            raise ValueError(f"{self.name} is closed")
        view = memoryview(buffer)
        if not view.nbytes:
            return
        view = view.cast("B")
        while view:
            if self._chunk is None:
                self._chunk, self._filled = self._folder.take_chunk(), 0
            count = min(len(view), CHUNK_BYTES - self._filled)
            self._chunk[self._filled : self._filled + count] = view[:count]
            self._filled += count
            self.nbytes += count
            view = view[count:]
            if self._filled == CHUNK_BYTES:
                self._flush()

    def close(self) -> None:
        """Write what is left, bring it to the disk and record size and hash. A second call does nothing."""
        if self._closed:
            return
        if self._chunk is not None:
            self._flush()
        while self._in_flight:
            self._settle()
        self._folder.write_thread.submit(self._guard, self._sync).result()
        self._closed = True
        os.close(self._fd)
        self._folder.files[self.name] = {"bytes": self.nbytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close without a record; the folder does this when it is not committed."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _create(self, flags: int) -> tuple[int, bool]:
        if _DIRECT:
            try:
                return os.open(self.path, flags | _DIRECT, 0o666), True
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.path.unlink(missing_ok=True)  # some file systems create it before they refuse
        fd = os.open(self.path, flags, 0o666)
        if sys.platform == "darwin":  # not run here
            import fcntl

            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        return fd, False

    def _flush(self) -> None:
        assert self._chunk is not None
        chunk, self._chunk = self._chunk, None
        data = chunk[: self._filled]
        hashing = self._folder.hash_thread.submit(self._digest.update, data)
        writing = self._folder.write_thread.submit(self._guard, lambda: self._write(data))
        self._in_flight.append((chunk, hashing, writing))
        if len(self._in_flight) >= CHUNKS_IN_FLIGHT:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest chunk."""
        chunk, hashing, writing = self._in_flight.popleft()
        hashing.result()
        writing.result()
        self._folder.free_chunks.append(chunk)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise self._folder.explain(error, self.path) from error

    def _write(self, data: memoryview) -> None:
        """On the writing thread."""
        while data:
            try:
                count = os.write(self._fd, data)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._leave_direct()  # the end of the file is not aligned, nor what a short write leaves
                continue
            data = data[count:]
            self._unsynced += count
        if not self._direct and self._unsynced >= SYNC_BYTES:
            self._sync()

    def _leave_direct(self) -> None:
        import fcntl

        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT)
        self._direct = False

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._unsynced = 0
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class FolderWriter:
    """Builds the folder `final` in a hidden folder beside it; only `commit` makes it appear, whole.

    A context manager. Entering raises UsageError where `final` exists or cannot be made; leaving without a
    commit, for whatever reason, removes everything. Entering also removes what killed processes left behind.
    """

    def __init__(self, final: str | os.PathLike[str]):
        self.final = Path(final).absolute()
        self.path = self.final.with_name(f".{self.final.name}.partial-{os.getpid()}")
        self.files: dict[str, dict[str, Any]] = {}
        self.free_chunks: list[memoryview] = []
        self._opened: list[HashedFile] = []
        self._lock_fd = -1

    def __enter__(self) -> FolderWriter:
        if os.path.lexists(self.final):
            raise UsageError(f"{self.final} exists; remove it or choose another name")
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(self.final.parent, self.final.name)
            if self.path.exists():
                raise UsageError(f"{self.final} is being written already, in {self.path}")
            self.path.mkdir()
            self._lock_fd = lock_folder(self.path)
        except OSError as error:
            raise UsageError(f"cannot make the folder {self.path}: {error.strerror or error}") from error
        self.hash_thread = ThreadPoolExecutor(1, "mlx_flash-hash")
        self.write_thread = ThreadPoolExecutor(1, "mlx_flash-write")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hash_thread.shutdown(cancel_futures=True)
        self.write_thread.shutdown(cancel_futures=True)
        for file in self._opened:
            file.abandon()
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def open(self, name: str) -> HashedFile:
        """A new file; `name` is relative, with forward slashes. Close it before `commit`."""
        if not is_safe_name(name) or name == CONFIG or name in (file.name for file in self._opened):
            raise ValueError(f"{name!r} is not a new name within the folder")
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = HashedFile(self, name, path)
        except OSError as error:
            raise self.explain(error, path) from error
        self._opened.append(file)
        return file

    def write_bytes(self, name: str, data: bytes) -> None:
        """A small file in one go."""
        with self.open(name) as file:
            file.write(data)

    def copy_file(self, source: str | os.PathLike[str], name: str) -> None:
        """Copy a file from elsewhere, following links. Raises ReadError where it cannot be read."""
        buffer = memoryview(bytearray(1 << 20))
        with self.open(name) as file:
            try:
                with open(source, "rb", buffering=0) as reading:
                    while count := reading.readinto(buffer):
                        file.write(buffer[:count])
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(reading.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise ReadError(f"cannot read {os.fspath(source)}: {error.strerror or error}") from error

    def commit(self, config: dict[str, Any]) -> None:
        """Write config.json, with size and hash of every file under "flash"."files", and make it appear
        under its final name. `config` itself is not changed. Raises SpaceError, UsageError, FlashError."""
        unclosed = [file.name for file in self._opened if file.name not in self.files]
        if unclosed:
            raise ValueError(f"not closed before commit: {', '.join(unclosed)}")
        data = config_bytes({**config, "flash": {**config["flash"], "files": self.files}})
        try:
            with open(self.path / CONFIG, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            for folder in {path.parent for path in map(self.path.joinpath, [*self.files, CONFIG])}:
                sync_folder(folder)
            if os.path.lexists(self.final):
                raise UsageError(f"{self.final} has appeared meanwhile; remove it or choose another name")
            os.rename(self.path, self.final)
            sync_folder(self.final.parent)
        except OSError as error:
            raise self.explain(error, self.path) from error

    def take_chunk(self) -> memoryview:
        """Page-aligned memory of CHUNK_BYTES; files hand it back to `free_chunks`."""
        return self.free_chunks.pop() if self.free_chunks else memoryview(mmap.mmap(-1, CHUNK_BYTES))

    def explain(self, error: OSError, path: Path) -> FlashError:
        """The error to raise for an OSError while writing: it says what the user can do."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return FlashError(f"cannot write {path}: {error.strerror or error}")
        written = sum(file.nbytes for file in self._opened)
        return SpaceError(
            f"no room for {path}: {format_bytes(written)} ({written} bytes) of this checkpoint were written, "
            f"{format_bytes(_free_bytes(path.parent))} are free; make room or choose another disk"
        )


def remove_stale(parent: Path, name: str | None = None) -> None:
    """Remove the unfinished folders of `name` in `parent` whose process has died: nobody holds their lock.

    Without a name: of all names, if nothing was done there for a minute (a new folder is locked a moment after it
    appears). Where there is no `parent` yet, nothing happens.
    """
    wanted = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.partial-\d+")
    for path in list(parent.iterdir()) if parent.is_dir() else ():
        if not wanted.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        if name is not None or time.time() - path.stat().st_mtime > 60:
            fd = lock_folder(path)
            if fd >= 0:
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)


def is_safe_name(name: str) -> bool:
    """Whether a name from a file stays within its folder on every system: relative, no `..`, no drive."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not set(name) & set("\\:\0")


def lock_folder(path: Path) -> int:
    """A descriptor that holds the folder's lock, or -1 where another process does, or locks are unknown."""
    if sys.platform == "win32":
        return -1
    import fcntl

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd
