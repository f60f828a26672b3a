"""A checkpoint folder appears whole, with true hashes, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.storage import writer as writer_module
from mlx_flash.engine.storage.writer import FolderWriter, check_free_space, config_bytes, is_safe_name
from mlx_flash.errors import FlashError, ReadError, SpaceError, UsageError

CONFIG = {"model_type": "llama", "flash": {"format_version": 1}}


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_committed_folder(tmp_path):
    final = tmp_path / "deep" / "model"
    source = tmp_path / "tokenizer.json"
    source.write_bytes(b"{}" * 700_000)
    with FolderWriter(final) as writer:
        with writer.open("flash/layer-000.safetensors") as file:
            file.write(np.arange(10, dtype=np.uint16).reshape(2, 5))
            file.write(b"")
            file.write(np.zeros((0, 4)))
            file.write(memoryview(b"end"))
        writer.write_bytes("empty", b"")
        writer.copy_file(source, "tokenizer.json")
        assert not final.exists()
        writer.commit(CONFIG)
        assert final.exists()
    assert listing(tmp_path / "deep") == ["model"]
    layer = np.arange(10, dtype=np.uint16).tobytes() + b"end"
    assert (final / "flash" / "layer-000.safetensors").read_bytes() == layer
    assert (final / "empty").read_bytes() == b""
    assert (final / "tokenizer.json").read_bytes() == source.read_bytes()
    config = json.loads((final / "config.json").read_text())
    assert config["model_type"] == "llama" and config["flash"]["format_version"] == 1
    assert config["flash"]["files"] == {
        "flash/layer-000.safetensors": {"bytes": 23, "sha256": sha256(layer)},
        "empty": {"bytes": 0, "sha256": sha256(b"")},
        "tokenizer.json": {"bytes": 1_400_000, "sha256": sha256(source.read_bytes())},
    }
    assert CONFIG == {"model_type": "llama", "flash": {"format_version": 1}}


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 511, 4096, 8191, 8192, 30_000]), max_size=12))
def test_any_sizes_of_writes(tmp_path_factory, direct, sizes):
    """Small chunks, so that many are under way; the caller's buffer is changed as soon as `write` returns."""
    folder = tmp_path_factory.mktemp("sizes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "CHUNK_BYTES", 8192)
        patch.setattr(writer_module, "SYNC_BYTES", 16384)
        if not direct:
            patch.setattr(writer_module, "_DIRECT", 0)
        expected = []
        with FolderWriter(folder / "model") as writer:
            with writer.open("a") as first, writer.open("b") as second:
                for i, size in enumerate(sizes):
                    buffer = np.random.default_rng(i).integers(0, 256, size, np.uint8)
                    expected.append(buffer.tobytes())
                    first.write(buffer)
                    second.write(buffer[::-1].copy())
                    buffer[:] = 0
            writer.commit(CONFIG)
    data = b"".join(expected)
    assert (folder / "model" / "a").read_bytes() == data
    assert writer.files["a"] == {"bytes": len(data), "sha256": sha256(data)}
    mirrored = b"".join(piece[::-1] for piece in expected)
    assert (folder / "model" / "b").read_bytes() == mirrored
    assert writer.files["b"] == {"bytes": len(data), "sha256": sha256(mirrored)}


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, None])
def test_nothing_is_left_without_a_commit(tmp_path, stop):
    def build():
        with FolderWriter(tmp_path / "model") as writer:
            writer.write_bytes("flash/a", b"x" * 100)
            file = writer.open("b")
            file.write(bytes(20 << 20))
            if stop is not None:
                raise stop

    if stop is None:
        build()
    else:
        with pytest.raises(stop):
            build()
    assert listing(tmp_path) == []


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="model exists; remove it"), FolderWriter(tmp_path / "model"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="link exists"), FolderWriter(tmp_path / "link"):
        pass
    with pytest.raises(UsageError, match="has appeared"), FolderWriter(tmp_path / "late") as writer:
        (tmp_path / "late").mkdir()
        writer.commit(CONFIG)
    assert listing(tmp_path) == ["late", "link", "model"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot make the folder"), FolderWriter(tmp_path / "file" / "model"):
        pass


KILLED = """
import os, sys
from mlx_flash.engine.storage.writer import FolderWriter
with FolderWriter(sys.argv[1]) as writer:
    writer.open("flash/a").write(b"x" * 100)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_nothing_that_stays(tmp_path):
    """While it lives its folder is left alone; once it is dead the next writer removes it."""
    final = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(final)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = process.stdout.readline().strip()
    partial = f".model.partial-{pid}"
    (tmp_path / ".model.partial-other").mkdir()
    (tmp_path / ".model2.partial-1").mkdir()
    try:
        with FolderWriter(final) as writer:
            assert partial in listing(tmp_path)
            writer.write_bytes("a", b"1")
    finally:
        process.kill()
        process.communicate()
    assert partial in listing(tmp_path) and not final.exists()
    (tmp_path / f".model.partial-{os.getpid()}").mkdir()  # what an earlier process of the same number left
    with FolderWriter(final) as writer:
        assert partial not in listing(tmp_path)
        writer.commit(CONFIG)
    assert listing(tmp_path) == [".model.partial-other", ".model2.partial-1", "model"]


def test_two_writers_of_one_process(tmp_path):
    with FolderWriter(tmp_path / "model") as writer:
        with (
            pytest.raises(UsageError, match="is being written already"),
            FolderWriter(tmp_path / "model"),
        ):
            pass
        writer.write_bytes("a", b"1")
        writer.commit(CONFIG)
    assert listing(tmp_path / "model") == ["a", "config.json"]


class FullDisk:
    """Stands in for os.write: the disk is full after `room` bytes, having taken what still fitted."""

    def __init__(self, room, number=errno.ENOSPC):
        self.real, self.room, self.number = os.write, room, number

    def __call__(self, fd, data):
        if len(data) < 512:  # not ours: somebody else's pipe
            return self.real(fd, data)
        if self.room <= 0:
            raise OSError(self.number, os.strerror(self.number))
        count = self.real(fd, data[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize("room", [0, 10 << 20])
def test_a_full_disk(tmp_path, monkeypatch, room):
    def build():
        with FolderWriter(tmp_path / "model") as writer:
            monkeypatch.setattr(os, "write", FullDisk(room))
            with writer.open("a") as file:
                for _ in range(8):
                    file.write(bytes(8 << 20))
            writer.commit(CONFIG)

    with pytest.raises(SpaceError, match=r"no room for .*a: .*\(\d+ bytes\).*are free; make room"):
        build()
    assert listing(tmp_path) == []


def test_a_broken_disk(tmp_path, monkeypatch):
    with (
        pytest.raises(FlashError, match="cannot write .*Input/output error"),
        FolderWriter(tmp_path / "model") as writer,
    ):
        monkeypatch.setattr(os, "write", FullDisk(0, errno.EIO))
        writer.write_bytes("a", bytes(1000))
    assert listing(tmp_path) == []


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    data = np.random.default_rng(0).bytes(9_000_001)
    with FolderWriter(tmp_path / "model") as writer:
        writer.write_bytes("a", data)
        writer.commit(CONFIG)
    assert (tmp_path / "model" / "a").read_bytes() == data


def test_a_source_that_cannot_be_read(tmp_path):
    with pytest.raises(ReadError, match="missing"), FolderWriter(tmp_path / "model") as writer:
        writer.copy_file(tmp_path / "missing", "a")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "../a", "a/../b", "./a", "a//b", "c:a", "a\\b", "a\0", "config.json", "once"]
)
def test_names_stay_within_the_folder(tmp_path, name):
    with FolderWriter(tmp_path / "model") as writer:
        writer.write_bytes("once", b"")
        with pytest.raises(ValueError):
            writer.open(name)
    assert is_safe_name("flash/layer-000.safetensors") and is_safe_name("..a/b..")


def test_files_must_be_closed_before_a_commit(tmp_path):
    with FolderWriter(tmp_path / "model") as writer:
        file = writer.open("a")
        with pytest.raises(ValueError, match="not closed"):
            writer.commit(CONFIG)
        file.close()
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.write(b"1")
        writer.commit(CONFIG)


def test_config_carries_its_own_hash():
    data = config_bytes({"a": "\u00e9", "flash": {"config_sha256": "old", "files": {}}})
    digest = json.loads(data)["flash"]["config_sha256"]
    assert sha256(data.replace(digest.encode(), b"0" * 64)) == digest
    with pytest.raises(ValueError):
        config_bytes({"a": "0" * 64, "flash": {}})


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    """Files, then folders, then the rename, then the parent, lest a power cut leave half of it."""
    events = []
    real_sync, real_rename = os.fsync, os.rename
    where = {}
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or real_sync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append("rename") or real_rename(a, b))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is synced")
    with FolderWriter(tmp_path / "model") as writer:
        where = str(writer.path)
        writer.write_bytes("flash/a", b"1")
        writer.commit(CONFIG)
    at = events.index("rename")
    assert set(events[:at]) == {where, f"{where}/flash", f"{where}/flash/a", f"{where}/config.json"}
    assert events.index(f"{where}/flash/a") < events.index(f"{where}/flash")
    assert events[at + 1 :] == [str(tmp_path)]


def test_free_space(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(SpaceError, match=r"needs 1000000000 GB \(10{18} bytes\), its disk has .* free"):
        check_free_space(tmp_path / "not" / "yet", 10**18)
