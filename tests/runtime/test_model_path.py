"""What a user may name as a model, and that a copy is made once."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from mlx_flash.engine.storage.checkpoint import Checkpoint, is_checkpoint
from mlx_flash.errors import ConfigError, FormatError, UsageError
from mlx_flash.runtime import model_path
from mlx_flash.runtime.machine import cache_folder
from mlx_flash.runtime.model_path import models_folder, resolve_model
from tests.checkpoints import LLAMA, make_source


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    return cache_folder()


def test_cache_folder_per_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, expected in (
        ("linux", ".cache/mlx_flash"),
        ("darwin", "Library/Caches/mlx_flash"),
        ("win32", "local/mlx_flash"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == tmp_path / expected
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other" / "mlx_flash"


def test_converts_once_until_the_source_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, LLAMA)
    said: list[str] = []
    first = resolve_model(str(source), announce=said.append)
    assert first.parent == cache and first.name.startswith("hf-") and len(first.name) == len("hf-") + 12
    Checkpoint.open(first)
    assert len(said) == 1 and str(first) in said[0] and str(source) in said[0]

    with monkeypatch.context() as patch:
        patch.setattr(model_path, "convert", None)  # a second conversion would fail
        assert resolve_model(str(source), announce=said.append) == first
        assert resolve_model(source, announce=said.append) == first
        assert resolve_model(first, announce=said.append) == first  # a flash checkpoint is itself
        patch.setattr("filelock.FileLock", None)  # as in a cache that cannot be written
        assert resolve_model(source) == first
    assert len(said) == 1

    other = resolve_model(source, dtype="float32", announce=said.append)
    assert other != first and Checkpoint.open(other).config["flash"]["dtype"] == "float32"
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = resolve_model(source, announce=said.append)
    assert changed not in (first, other) and len(said) == 3
    assert is_checkpoint(first)


def test_a_failed_conversion_is_tried_again(tmp_path: Path, cache: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(json.dumps(json.loads(config) | {"vocab_size": 299}))
    with pytest.raises(ConfigError):
        resolve_model(source)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    (source / "config.json").write_text(config)
    assert is_checkpoint(resolve_model(source))


def test_default_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, LLAMA)
    monkeypatch.setattr(model_path, "models_folder", lambda: tmp_path)
    with pytest.raises(UsageError, match="default model is not in this installation"):
        resolve_model(None)
    shutil.move(resolve_model(source), tmp_path / model_path.DEFAULT_MODEL)
    assert resolve_model(None) == tmp_path / "flash-stories-6m"


def test_models_folder_of_a_wheel_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (models_folder() / "openelm-3b" / "config.json").is_file()
    package = tmp_path / "site" / "mlx_flash"
    package.mkdir(parents=True)
    monkeypatch.setattr(model_path, "__file__", str(package / "runtime" / "model_path.py"))
    with pytest.raises(UsageError, match="no model cards"):
        models_folder()
    (tmp_path / "site" / "models").mkdir()
    assert models_folder() == tmp_path / "site" / "models"
    (package / "_models").mkdir()
    assert models_folder() == package / "_models"


def test_what_is_no_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(repo: str, **_: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name in ("nothing", "./nothing", str(tmp_path / "nothing"), "a/b/c", "../a", "~/x/y", ""):
        with pytest.raises(UsageError, match="does not exist|no config.json"):
            resolve_model(name)
    with pytest.raises(UsageError, match="owner/name.*could not be downloaded.*no network"):
        resolve_model("owner/name")
    with pytest.raises(UsageError, match="no config.json"):
        resolve_model(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        resolve_model(tmp_path / "file")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(FormatError, match="neither"):
        resolve_model(tmp_path)


def test_repository_is_named_in_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = make_source(tmp_path, LLAMA)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(source))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name-1.5b").name.startswith("name-1.5b-")


def test_unwritable_cache(tmp_path: Path, cache: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match="cannot write the cache.*--flash-path"):
        resolve_model(source)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_read_only_cache(tmp_path: Path, cache: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    first = resolve_model(source)
    cache.chmod(0o500)
    try:
        assert resolve_model(source) == first
        with pytest.raises(UsageError, match="cannot write the cache"):
            resolve_model(source, dtype="float32")
    finally:
        cache.chmod(0o700)
