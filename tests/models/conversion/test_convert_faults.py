"""A conversion that fails or is killed leaves nothing that loads, and the next one succeeds."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.engine.storage import writer
from mlx_flash.engine.storage.checkpoint import is_checkpoint
from mlx_flash.errors import ReadError, SpaceError
from tests.checkpoints import (
    CONFIGS,
    LLAMA,
    check_same,
    convert,
    make_source,
    module,
)


class FullDisk:
    """Makes the nth write of bytes fail, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int):
        self.left = nth
        write = os.write

        def failing(descriptor: int, data: Any) -> int:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        monkeypatch.setattr(writer.os, "write", failing)
        monkeypatch.setattr(writer, "CHUNK_BYTES", 16384)  # many writes of a small model


def test_disk_full_at_any_write_leaves_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path, CONFIGS["openelm"])
    before = set(os.listdir(tmp_path))
    for nth in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, nth)
            try:
                convert(source, tmp_path / "flash")
            except SpaceError:
                assert set(os.listdir(tmp_path)) == before, "leftovers"
                continue
        break
    assert disk.left > 0 and nth > 10
    check_same(source, tmp_path / "flash", "bfloat16")


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, LLAMA)
    asked: list[int] = []

    def refuse(folder: Path, needed: int) -> None:
        asked.append(needed)
        raise SpaceError("full")

    monkeypatch.setattr(module, "check_free_space", refuse)
    with pytest.raises(SpaceError):
        convert(source, tmp_path / "flash")
    monkeypatch.undo()
    convert(source, tmp_path / "flash")
    written = sum(path.stat().st_size for path in (tmp_path / "flash").rglob("*") if path.is_file())
    assert written <= asked[0] <= written + (20 << 20)


def test_source_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, LLAMA)

    def truncate(*_: Any) -> None:
        os.truncate(source / "model.safetensors", 20_000)

    monkeypatch.setattr(module, "check_free_space", truncate)
    with pytest.raises(ReadError, match="ended while reading"):
        convert(source, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_conversion_leaves_nothing_that_loads(tmp_path: Path) -> None:
    source = make_source(tmp_path, CONFIGS["openelm"])
    code = (
        "import sys, time, mlx_flash.models.conversion.converter as converter\n"
        "from mlx_flash.engine.storage import writer\n"
        "real = writer.HashedFile.write\n"
        "def slow(self, data):\n"
        "    real(self, data); print('wrote', flush=True); time.sleep(0.05)\n"
        "writer.HashedFile.write = slow\n"
        "converter.convert(sys.argv[1], sys.argv[2])\n"
    )
    flash = tmp_path / "flash"
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": root}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(flash)], stdout=subprocess.PIPE, env=environment
    )
    assert child.stdout is not None
    for _ in range(5):
        assert child.stdout.readline() == b"wrote\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not flash.exists()
    assert not any(is_checkpoint(path) for path in tmp_path.iterdir() if path.is_dir())
    convert(source, flash)
    check_same(source, flash, "bfloat16")
