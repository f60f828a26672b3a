"""Shared test fixtures: data that lies beside the project, and which backends run here."""

from __future__ import annotations

import os
from pathlib import Path

# Two processes share the cores: a BLAS with threads of its own in each would wait for itself. Before NumPy is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Machines are noisy: no deadline. In CI the same examples every time, so that a failure is the change's.
settings.register_profile("here", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("here")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(relative: str) -> Path:
    """A path under ../shared; skips the test, saying so, where it is missing."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}, which is not here")
    return path
