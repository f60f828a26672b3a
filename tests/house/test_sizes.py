"""No file over 400 lines, no function over 60, in the package and its tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mlx_flash

ROOT = Path(mlx_flash.__file__).resolve().parents[1]
FILES = sorted(path for folder in ("mlx_flash", "tests") for path in (ROOT / folder).rglob("*.py"))
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60


def too_long(path: Path) -> set[str]:
    """Names of the file, if it is too long, and of its functions that are."""
    text = path.read_text()
    found = {path.name} if len(text.splitlines()) > MOST_FILE_LINES else set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno >= MOST_FUNCTION_LINES:
                found.add(node.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    assert not too_long(path)
