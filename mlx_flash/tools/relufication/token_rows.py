"""Rows of token ids from a text file to train on, and the order in which they come. Knows no model and no PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_flash.errors import UsageError
from mlx_flash.models.text.tokenizer import Tokenizer

PIECE_BYTES = 1 << 20


def read_rows(path: Path, tokenizer: Tokenizer, bos: int | None, vocab: int, count: int, context: int) -> np.ndarray:
    """(at most `count`, context) int32 ids of a UTF-8 text file, each row after BOS where the model has one.

    Reads no more of the file than is needed. Raises UsageError for a file that is too short, not UTF-8 or
    unreadable.
    """
    first = [] if bos is None else [bos]
    width = context - len(first)
    ids: list[int] = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while len(ids) < count * width and (lines := file.readlines(PIECE_BYTES)):
                ids += tokenizer.encode("".join(lines), add_special_tokens=False)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start} of a piece)") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    count = min(count, len(ids) // width)
    if count < 2:
        raise UsageError(
            f"{path} has {len(ids)} tokens; at least {2 * width} are needed, one context of {width} to learn from "
            "and one to hold out: give more text or take a smaller context"
        )
    if max(ids) >= vocab:
        raise UsageError(f"the tokenizer gives id {max(ids)}, the model has {vocab}: they do not belong together")
    rows = np.array(ids[: count * width], np.int32).reshape(count, width)
    return np.concatenate([np.full((count, len(first)), bos or 0, np.int32), rows], 1)


def pick(position: int, batch: int, count: int, seed: int) -> np.ndarray:
    """(batch,) rows of `count` at this position of an endless sequence in which every epoch has its own order."""
    places = np.arange(position, position + batch)
    orders = {e: np.random.default_rng([seed, int(e)]).permutation(count) for e in np.unique(places // count)}
    return np.array([orders[place // count][place % count] for place in places])
