"""A Hugging Face checkpoint as a source: its config, its tensors by name, its tokenizer files, a hash of all of them.

Finds the folder, on disk or on the Hub through its cache, and reads raw bytes in big sequential pieces. Knows
safetensors; knows nothing of families or bundles, and never opens a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.storage.bundle import ALIGN, FORMAT_VERSION, ITEM_BYTES
from mlx_flash.engine.storage.calibration import SHIPPED
from mlx_flash.engine.storage.header import TensorInfo, read_header
from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.errors import ConfigError, FormatError, ReadError, UsageError
from mlx_flash.models.text.tokenizer import TOKENIZERS

from .folder import (
    INDEX,
    SHARDS,
    has_index,
    is_there,
    leads_somewhere,
    read_index,
    refuse_file,
    refuse_other_formats,
    safe_file,
    weight_files,
)
from .wrappers import text_names

DTYPE_OF = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TAG_OF = {name: tag for tag, name in DTYPE_OF.items()} | {"uint32": "U32", "uint8": "U8"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONVERSION = 2  # counts changes of what a conversion makes of the same files: copies in the cache are made anew
FULL_HASH_BYTES = 64_000_000
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
READ_ALIGN = 4096  # covers every disk's block
OpenFile = Callable[[Path, bool], FileIO]  # path, and whether to go around the page cache


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `info.offset` counts from the start of the file."""

    path: Path
    info: TensorInfo


def is_repo_id(text: str) -> bool:
    """Whether `text` could be `owner/name` on the Hugging Face Hub."""
    return REPO_ID.fullmatch(text) is not None and ".." not in text


def find_folder(
    path: str | Path, *, revision: str | None = None, weights: bool = True, download: Callable[..., str] | None = None
) -> Path:
    """The folder of a local checkpoint or of a Hub repository, downloaded into Hugging Face's cache if it is
    not there yet. `weights` = False asks for the tokenizer's files only. download: like huggingface_hub's
    `snapshot_download`, None for that. Raises UsageError."""
    folder = Path(path)
    try:
        exists = leads_somewhere(folder)
        if exists and folder.is_dir():
            return folder
    except (OSError, ValueError) as error:  # too long, a NUL
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(path)[:80]!r} cannot be a checkpoint: {reason}") from None
    if exists:
        refuse_file(folder)
        raise UsageError(f"{path} is a file; give the folder that holds config.json")
    if folder.is_symlink():
        raise UsageError(f"{path} is a link to {os.readlink(folder)}, which leads to no folder")
    if isinstance(path, Path) or not is_repo_id(path):
        raise UsageError(f"{path} does not exist, and is not a Hugging Face repository id (owner/name)")
    if download is None:
        from huggingface_hub import snapshot_download

        download = snapshot_download
    return _from_hub(path, revision, weights, download)


def _from_hub(repo: str, revision: str | None, weights: bool, download: Callable[..., str]) -> Path:
    patterns = [*TOKENIZER_FILES, "config.json", "generation_config.json"]
    if weights:
        patterns += [SHARDS, INDEX]
    try:
        cached = Path(download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
        if _is_complete(cached, weights):
            return cached
    except Exception:  # not cached: whatever its type, the answer is to ask the Hub, which names the cause
        pass
    try:
        return Path(download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the HTTP library's errors share no base with Hugging Face's
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{repo} is not a folder here, not complete in Hugging Face's cache, and could not be downloaded "
            f"({type(error).__name__}: {cause}); check the name and the network, or give a local folder"
        ) from error


def _is_complete(folder: Path, weights: bool) -> bool:
    if not weights:
        return any((folder / name).exists() for name in TOKENIZERS)
    try:
        return bool(weight_files(folder))
    except (FormatError, ConfigError):
        return False


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name. Raises FormatError for one that is twice or not where the
    index says."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder).values():
        for name, info in read_header(path).items():
            if name in tensors:
                raise FormatError(f"tensor {name!r} is both in {tensors[name].path.name} and in {path.name}")
            tensors[name] = Tensor(path, info)
    if has_index(folder):
        for name, shard in read_index(folder).items():
            if name not in tensors or tensors[name].path.name != shard:
                raise FormatError(f"{folder / INDEX} says that {name!r} is in {shard}, where it is not")
    return tensors


def tokenizer_files(path: Path) -> list[Path]:
    """The tokenizer's files in a folder, or the one file given."""
    if path.is_file():
        return [path]
    return [safe_file(path, name) for name in TOKENIZER_FILES if is_there(path, name)]


def read_buffer(count: int) -> np.ndarray:
    """Page-aligned memory for reads of up to `count` bytes, wherever in a file they begin."""
    return np.frombuffer(mmap.mmap(-1, count + 2 * READ_ALIGN), np.uint8)


def open_file(path: Path, direct: bool) -> FileIO:
    """A file opened for reading; direct: around the page cache, if the system can. Raises OSError, with EINVAL where
    the file system cannot."""
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    return FileIO(path, "rb", opener=lambda name, mode: os.open(name, mode | flag))


class Source:
    """A checkpoint folder opened for reading; not for several threads at once. open_file: see the function."""

    def __init__(self, folder: Path, open_file: OpenFile = open_file):
        self.folder, self._open_file = folder, open_file
        if not is_there(folder, "config.json"):
            refuse_other_formats(folder)
        self.config = read_json(safe_file(folder, "config.json"))
        self._files: dict[Path, FileIO] = {}
        self._buffered: set[Path] = set()
        self.tensors: dict[str, Tensor] = {}
        self.left_out = 0  # tensors of vision

    def open_tensors(self) -> None:
        found = read_tensors(self.folder)
        names = text_names(self.config, found)
        self.tensors = {name: found[stored] for name, stored in names.items()}
        self.left_out = len(found) - len(names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: tensor.info.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        """The tensor's dtype by our name. Raises ConfigError for one that is not floating point of 16 or 32
        bits."""
        tag = self.tensors[name].info.dtype
        if tag not in DTYPE_OF:
            raise ConfigError(f"tensor {name!r} is {tag}; known: {', '.join(DTYPE_OF)}")
        return DTYPE_OF[tag]

    def read(self, name: str, start: int, count: int, memory: np.ndarray) -> np.ndarray:
        """`count` bytes of the tensor from `start`, as a view of `memory`, which `read_buffer(count)` made.

        Goes around the page cache where the system lets it: under a memory limit, filling the cache costs
        more than the reading. Raises ReadError.
        """
        tensor = self.tensors[name]
        first = tensor.info.offset + start
        begin = first - first % READ_ALIGN
        skip, end = first - begin, first - begin + count
        view = memory[: end + -end % READ_ALIGN].data
        try:
            at = self._fill(tensor.path, begin, view)
        except OSError as error:
            raise ReadError(f"{tensor.path}: reading {name!r} failed: {error.strerror or error}") from error
        if at < end:
            raise ReadError(f"{tensor.path} ended while reading {name!r}; was it changed meanwhile?")
        return memory[skip:end]

    def _fill(self, path: Path, begin: int, view: memoryview) -> int:
        """Read until `view` is full or the file ends; returns the bytes read."""
        file = self._files.get(path) or self._open(path, True)
        file.seek(begin)
        at = 0
        while at < len(view) and at % READ_ALIGN == 0:  # a read that stops elsewhere has met the file's end
            try:
                got = file.readinto(view[at:])
            except OSError as error:
                if error.errno != errno.EINVAL or path in self._buffered:
                    raise
                file = self._open(path, False)  # a file system that takes the flag and then refuses the read
                file.seek(begin + at)
                continue
            if not got:
                break
            at += got
        if path in self._buffered and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), begin, at, os.POSIX_FADV_DONTNEED)
        return at

    def _open(self, path: Path, direct: bool) -> FileIO:
        if path in self._files:
            self._files.pop(path).close()
        try:
            file = self._open_file(path, direct)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            return self._open(path, False)
        self._files[path] = file
        if not direct or not hasattr(os, "O_DIRECT"):
            self._buffered.add(path)
        return file

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def source_hash(
    folder: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    more: Sequence[Any] | None = None,
    full_bytes: int = FULL_HASH_BYTES,
) -> str:
    """SHA-256 (hex) that names a checkpoint's content and the options of its conversion; more: those of quantising;
    full_bytes: up to so many bytes of weights all of them count.

    Small files count with all their bytes. Hashing tens of GB at every start would cost more than the run, so
    above 64 MB of weights a file counts with its header, its size, its time of change and 64 blocks of 64 KiB
    spread over it. A file rewritten in place has another time; one put there with its old time (a restore, a
    sync) has other bytes in nearly every block, as training moves every weight. A mere copy gets another
    hash: a second conversion, never a wrong one.
    """
    options = [FORMAT_VERSION, CONVERSION, dtype, *(more or [])]
    total = hashlib.sha256(json.dumps(options).encode())
    files = weight_files(folder)
    full = sum(path.stat().st_size for path in files.values()) <= full_bytes
    for name, path in files.items():
        _add(total, name, _hash_file(path) if full else _hash_samples(path))
    small = ("config.json", "generation_config.json", SHIPPED)
    others = [safe_file(folder, n) for n in small if is_there(folder, n)]
    for path in others + tokenizer_files(tokenizer or folder):
        _add(total, path.name, _hash_file(path))
    return total.hexdigest()


def _add(total: Any, name: str, digest: str) -> None:
    total.update(f"{len(name)}:{name}={digest}\n".encode())


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _hash_samples(path: Path) -> str:
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    first = min((info.offset for info in read_header(path).values()), default=status.st_size)
    with open(path, "rb") as file:
        digest.update(file.read(first))
        last = max(status.st_size - SAMPLE_BYTES, 0)
        for i in range(SAMPLES):
            file.seek(first + (max(last - first, 0)) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def safetensors_header(
    shapes: Mapping[str, tuple[int, ...]], dtype: str | Mapping[str, str], names: Iterable[str]
) -> bytes:
    """Length and header of a safetensors file that holds `names` back to back, all of one dtype or each of its own;
    data begins at a multiple of 512 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        kind = dtype if isinstance(dtype, str) else dtype[name]
        end = at + ITEM_BYTES[kind] * _items(shapes[name])
        header[name] = {"dtype": TAG_OF[kind], "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _items(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
