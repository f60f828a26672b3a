"""The floor plan: imports go down only, never in a circle; few files know MLX; public names are pinned."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mlx_flash

PACKAGE = Path(mlx_flash.__file__).parent
# From the ground up. A file may import from the floors before its own, and from its own.
FLOORS = [
    ("errors", "config", "stats"),
    ("engine.system",),
    ("engine.numerics",),
    ("engine.storage",),
    ("engine.residency",),
    ("engine.backends",),
    ("engine.selection",),
    ("models.text", "models.prompt_cache"),
    ("models.specs",),
    ("models.conversion",),
    ("models.numpy", "models.mlx"),
    ("runtime",),
    ("tools",),
    ("apps",),
    ("cli", "__main__", "__init__"),
]
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name within the package; that of a folder's __init__.py ends in it."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path): path for path in FILES}


def floor(module: str) -> int | None:
    """The rank of the floor that a module is on; None for the door of a folder that holds several floors."""
    return next((RANK[name] for name in RANK if module == name or module.startswith(f"{name}.")), None)


def imported(path: Path, deferred: bool = True) -> set[str]:
    """Full names that a file imports, also under `if TYPE_CHECKING`; deferred: also within functions."""
    found: set[str] = set()
    package = ["mlx_flash", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text())
    skipped = set() if deferred else inside_functions(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def inside_functions(tree: ast.Module) -> set[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {inner for function in functions for inner in ast.walk(function)}


def own_imports(path: Path) -> set[str]:
    """The package's modules that a file imports anywhere, without doors of folders."""
    names = {name.removeprefix("mlx_flash.") for name in imported(path) if name.startswith("mlx_flash.")}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) is not None])
def test_a_file_imports_from_its_own_floor_or_those_below(module: str) -> None:
    for name in own_imports(MODULES[module]):
        above = floor(name)
        assert above is None or above <= floor(module), f"{module} imports {name}, which lies above it"


def test_every_file_is_on_a_floor() -> None:
    doors = {"engine.__init__", "models.__init__"}
    assert {module for module in MODULES if floor(module) is None} <= doors


def test_no_circle_of_imports() -> None:
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_no_module_has_the_name_of_its_function() -> None:
    for module, path in MODULES.items():
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert module.split(".")[-1] not in names, path


def test_no_module_only_hands_on_names() -> None:
    for module, path in MODULES.items():
        body = ast.parse(path.read_text()).body[1:]  # after the docstring
        others = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert others or not body, f"{module} only imports what is defined elsewhere"


def test_public_classes_have_names_of_their_own() -> None:
    homes: dict[str, str] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in homes, f"{module} and {homes[node.name]} both define {node.name}"
                homes[node.name] = module


def test_no_file_imports_a_private_name() -> None:
    for path in FILES:
        if path.name == "quantised_vector_code.py":  # still to be mended
            continue
        private = {name for name in imported(path) if re.search(r"\._[a-z]", name) and name.startswith("mlx_flash.")}
        assert not private, f"{path} imports {private}"


def test_only_commands_parse_arguments() -> None:
    for module, path in MODULES.items():
        if any(name.split(".")[0] == "argparse" for name in imported(path)):
            assert module in ("cli", "apps.options") or module.startswith("apps.commands."), module


@pytest.mark.parametrize("folder", ["storage", "residency", "selection"])
def test_bytes_and_slots_know_no_array_library_but_numpy(folder: str) -> None:
    for path in (PACKAGE / "engine" / folder).rglob("*.py"):
        assert not any(name.split(".")[0] in ("mlx", "mlx_lm", "torch", "numba") for name in imported(path)), path


def test_only_the_mlx_folders_import_mlx() -> None:
    homes = {PACKAGE / "engine/backends/mlx", PACKAGE / "models/mlx", PACKAGE / "apps/server"}
    for path in FILES:
        if any(name.split(".")[0] in ("mlx", "mlx_lm") for name in imported(path)):
            assert path.parent in homes, path


def test_one_file_imports_mlx_lm() -> None:
    users = [path for path in FILES if any(name.split(".")[0] == "mlx_lm" for name in imported(path))]
    assert [str(path.relative_to(PACKAGE)) for path in users] == ["models/mlx/compat.py"]


def test_public_names() -> None:
    errors = {"FlashError", "UsageError", "BudgetError", "ConfigError", "FormatError", "ReadError", "IntegrityError"}
    errors |= {"SpaceError", "BackendError"}
    assert set(mlx_flash.__all__) == {"load", "generate", "stream_generate", "convert", "FlashConfig"} | errors
