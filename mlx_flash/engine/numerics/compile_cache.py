"""Functions compiled with Numba, cached on disk where that is possible. Importing this imports Numba."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


def built_on(*files: str) -> str:
    """What names what these files say: Numba's disk cache looks at a function's own file only."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:8]


def cached(make: Callable[..., Any], function: Any, **options: Any) -> Any:
    """`function` compiled by `make`, cached on disk where some folder can be written."""
    try:
        return make(cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no locator: the install and the home are read-only
        return make(error_model="numpy", **options)(function)


def compiled(function: Any) -> Any:
    """`function` without the interpreter, compiled when first called."""
    return cached(numba.njit, function, nogil=True)
