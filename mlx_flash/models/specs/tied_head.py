"""Whether a checkpoint's output head is tied to its embedding, decided as transformers 5 does.

tie_word_embeddings   lm_head.weight      the head is
true, or not said     not there           the embedding
true, or not said     equal               the embedding; the copy is left out
true, or not said     different           lm_head.weight, and the config is corrected
false                 there               lm_head.weight
false                 not there           missing, which the caller refuses unless the family never has one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.engine.numerics.casting import to_float32
from mlx_flash.engine.storage.bundle import ITEM_BYTES

from .head_tensors import embedding_of, fields_of, head_of
from .source import DTYPE_OF, Source, Tensor, read_buffer

KEY = "tie_word_embeddings"
KEYS = {"openelm": "share_input_output_layers"}
NESTED = "text_config"
BLOCK_ITEMS = 1 << 20


@dataclass(frozen=True)
class Settled:
    """A config that says whether the head is tied, the tensors without an unused head, and a note for the user."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    note: str | None = None


def settle_head(source: Source) -> Settled:
    """Decide whether the head of an open checkpoint is tied. Reads both matrices if both are there and the config does
    not say that they differ. Raises ReadError."""
    config, tensors = source.config, source.tensors
    head, embedding = head_of(tensors), embedding_of(tensors)
    key = KEYS.get(str(config.get("model_type")), KEY)
    tied = _said(config, key)
    if embedding is None or not (tied is None or isinstance(tied, bool)):
        return Settled(config, tensors)  # reading the config names what is wrong with it
    if head is None:
        return Settled(config if tied is False else _with(config, key, True), tensors)
    if tied is False:
        return Settled(_with(config, key, False), tensors)
    without = {name: tensor for name, tensor in tensors.items() if name not in fields_of(head, tensors)}
    if key != KEY and tied:  # its own code never looks at a head when the embedding is shared
        return Settled(config, without)
    if _equal(source, head, embedding):
        return Settled(_with(config, key, True), without)
    note = f"config.json ties the head to the embedding ({key}), but {head} is another matrix, which is used"
    return Settled(_with(config, key, False), tensors, note if tied else None)


def _said(config: Mapping[str, Any], key: str) -> Any:
    """What the config says; None for nothing. The outer config counts, as in transformers."""
    inner = config.get(NESTED)
    value = config.get(key)
    return inner.get(key) if value is None and isinstance(inner, Mapping) else value


def _with(config: dict[str, Any], key: str, value: bool) -> dict[str, Any]:
    found = config | {key: value}
    if isinstance(inner := config.get(NESTED), Mapping):
        found[NESTED] = dict(inner) | {key: value}
    return found


def _equal(source: Source, head: str, embedding: str) -> bool:
    """Whether both matrices hold the same numbers, and the same scales and biases where they are quantised."""
    mine, other = fields_of(head, source.tensors), fields_of(embedding, source.tensors)
    return len(mine) == len(other) and all(_same(source, *pair) for pair in zip(mine, other, strict=True))


def _same(source: Source, one: str, other: str) -> bool:
    infos = [source.tensors[name].info for name in (one, other)]
    if infos[0].shape != infos[1].shape:
        return False
    kinds = [DTYPE_OF.get(info.dtype) for info in infos]
    if None in kinds and infos[0].dtype != infos[1].dtype:
        return False
    items = int(np.prod(infos[0].shape))
    sizes = [info.nbytes // max(items, 1) for info in infos]
    buffers = [read_buffer(size * BLOCK_ITEMS) for size in sizes]
    for start in range(0, items, BLOCK_ITEMS):
        count = min(BLOCK_ITEMS, items - start)
        pairs = zip((one, other), sizes, buffers, strict=True)
        read = [source.read(name, size * start, size * count, buffer) for name, size, buffer in pairs]
        values = [_numbers(raw, kind) for raw, kind in zip(read, kinds, strict=True)]
        if not np.array_equal(values[0], values[1], equal_nan=values[0].dtype.kind == "f"):
            return False
    return True


def _numbers(raw: np.ndarray, kind: str | None) -> np.ndarray:
    """Bytes as float32, or as they are where they are no numbers."""
    if kind is None:
        return raw
    return to_float32(np.ascontiguousarray(raw).view(f"<u{ITEM_BYTES[kind]}"), kind)
