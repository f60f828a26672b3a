"""JSON objects from files, and the error for a file that does not hold what it should. Knows no fields."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from mlx_flash.errors import FormatError, ReadError

from .lfs_pointer import is_pointer, pointer_problem

MAX_JSON_BYTES = 64 << 20


def format_error(where: object, problem: str, remedy: str = "download or convert it again") -> FormatError:
    """A FormatError from its three parts: the file or field, what is wrong with it, what the user can do."""
    return FormatError(f"{where} {problem}; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises FormatError if the file holds anything else, is longer than MAX_JSON_BYTES, is a Git LFS pointer or no
    regular file; ReadError if the system cannot read it.
    """
    return load_json_object(path, read_small_file(path))


def read_small_file(path: Path) -> bytes:
    """The bytes of a file of at most MAX_JSON_BYTES; raises as `read_json` does."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise format_error(path, "is not a regular file")
        if is_pointer(path):
            raise FormatError(pointer_problem(path))
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise format_error(path, f"is longer than {MAX_JSON_BYTES} bytes")
    return data


def load_json_object(path: Path, text: bytes, strict: bool = False) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes; raises FormatError, naming the file, for anything else.

    strict: refuse an object that has a key twice
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates if strict else None)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, an integer with too many digits
        raise format_error(path, f"is not readable as JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise format_error(path, f"holds a JSON {type(value).__name__} where an object belongs")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
