"""Finds the folder of a model that a user names, and converts it once into the user's cache where that is needed.

Owns where model cards and converted copies are. Reads no weights itself.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlx_flash.engine.storage.bundle import layer_file
from mlx_flash.engine.storage.checkpoint import is_checkpoint
from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.engine.storage.writer import remove_stale
from mlx_flash.errors import FormatError, ReadError, UsageError
from mlx_flash.models.conversion.converter import convert
from mlx_flash.models.specs.folder import is_there, leads_somewhere, refuse_other_formats, safe_file
from mlx_flash.models.specs.mixtures import is_mixture
from mlx_flash.models.specs.source import find_folder, is_repo_id, source_hash

from .machine import cache_folder
from .preflight import PlannedCheckpoint, planned_checkpoint

DEFAULT_MODEL = "flash-stories-6m"


def models_folder() -> Path:
    """The model cards: packaged in a wheel, beside the package in a clone. Raises UsageError."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_models", package.parent / "models"):
        if folder.is_dir():
            return folder
    raise UsageError(f"this installation has no model cards ({package / '_models'}); give the path of a model")


def model_name(model: str | Path | None) -> str:
    """The name of a model in messages: what the user wrote."""
    return DEFAULT_MODEL if model is None else str(model)


def in_place_folder(model: str | Path | None) -> Path | None:
    """The folder of a mixture of experts, which is read in place; None for other models.
    Raises UsageError for one that cannot be downloaded."""
    if model is None:
        return None
    path = Path(model)
    with suppress(OSError, ValueError):  # what cannot be a path is no folder, and is named when it is resolved
        if path.is_dir():
            return path if not is_checkpoint(path) and _is_mixture(path) else None
        if not path.exists() and is_repo_id(str(model)) and _is_mixture(find_folder(str(model), weights=False)):
            return find_folder(str(model))
    return None


def _is_mixture(folder: Path) -> bool:
    try:
        config = read_json(safe_file(folder, "config.json"))
    except (FormatError, ReadError):  # is said when it is resolved
        return False
    return is_mixture(config)


def resolve_model(
    model: str | Path | None,
    *,
    dtype: str | None = None,
    announce: Callable[[str], None] = lambda message: None,
    progress: bool = False,
    check: Callable[[PlannedCheckpoint], None] = lambda planned: None,
) -> Path:
    """The flash checkpoint of a model.

    model: None for the default model; a flash checkpoint is returned as it is; a Hugging Face folder or repo
    id is converted into the user's cache the first time, and found there as long as its content stays the
    same. dtype: as for `convert`, for copies made here; announce: receives a line before a conversion begins;
    check: receives what the conversion would make, before anything is written, and may raise.
    Raises UsageError for a model that is not there, an unwritable cache, and whatever `convert` raises.
    """
    if model is None:
        model = models_folder() / DEFAULT_MODEL
        if not (model / "config.json").is_file():
            raise UsageError(f"the default model is not in this installation ({model}); give the path of a model")
    path = Path(model)
    try:
        exists = leads_somewhere(path)
    except (OSError, ValueError) as error:  # too long, a NUL
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(model)[:80]!r} cannot be a model: {reason}") from None
    # A folder of bundles is never converted: where its config.json is damaged, opening it says so.
    if path.is_dir() and (is_checkpoint(path) or (path / layer_file(0)).is_file()):
        return path
    if not exists and not path.is_symlink() and not is_repo_id(str(model)):
        raise UsageError(f"{model} does not exist, and is not a Hugging Face repository id (owner/name)")
    if path.is_dir() and not is_there(path, "config.json"):
        refuse_other_formats(path)
        raise UsageError(f"{path} has no config.json, so it is no model folder")
    folder = path if path.is_dir() else find_folder(str(model))
    if _is_mixture(folder):
        raise UsageError(
            f"{folder} is a mixture of experts, which are read in place and need nothing of this kind: generate, "
            "perplexity and inspect run it as it is"
        )
    return _converted(
        folder,
        re.split(r"[/\\]", str(path.absolute() if path.is_dir() else model))[-1],
        dtype,
        announce,
        progress,
        check,
    )


def _converted(
    folder: Path,
    name: str,
    dtype: str | None,
    announce: Callable[[str], None],
    progress: bool,
    check: Callable[[PlannedCheckpoint], None],
) -> Path:
    from filelock import FileLock, Timeout

    safe_name = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "model"
    out = cache_folder() / f"{safe_name}-{source_hash(folder, dtype=dtype)[:12]}"
    if is_checkpoint(out):  # without the lock: a cache that cannot be written serves what it has
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, folder, error) from error
    check(planned_checkpoint(folder, dtype))
    try:
        lock = FileLock(f"{out}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            announce(f"another process is converting {folder}; waiting for it")
            lock.acquire()
        try:
            if not is_checkpoint(out):
                remove_stale(out.parent)
                shutil.rmtree(out, ignore_errors=True)  # a copy whose config.json is damaged
                announce(f"converting {folder} once, into {out} (later runs use that copy)")
                convert(folder, out, dtype=dtype, progress=progress, announce=announce)
        finally:
            lock.release()
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise _unwritable(out, folder, error) from error
    return out


def _unwritable(out: Path, folder: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(
        f"cannot write the cache {out.parent} ({reason}); write a copy elsewhere: "
        f"mlx_flash convert --hf-path {folder} --flash-path OUT"
    )
