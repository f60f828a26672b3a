"""Reading a JSON object: what is no such file is refused by name, and nothing waits for a pipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_flash.engine.storage.json_file import MAX_JSON_BYTES, read_json
from mlx_flash.errors import FormatError, ReadError


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, "\u00e9"]}', "utf-8")
    assert read_json(path) == {"a": [1, "\u00e9"]}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[1]", "holds a JSON list where an object belongs"),
        (b"{", "is not readable as JSON"),
        (b"\xff{}", "is not readable as JSON"),
        (b"[" * 100_000, "is not readable as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"{path} {problem}"):
        read_json(path)


def test_a_long_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(FormatError, match="is longer than"):
        read_json(path)


def test_a_missing_file_a_folder_and_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="cannot read .*none"):
        read_json(tmp_path / "none")
    with pytest.raises(FormatError, match="is not a regular file"):
        read_json(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FormatError, match="is not a regular file"):
            read_json(tmp_path / "pipe")
