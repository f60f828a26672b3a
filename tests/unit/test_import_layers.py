"""Imports point one way only (DESIGN 10), storage and residency never import MLX, and the public names are pinned."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mlx_flash

PACKAGE = Path(mlx_flash.__file__).parent
# A file may import from the layers before its own, and from its own.
LAYERS = [
    ("errors", "config", "address_space", "stats", "casting", "options", "affine", "microscaling", "compiling"),
    ("machine",),
    ("storage",),
    ("residency",),
    ("backends",),
    ("selection",),
    ("time_limit", "tokenizer", "detokenizer", "sampling", "kept"),
    ("models",),
    ("folder", "source", "end_ids", "tied_head", "convert", "convert_groups", "convert_plan", "convert_quant"),
    ("preflight", "random_model", "resolve"),
    ("demand", "cost_model"),
    ("run", "costs", "experts", "load", "generate", "inspection"),
    ("measure",),
    ("tuning",),
    ("http_requests", "http_replies", "http_handler", "http_server"),
    ("serve", "chat"),
    ("cli", "__main__", "__init__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it, names of functions called aside."""
    found: set[str] = set()
    package = ["mlx_flash", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_layer_or_those_before(path: Path) -> None:
    own = RANK[top(path)]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "mlx_flash" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= own, f"{path.name} imports {name}, which lies below it"


@pytest.mark.parametrize("layer", ["storage", "residency", "selection"])
def test_bytes_and_slots_know_no_array_library_but_numpy(layer: str) -> None:
    for path in (PACKAGE / layer).rglob("*.py"):
        assert not any(name.split(".")[0] in ("mlx", "mlx_lm", "torch", "numba") for name in imported(path)), path


def test_only_the_mlx_files_import_mlx() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] in ("mlx", "mlx_lm") for name in imported(path))
    }
    backends = {f"backends/mlx{name}.py" for name in ("", "_groups", "_rows", "_slab", "_sum")}
    names = ("mlx", "mlx_compat", "mlx_dense", "mlx_experts", "mlx_fit", "mlx_head", "mlx_kv", "mlx_positions")
    more = ("mlx_fused", "mlx_joined", "mlx_mixtures", "mlx_routers", "mlx_switch")
    models = {f"models/{name}.py" for name in (*names, *more)}
    assert users == {"http_server.py"} | backends | models


def test_one_file_imports_mlx_lm() -> None:
    users = [path for path in FILES if any(name.split(".")[0] == "mlx_lm" for name in imported(path))]
    assert [str(path.relative_to(PACKAGE)) for path in users] == ["models/mlx_compat.py"]


def test_public_names() -> None:
    errors = {"FlashError", "UsageError", "BudgetError", "ConfigError", "FormatError", "ReadError", "IntegrityError"}
    errors |= {"SpaceError", "BackendError"}
    assert set(mlx_flash.__all__) == {"load", "generate", "stream_generate", "convert", "FlashConfig"} | errors
