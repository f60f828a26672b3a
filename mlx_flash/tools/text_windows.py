"""Texts to measure on: reads them, and cuts their tokens into windows. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flash.errors import ReadError, UsageError

CONTEXT_TOKENS = 128  # prefilled, dense
SCORED_TOKENS = 256  # one by one


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises UsageError for an empty file or one that is not text, ReadError."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path} is not a file; give one or more text files") from None
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise UsageError(f"{path} is empty; give a text like those that the model is to write")
    return text


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text (BOS, or none), and the text's own ids."""
    bos, plain = tokenizer.bos_token_id, list(tokenizer.encode(text, add_special_tokens=False))
    begin = list(tokenizer.encode(text[:100], add_special_tokens=True))[:1]
    return ([bos] if bos is not None and begin == [bos] != plain[:1] else []), plain


@dataclass(frozen=True)
class Window:
    """Token ids: `prompt` is prefilled, then the tokens of `scored` are scored one by one."""

    prompt: list[int]
    scored: list[int]


def cut_windows(before: Sequence[int], ids: Sequence[int], context: int, scored: int) -> list[Window]:
    """Windows in which every id but the first `context` is scored once, after at least `context` others and
    `before`."""
    return [
        Window([*before, *ids[at - context : at]], list(ids[at : at + scored]))
        for at in range(context, len(ids), scored)
    ]


def spread_evenly(found: Sequence[Window], tokens: int | None) -> list[Window]:
    """Windows, evenly spread over `found`, with about `tokens` scored tokens; all of them for None."""
    total = sum(len(window.scored) for window in found)
    if tokens is None or total <= tokens:
        return list(found)
    count = max(1, round(len(found) * tokens / total))
    return [found[i * len(found) // count] for i in range(count)]
