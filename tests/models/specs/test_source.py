"""Where a source may lie, how it is read, and what its hash follows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.engine.storage.checkpoint import is_checkpoint
from mlx_flash.errors import FormatError, UsageError
from mlx_flash.models.specs.source import FULL_HASH_BYTES, Source, find_folder, read_buffer, source_hash
from tests.checkpoints import (
    LLAMA,
    UP,
    convert,
    make_source,
)


def test_index_cannot_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_flash.tools.random_model.SHARD_BYTES", 100_000)
    source = make_source(tmp_path, LLAMA)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))

    def attempt(shard: Any, match: str) -> None:
        changed = {n: shard if f == shards[0] else f for n, f in index["weight_map"].items()}
        attempt_map(changed, match)

    def attempt_map(changed: dict[str, Any], match: str) -> None:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(FormatError, match=match):
            convert(source, tmp_path / "flash")
        assert not (tmp_path / "flash").exists()

    shutil.copy(source / shards[0], tmp_path / "outside.safetensors")
    (source / "sub").mkdir()
    shutil.copy(source / shards[0], source / "sub" / "inside.safetensors")
    attempt("../outside.safetensors", "outside the folder")
    attempt(str(tmp_path / "outside.safetensors"), "outside the folder")
    attempt("..\\outside.safetensors", "outside the folder")
    attempt("sub/inside.safetensors", "outside the folder")
    attempt("model-00009-of-00002.safetensors", "lacks 1 of .* model-00009-of-00002")
    attempt(3, "weight_map")
    attempt(shards[1], "where it is not")
    swapped = {n: shards[f == shards[0]] for n, f in index["weight_map"].items()}
    attempt_map(swapped, "where it is not")
    shutil.copy(source / shards[0], source / "model-again.safetensors")
    attempt_map(index["weight_map"] | {UP: "model-again.safetensors"}, "is both in")


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        shutil.move(path, repo / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    convert(snapshot, tmp_path / "flash")
    assert is_checkpoint(tmp_path / "flash")
    assert not any(path.is_symlink() for path in (tmp_path / "flash").rglob("*"))


def test_repository_is_taken_from_the_cache_when_offline(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    calls: list[bool] = []

    def snapshot(repo: str, *, local_files_only: bool = False, **_: Any) -> str:
        calls.append(local_files_only)
        if local_files_only and repo == "some/model":
            return str(source)
        raise ConnectionError("no route\nto host")

    assert find_folder("some/model", download=snapshot) == source
    assert calls == [True]
    with pytest.raises(UsageError, match="other/model.*no route"):
        find_folder("other/model", download=snapshot)
    (source / "model.safetensors").unlink()  # in the cache, but not all of it
    with pytest.raises(UsageError, match="not complete"):
        find_folder("some/model", download=snapshot)


@pytest.mark.parametrize("refusal", ["none", "at opening", "at reading"])
def test_file_systems_without_direct_reads(tmp_path: Path, refusal: str) -> None:
    folder = make_source(tmp_path, LLAMA)
    opened: list[bool] = []

    class Refusing(FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    def open_file(path: Path, direct: bool) -> FileIO:
        opened.append(direct)
        if direct and refusal == "at opening":
            raise OSError(errno.EINVAL, "Invalid argument")
        return Refusing(path) if direct and refusal == "at reading" else FileIO(path)

    stored = (folder / "model.safetensors").read_bytes()
    with Source(folder, open_file) as source:
        source.open_tensors()
        for name, tensor in source.tensors.items():
            begin, count = tensor.info.offset, tensor.info.nbytes
            assert bytes(source.read(name, 0, count, read_buffer(count))) == stored[begin : begin + count], name
    assert opened == ([True] if refusal == "none" else [True, False])  # once per file, of which there is one


@pytest.mark.parametrize("sampled", [False, True])
def test_source_hash_follows_content(tmp_path: Path, sampled: bool) -> None:
    hashed = partial(source_hash, full_bytes=0 if sampled else FULL_HASH_BYTES)
    source = make_source(tmp_path, LLAMA)
    seen = {hashed(source)}
    assert hashed(source) in seen

    def check_new(**options: Any) -> None:
        value = hashed(source, **options)
        assert value not in seen
        seen.add(value)

    check_new(dtype="float16")
    (tmp_path / "tokenizer.model").write_bytes(b"1")
    check_new(tokenizer=tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"2")
    check_new(tokenizer=tmp_path / "tokenizer.model")
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    status = weights.stat()
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time says nothing has happened
    check_new()
    if sampled:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        check_new()
    else:
        copy = tmp_path / "copy"
        shutil.copytree(source, copy)
        os.utime(copy / "model.safetensors", (time.time() + 5, time.time() + 5))
        assert hashed(copy) == hashed(source)
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    check_new()
    (source / "generation_config.json").write_text("{}")
    check_new()
