"""The backends by name, and which model code goes with each.

A further backend is registered with `register` and needs no change anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlx_flash.engine.backends.base import Backend
from mlx_flash.errors import BackendError

from .model_code import ExpertCode, ModelCode


@dataclass(frozen=True)
class Entry:
    """One backend. Its modules are imported by the functions, when they are needed.

    make: the backend; models: its model code; experts: the code for mixtures of experts, None where it runs none
    families: the column of the family table that says which families it runs; preferred: whether `auto` takes it here
    """

    make: Callable[[], Backend]
    models: Callable[[], ModelCode]
    families: str
    preferred: Callable[[], bool]
    experts: Callable[[], ExpertCode] | None = None


def _make_mlx() -> Backend:
    try:
        from mlx_flash.engine.backends.mlx.backend import MlxBackend
    except ImportError as error:
        raise BackendError(
            f"the mlx backend needs mlx and mlx-lm ({error}); pip install 'mlx-flash-runtime[mlx]', or use "
            "--backend numpy"
        ) from error
    return MlxBackend()


def _mlx_has_gpu() -> bool:
    try:
        from mlx_flash.engine.backends.mlx.backend import available
    except ImportError:
        return False
    return available()


def _mlx_models() -> ModelCode:
    from mlx_flash.models.mlx import model

    return model


def _mlx_experts() -> ExpertCode:
    from mlx_flash.models.mlx import experts

    return experts


def _make_numpy() -> Backend:
    from mlx_flash.engine.backends.numpy.backend import NumpyBackend

    return NumpyBackend()


def _numpy_models() -> ModelCode:
    from mlx_flash.models.numpy import decoder

    return decoder


def _numpy_experts() -> ExpertCode:
    from mlx_flash.models.numpy import experts

    return experts


_ENTRIES: dict[str, Entry] = {
    "mlx": Entry(_make_mlx, _mlx_models, "mlx", _mlx_has_gpu, _mlx_experts),
    "numpy": Entry(_make_numpy, _numpy_models, "numpy", lambda: True, _numpy_experts),
}


def register(name: str, entry: Entry) -> None:
    """Add a backend under a new name; `auto` prefers those registered first."""
    if name in _ENTRIES:
        raise ValueError(f"backend {name!r} exists")
    _ENTRIES[name] = entry


def check_name(name: str) -> None:
    """Raise BackendError for the name of a backend that does not exist."""
    if name != "auto" and name not in _ENTRIES:
        raise BackendError(f"unknown backend {name!r}; known: auto, {', '.join(_ENTRIES)}")


def choose(name: str, families: tuple[str, ...], problems: Mapping[str, str] | None = None) -> tuple[str, Entry]:
    """The entry for a backend name; "auto" is the first preferred one whose column the model's family has, or the
    first one where none is preferred. problems: why a backend cannot run this model though it knows its family.

    Raises BackendError for an unknown name, for a family without that backend, and for a problem.
    """
    problems = problems or {}
    if name == "auto":
        able = [(n, e) for n, e in _ENTRIES.items() if e.families in families and n not in problems]
        if not able:
            raise BackendError(next(iter(problems.values())))
        return next(((n, e) for n, e in able if e.preferred()), able[0])
    check_name(name)
    if _ENTRIES[name].families not in families:
        raise BackendError(f"this model family runs on {' and '.join(families)} only, not on {name}")
    if name in problems:
        raise BackendError(problems[name])
    return name, _ENTRIES[name]
