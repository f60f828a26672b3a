"""Which folders are models, however their files got there, and which are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mlx_flash.cli import main
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import FlashError, FormatError, UsageError
from mlx_flash.models.specs.folder import INDEX, WEIGHTS, safe_file, weight_files
from mlx_flash.models.specs.source import find_folder
from mlx_flash.runtime.model_path import resolve_model
from tests.checkpoints import LLAMA, check_same, convert, make_source

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "made", LLAMA)


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In several files, without an index."""
    monkeypatch.setattr("mlx_flash.tools.random_model.SHARD_BYTES", 60_000)
    folder = make_source(tmp_path / "sharded", LLAMA)
    (folder / INDEX).unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def linked(source: Path, folder: Path) -> Path:
    """A folder of links to another one's files."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_links_into_a_hugging_face_cache_or_to_another_disk_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    for name, place in (("disk", source), ("cache", snapshot)):
        folder = linked(place, tmp_path / name)
        flash = convert(folder, tmp_path / f"flash-{name}")
        check_same(source, flash, "bfloat16")
        assert not any(path.is_symlink() for path in flash.rglob("*"))


def test_a_folder_that_is_itself_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    check_same(source, convert(tmp_path / "link", tmp_path / "flash"), "bfloat16")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("problem", ["circle", "dangling"])
def test_links_that_lead_nowhere_are_named(
    source: Path, name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (source / name).unlink(missing_ok=True)
    (source / "other").symlink_to(name)
    (source / name).symlink_to("other" if problem == "circle" else "gone")
    words = "leads back to itself" if problem == "circle" else "a link to gone, which does not exist"
    for attempt in (lambda: convert(source, tmp_path / "flash"), lambda: resolve_model(source)):
        with pytest.raises(FormatError, match=f"{name} is .*{words}|{words}"):
            attempt()
    assert not (tmp_path / "flash").exists()


def test_a_folder_behind_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for attempt in (find_folder, resolve_model):
        with pytest.raises(UsageError, match=r"a is a link to b, which leads to no folder"):
            attempt(tmp_path / "a")


def test_names_in_files_do_not_leave_the_folder(source: Path) -> None:
    for name in ("../config.json", str(source / "config.json"), "sub/config.json", "..\\config.json", "C:x", ".."):
        with pytest.raises(FormatError, match="outside the folder"):
            safe_file(source, name)
    (source / INDEX).mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        safe_file(source, INDEX)


def test_shards_without_an_index(shards: Path, tmp_path: Path) -> None:
    check_same(shards, convert(shards, tmp_path / "flash"), "bfloat16")


def test_a_gap_in_the_numbering_is_named(shards: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in shards.glob("model-*.safetensors"))
    for missing in (names[0], names[1], names[-1]):
        copy = shutil.copytree(shards, tmp_path / missing)
        (copy / missing).unlink()
        with pytest.raises(FormatError, match=f"lacks 1 of {len(names)} shards: {missing}"):
            convert(copy, tmp_path / "flash")
    shutil.copy(shards / names[0], shards / "model-00001-of-00099.safetensors")
    with pytest.raises(FormatError, match=f"of {len(names)} and of 99"):
        weight_files(shards)


def test_a_number_of_shards_that_nothing_has_does_not_take_for_ever(source: Path) -> None:
    (source / WEIGHTS).rename(source / "model-00001-of-99999999999999.safetensors")
    with pytest.raises(FormatError, match="lacks 99999999999998 of 99999999999999 shards: .* more") as error:
        weight_files(source)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model-q4.gguf": b"GGUF"}, "GGUF, the format of llama.cpp.*safetensors"),
        ({"weights.npz": b"PK"}, "npz, the format of old releases of MLX.*mlx_lm.convert"),
        ({"pytorch_model.bin": b"PK"}, "pickle format only.*save_pretrained"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_folders_of_other_formats(
    files: dict[str, bytes], words: str, with_config: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for attempt in (lambda: resolve_model(tmp_path), lambda: convert(tmp_path, tmp_path / "flash")):
        with pytest.raises(FormatError, match=words):
            attempt()
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "FormatError"


@pytest.mark.parametrize("name", ["model.gguf", "blob"])
def test_a_gguf_file_in_place_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(20))
    for attempt in (find_folder, resolve_model):
        with pytest.raises(FlashError, match=f"{name} is GGUF, the format of llama.cpp"):
            attempt(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "generation_config.json"])
def test_git_lfs_pointers_are_named(source: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (source / name).write_bytes(POINTER)
    for attempt in (lambda: convert(source, tmp_path / "flash"), lambda: resolve_model(source)):
        with pytest.raises(FormatError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
            attempt()
    assert not (tmp_path / "flash").exists() and not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "flash/layer-001.safetensors"])
def test_a_flash_checkpoint_cloned_without_git_lfs(source: Path, name: str, tmp_path: Path) -> None:
    flash = convert(source, tmp_path / "flash")
    (flash / name).write_bytes(POINTER)
    with pytest.raises(FormatError, match=f"{os.path.basename(name)} is a Git LFS pointer"):
        Checkpoint.open(flash)


def test_a_flash_checkpoint_may_be_links_into_a_hugging_face_cache(source: Path, tmp_path: Path) -> None:
    flash = convert(source, tmp_path / "flash")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in flash.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    Checkpoint.open(flash)
