"""Shared test fixtures: data that lies beside the project, and which backends run here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Several processes share the cores: a BLAS with threads of its own in each would wait for itself. Before NumPy comes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Machines are noisy: no deadline. In CI the same examples every time, so that a failure is the change's.
settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def unmeasured() -> Iterator[None]:
    """No test's plan depends on what `mlx_flash bench --probe` measured here. For the session, as fixtures of modules
    load models too. A test that wants a measured machine hands it to `plan_checkpoint` or `plan_model`."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_flash.runtime.planning.planner.load_machine", lambda path: None)
        yield


def shared_path(relative: str) -> Path:
    """A path under ../shared; skips the test, saying so, where it is missing."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not here")
    return path
