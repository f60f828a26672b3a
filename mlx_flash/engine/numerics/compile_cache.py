"""Compiling functions with Numba, with a cache on disk where possible. Importing this imports Numba."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from mlx_flash.engine.system.interrupts import held_interrupts


def built_on(*files: str) -> str:
    """A short hash of these files' contents, for the names of functions that depend on them: Numba's disk cache checks
    a function's own file only."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:8]


def cached(make: Callable[..., Any], function: Any, **options: Any) -> Any:
    """`function` compiled by `make`, cached on disk if there is a folder that can be written."""
    with held_interrupts():  # LLVM calls back into Python, and an exception there ends the process
        try:
            return make(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no locator: the install and the home are read-only
            return make(error_model="numpy", **options)(function)


def compiled(function: Any) -> Any:
    """`function`, compiled when first called; it runs without the interpreter and its lock."""
    dispatcher = cached(numba.njit, function, nogil=True)
    compile_now = dispatcher.compile

    def compile_held(signature: Any) -> Any:
        with held_interrupts():
            return compile_now(signature)

    dispatcher.compile = compile_held
    return dispatcher
