"""Tiny models with a made-up calibration, on every backend that is installed."""

from __future__ import annotations

import pytest

from tests.runtime.lossy_models import BACKENDS, Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("lossy"), {})


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="the mlx backend needs mlx-lm")
    return str(request.param)
