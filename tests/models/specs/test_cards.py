"""The model cards that are shipped: every key of their config.json is understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_flash.models.numpy.decoder import keys_read
from mlx_flash.models.specs.key_checks import check_fixed, unknown_keys
from mlx_flash.runtime.model_path import models_folder

CARDS = sorted(path.parent for path in models_folder().glob("*/config.json"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_no_key_of_a_card_is_reported(card: Path) -> None:
    config = json.loads((card / "config.json").read_text())
    check_fixed(config)
    assert unknown_keys(config, keys_read(config)) == []
    assert unknown_keys(config | {"residual_scale": 2.0}, keys_read(config)) == ["residual_scale"]
