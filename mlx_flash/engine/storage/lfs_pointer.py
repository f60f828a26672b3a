"""Git LFS pointers: the small text files that a clone made without `git lfs` has in place of large files."""

from __future__ import annotations

import os
from pathlib import Path

START = b"version https://git-lfs.github.com/spec/v1"
MOST_BYTES = 1024  # by Git LFS's specification


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a Git LFS pointer; False for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size < MOST_BYTES and file.read(len(START)) == START
    except OSError:
        return False


def pointer_problem(path: Path) -> str:
    """The error message for a file that is a pointer."""
    return (
        f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder, or download the model "
        "with `hf download`"
    )
