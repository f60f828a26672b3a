"""Hugging Face checkpoints of a model card with random weights, for use without the real weights.

Knows shapes and names through models.specs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.engine.numerics.casting import check_dtype, from_float32
from mlx_flash.engine.storage.bundle import ITEM_BYTES
from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.engine.storage.writer import check_free_space, lock_folder, remove_stale
from mlx_flash.errors import FlashError, SpaceError, UsageError
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.folder import INDEX, WEIGHTS, safe_file
from mlx_flash.models.specs.mixtures import is_mixture, read_mixture
from mlx_flash.models.specs.source import safetensors_header, tokenizer_files
from mlx_flash.models.text.tokenizer import TOKENIZERS
from mlx_flash.runtime.model_path import models_folder

SCALE = 0.02
SHARD_BYTES = 5_000_000_000
# Longer tensors are cut from one table, as drawing each number would take minutes. Its length is a prime, so
# that no two rows of a matrix are alike.
TABLE_ITEMS = 16_777_213
DRAWN_ITEMS = 1 << 20
BYTE_TOKENS = 256


def make_random(
    card: str | Path, out: str | Path, *, dtype: str = "bfloat16", seed: int = 0, progress: bool = False
) -> Path:
    """Write a checkpoint of random weights; returns `out`.

    card: name of a model card (a folder under models/), or the path of a config.json or of a folder with one.
    Weights are normal with deviation 0.02 (norms 1), and depend on tensor name and seed alone. A trivial byte tokenizer
    is added where the card has none and the vocabulary has room. Raises UsageError if `out` exists, ConfigError for a
    config that is not known, SpaceError.
    """
    check_dtype(dtype)
    folder, config = _find_card(card)
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists; remove it or choose another folder")
    spec = read_mixture(config) if is_mixture(config) else read_spec(config)
    shapes = spec.resident_shapes() | spec.ffn_shapes()
    needed = sum(_nbytes(shape, dtype) for shape in shapes.values())
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale(parent, out.name)
        check_free_space(parent, needed + (1 << 20))
        temporary = parent / f".{out.name}.partial-{os.getpid()}"
        temporary.mkdir()
        lock = lock_folder(temporary)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        _write_weights(temporary, shapes, dtype, seed, progress)
        _write_tokenizer(temporary, folder, config)
        _write_json(temporary / "config.json", dict(config) | {"torch_dtype": dtype})
        os.rename(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            kind = SpaceError if error.errno == errno.ENOSPC else FlashError
            raise kind(f"cannot write {out}: {error.strerror or error}") from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)
    return out


def _find_card(card: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(card)
    if not path.exists() and path.name == str(card):
        path = models_folder() / path
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        known = sorted(p.parent.name for p in models_folder().glob("*/config.json"))
        raise UsageError(f"no model card {str(card)!r}; known: {', '.join(known)}, or give the path of a config.json")
    return path.parent, read_json(safe_file(path.parent, path.name))


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]  # np.prod would wrap around, and a lie would fit on any disk


def _write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int, progress: bool) -> None:
    shards = _shards(shapes, dtype)
    numbers = _Numbers(dtype, seed)
    weight_map: dict[str, str] = {}
    with tqdm(total=len(shapes), desc="random weights", unit="tensor", disable=not progress) as bar:
        for i, names in enumerate(shards):
            file_name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            with open(folder / file_name, "xb", buffering=0) as file:
                _write_all(file, safetensors_header(shapes, dtype, names))
                for name in names:
                    for piece in numbers.pieces(name, shapes[name]):
                        _write_all(file, piece)
                    weight_map[name] = file_name
                    bar.update()
                os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(_nbytes(shape, dtype) for shape in shapes.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_all(file: Any, data: Any) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[list[str]]:
    """Names in shards of at most SHARD_BYTES, in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + _nbytes(shape, dtype) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += _nbytes(shape, dtype)
    return shards


class _Numbers:
    """Weights by tensor name; a tensor is the same whichever others are asked for."""

    def __init__(self, dtype: str, seed: int):
        self._dtype, self._seed = dtype, seed
        self._table: np.ndarray | None = None

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The tensor's raw items, front to back, in a few arrays."""
        items = int(np.prod(shape))
        if len(shape) == 1 and name.endswith(".weight"):  # a norm
            yield from_float32(np.ones(items, np.float32), self._dtype)
            return
        key = int.from_bytes(hashlib.sha256(f"{self._seed}:{name}".encode()).digest()[:8], "little")
        if items <= DRAWN_ITEMS:
            yield self._draw(key, items)
            return
        if self._table is None:
            self._table = self._draw(self._seed, TABLE_ITEMS)
        at = key % TABLE_ITEMS
        while items:
            piece = self._table[at : at + items]
            yield piece
            items -= len(piece)
            at = 0

    def _draw(self, key: int, items: int) -> np.ndarray:
        numbers = np.random.default_rng(key).standard_normal(items, dtype=np.float32)
        numbers *= SCALE
        return from_float32(numbers, self._dtype)


def _write_tokenizer(out: Path, folder: Path, config: Mapping[str, Any]) -> None:
    files = tokenizer_files(folder)
    for path in files:
        shutil.copyfile(path, out / path.name)
    if any(path.name in TOKENIZERS for path in files):
        return
    special = {"<s>": config.get("bos_token_id"), "</s>": config.get("eos_token_id")}
    vocab = _byte_vocabulary(config["vocab_size"], special)
    if vocab is None:
        return
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        },
    )


def _byte_vocabulary(size: int, special: Mapping[str, Any]) -> dict[str, int] | None:
    """256 byte tokens and two special ones, these where the config has them; None if there is no room."""
    if size < BYTE_TOKENS + len(special):
        return None
    from tokenizers import pre_tokenizers

    wanted = [i for i in special.values() if isinstance(i, int) and 0 <= i < size]
    if len(set(wanted)) != len(special):
        wanted = [BYTE_TOKENS + i for i in range(len(special))]
    vocab = dict(zip(special, wanted, strict=True))
    free = (i for i in range(size) if i not in set(vocab.values()))
    return vocab | dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free, strict=False))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
