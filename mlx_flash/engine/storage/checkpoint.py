"""Opening a flash checkpoint: its files are checked against its config.json, and on request against their hashes.

Reads headers and hashes. Does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_flash.engine.storage.lfs_pointer import is_pointer, pointer_problem
from mlx_flash.errors import FormatError, IntegrityError, ReadError

from .bundle import FORMAT_VERSION, MIXED_VERSION, Layout, check_layer_file, layer_file
from .header import TensorInfo, read_header
from .json_file import format_error, load_json_object, read_small_file
from .reader import LayerFile
from .writer import CONFIG, NO_DIGEST, is_safe_name

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
CALIBRATION = "flash/calibration-"  # then a hash
MAX_LAYERS = 10_000
VERIFY_BYTES = 4 << 20


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has a config.json with a "flash" object. Checks nothing else."""
    try:
        return isinstance(_read_config(Path(path) / CONFIG).get("flash"), dict)
    except (FormatError, ReadError):
        return False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose config, file sizes and headers have been checked.

    files: {name: {"bytes", "sha256"}}
    """

    path: Path
    config: dict[str, Any]
    layouts: list[Layout]
    files: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: str | os.PathLike[str], calibrated: bool = True) -> Checkpoint:
        """Open a checkpoint and check everything but the hashes.

        calibrated=False: ignore its calibration, so that a damaged one can be replaced
        Raises FormatError, naming the file and the remedy, or ReadError.
        """
        path = Path(path)
        if not path.is_dir():
            raise FormatError(f"{path} is not a folder; give the folder that `mlx_flash convert` wrote")
        if not (path / CONFIG).exists():
            raise FormatError(f"{path} has no {CONFIG}; give the folder that `mlx_flash convert` wrote")
        config = _read_config(path / CONFIG)
        flash = config.get("flash")
        if not isinstance(flash, dict):
            raise FormatError(f'{path / CONFIG} has no "flash" object: run `mlx_flash convert {path} OUT` first')
        version = flash.get("format_version")
        if type(version) is not int or not FORMAT_VERSION <= version <= MIXED_VERSION:
            raise FormatError(
                f"{path} has format version {str(version)[:20]}, this mlx_flash reads {FORMAT_VERSION} to "
                f"{MIXED_VERSION}; convert the model again"
            )
        for key in ("activation", "dtype", "source_hash"):
            if not isinstance(flash.get(key), str):
                raise format_error(path / CONFIG, f'has no text under "flash"."{key}"')
        files = _files(path, flash.get("files"))
        if not calibrated:
            flash.pop("calibration", None)
            files = {name: record for name, record in files.items() if not name.startswith(CALIBRATION)}
        layouts = _layouts(path, flash.get("layers"))
        if version != (right := max(layout.version for layout in layouts)):
            kind = {1: "not quantised", 2: "quantised alike"}.get(right, "quantised in other ways")
            raise FormatError(
                f"{path} has format version {version}, and bundles that are {kind}; convert the model again"
            )
        checkpoint = cls(path, config, layouts, files)
        checkpoint._check()
        return checkpoint

    @property
    def layer_files(self) -> list[LayerFile]:
        """The file of each layer's bundles."""
        return [LayerFile(self.path / layer_file(i), layout) for i, layout in enumerate(self.layouts)]

    def resident_tensors(self) -> dict[str, tuple[Path, TensorInfo]]:
        """The tensors that stay resident: by name, the file and the place in it."""
        return dict(self._resident)

    @cached_property
    def _resident(self) -> dict[str, tuple[Path, TensorInfo]]:
        if INDEX not in self.files:
            self._need(MODEL)
            return {name: (self.path / MODEL, info) for name, info in read_header(self.path / MODEL).items()}
        weight_map = _read_config(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise format_error(self.path / INDEX, 'has no table of names under "weight_map"')
        shards = {}
        for shard in sorted(set(weight_map.values())):
            self._need(shard)
            shards[shard] = read_header(self.path / shard)
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise format_error(self.path / INDEX, f"puts tensor {name[:80]!r} in {shard[:80]}, which lacks it")
        return {name: (self.path / shard, shards[shard][name]) for name, shard in weight_map.items()}

    def _need(self, name: str) -> None:
        if name not in self.files:
            raise format_error(self.path / CONFIG, f"does not list {name[:80]!r}")

    def _check(self) -> None:
        for i in range(len(self.layouts)):
            self._need(layer_file(i))
        if layer_file(len(self.layouts)) in self.files:
            found = layer_file(len(self.layouts))
            raise format_error(self.path / CONFIG, f"lists {found}, but only {len(self.layouts)} layers")
        for name, record in self.files.items():
            size = _file_bytes(self.path, name)
            if size != record["bytes"]:
                if is_pointer(self.path / name):
                    raise FormatError(pointer_problem(self.path / name))
                problem = f"has {size} bytes, {record['bytes']} were written"
                if name.startswith(CALIBRATION):
                    raise FormatError(f"{self.path / name} {problem}; make it anew: mlx_flash calibrate")
                raise format_error(self.path / name, problem)
        for entry in self.path.iterdir():
            if entry.is_symlink():  # tokenizers are read by name, recorded or not
                _real_path(self.path, entry.name)
        for file in self.layer_files:
            check_layer_file(file.path, file.layout)
        _ = self._resident


def verify(path: str | os.PathLike[str], progress: Callable[[str, int], None] | None = None) -> int:
    """Compare a checkpoint with the hashes recorded when it was written; returns the bytes checked.

    progress: called with a file's name and the bytes checked since the last call
    Files that are not recorded are ignored. Raises IntegrityError naming every damaged or missing file,
    FormatError if the folder is not a flash checkpoint, ReadError if the disk fails.
    """
    path = Path(path)
    files, problems, checked = _recorded_files(path)
    for name, record in files.items():
        try:
            size = _file_bytes(path, name)
        except FormatError as error:
            there = os.path.lexists(path / name)
            problems.append(f"{name} (not a file of this folder: {error})" if there else f"{name} (missing)")
            continue
        if size != record["bytes"]:
            problems.append(f"{name} ({size} bytes, {record['bytes']} were written)")
            continue
        digest = hashlib.sha256()
        for block in _blocks(path / name):
            digest.update(block)
            checked += len(block)
            if progress is not None:
                progress(name, len(block))
        if digest.hexdigest() != record["sha256"]:
            problems.append(f"{name} (changed since it was written)")
    if problems:
        found = "; ".join(problems)
        raise IntegrityError(f"{path}: {len(problems)} damaged: {found}; download or convert it again")
    return checked


def _recorded_files(path: Path) -> tuple[dict[str, dict[str, Any]], list[str], int]:
    """(the files that config.json records, the problems of config.json itself, its length in bytes)"""
    if not (path / CONFIG).exists():
        raise FormatError(f"{path} has no {CONFIG}; give the folder that `mlx_flash convert` wrote")
    data = _read_config_bytes(path / CONFIG)
    try:
        config = load_json_object(path / CONFIG, data)
        flash = config.get("flash")
        if not isinstance(flash, dict):
            raise format_error(path / CONFIG, 'has no "flash" object, so there are no hashes to compare with')
        files = _files(path, flash.get("files"))
    except FormatError as error:
        if not (path / "flash").is_dir():
            raise
        return {}, [str(error)], len(data)
    whole = _is_whole(data, flash.get("config_sha256"))
    return files, [] if whole else [f"{CONFIG} (changed since it was written)"], len(data)


def _read_config(path: Path) -> dict[str, Any]:
    return load_json_object(path, _read_config_bytes(path))


def _read_config_bytes(path: Path) -> bytes:
    _file_bytes(path.parent, path.name)  # refuses a link that leaves the checkpoint
    return read_small_file(path)


def _is_whole(data: bytes, digest: Any) -> bool:
    """Whether the bytes of config.json fit its digest, which was computed with 64 zeros in the digest's place."""
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isascii():
        return False
    return hashlib.sha256(data.replace(digest.encode(), NO_DIGEST.encode())).hexdigest() == digest


def _layouts(path: Path, layers: Any) -> list[Layout]:
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise format_error(path / CONFIG, f'has no list of 1 to {MAX_LAYERS} layers under "flash"."layers"')
    found = []
    for i, layer in enumerate(layers):
        try:
            found.append(Layout.from_json(layer))
        except FormatError as error:
            raise FormatError(f"{path / CONFIG}, layer {i}: {error}") from None
    return found


def _files(path: Path, files: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(files, dict):
        raise format_error(path / CONFIG, 'has no table of files under "flash"."files"')
    for name, record in files.items():
        if not is_safe_name(name) or name == CONFIG:
            raise format_error(path / CONFIG, f"lists the file {name[:80]!r}, which is not within the folder")
        if not isinstance(record, dict) or set(record) != {"bytes", "sha256"}:
            raise format_error(path / CONFIG, f"does not give bytes and sha256 of {name[:80]!r}")
        size, digest = record["bytes"], record["sha256"]
        if type(size) is not int or size < 0 or not isinstance(digest, str) or len(digest) != 64:
            raise format_error(path / CONFIG, f"gives no size or no SHA-256 of {name[:80]!r}")
    return files


def _file_bytes(folder: Path, name: str) -> int:
    """Size of a regular file of the checkpoint; FormatError if it is missing or a link out of the checkpoint."""
    status = os.stat(_real_path(folder, name))
    if not stat.S_ISREG(status.st_mode):
        raise format_error(folder / name, "is not a regular file")
    return status.st_size


def _real_path(folder: Path, name: str) -> Path:
    """The path that a name of the checkpoint resolves to; FormatError if it is missing or outside the folder."""
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
        os.stat(real)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        raise format_error(path, "is missing") from None
    if not real.is_relative_to(root) and not _is_blob(real):
        raise format_error(path, f"is a link that leaves the checkpoint, to {real}")
    return real


def _is_blob(path: Path) -> bool:
    """Whether a file lies in a Hugging Face cache, whose snapshots are links into models--OWNER--NAME/blobs."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")


def _blocks(path: Path) -> Iterator[memoryview]:
    """A file's bytes, VERIFY_BYTES at a time, without leaving them in the page cache."""
    buffer = memoryview(bytearray(VERIFY_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
