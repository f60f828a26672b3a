"""The folder in which an unfinished calibration keeps its finished steps, inside the checkpoint.

One process at a time; results for another model, text or setting are thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.storage.writer import lock_folder
from mlx_flash.errors import UsageError

NAME = "calibrate.partial"
# What NumPy raises for a file that a power cut has left empty, short or torn.
DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


class Workspace:
    """Results of finished steps, by name: arrays and plain values."""

    def __init__(self, path: Path):
        self.path = path

    def load(self, step: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The result that `save` kept of a step; None where there is none or it is damaged, so that the step is
        repeated."""
        file = self.path / f"{step}.npz"
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files if name != "figures"}
                return arrays, json.loads(str(found["figures"]))
        except DAMAGE:
            return None

    def save(self, step: str, arrays: Mapping[str, np.ndarray], figures: Mapping[str, Any]) -> None:
        """Keep a finished step, whole or not at all."""
        partial = self.path / f"{step}.partial"
        with open(partial, "wb") as file:
            np.savez(file, figures=json.dumps(figures), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / f"{step}.npz")


@contextmanager
def open_workspace(checkpoint: Path, made_from: Mapping[str, Any]) -> Iterator[Workspace]:
    """The workspace of a checkpoint folder for a calibration made from these plain values; it is removed when the block
    ends well, and kept for the next try when it does not. Raises UsageError where it cannot be written or is in use."""
    path = checkpoint / "flash" / NAME
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    try:
        path.mkdir(exist_ok=True)
        lock = lock_folder(path)
    except OSError as error:
        raise UsageError(
            f"cannot write into {checkpoint} ({error.strerror or error}); calibrate a copy: "
            "mlx_flash convert --hf-path SOURCE --flash-path OUT"
        ) from error
    if lock < 0 and os.name != "nt":
        raise UsageError(f"{checkpoint} is being calibrated by another process; wait for it")
    try:
        if not (path / "key").exists() or (path / "key").read_text() != key:
            for left in path.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            (path / "key").write_text(key)
        yield Workspace(path)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        if lock >= 0:
            os.close(lock)
