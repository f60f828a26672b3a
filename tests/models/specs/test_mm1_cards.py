"""The MM1 cards: what their READMEs say, and that both backends run them, shrunken, with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.mixtures import read_mixture
from mlx_flash.runtime.model_path import models_folder
from mlx_flash.tools.random_model import make_random

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 300, "moe_intermediate_size": 32}


def card(name: str) -> dict[str, Any]:
    return json.loads((models_folder() / name / "config.json").read_text())


def items(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_the_cards_say_what_they_are() -> None:
    dense, moe = read_spec(card("mm1-3b")), read_mixture(card("mm1-3b-moe"))
    readme = (models_folder() / "mm1-3b" / "README.md").read_text()
    parameters, ffn = items(dense.resident_shapes()) + items(dense.ffn_shapes()), items(dense.ffn_shapes())
    assert f"{parameters:,}" in readme and f"{100 * ffn / parameters:.1f} %" in readme
    assert f"{2 * dense.kv_items_per_token:,} bytes" in readme and "our choice" in readme
    assert moe.experts == (0, 64) * 16 and moe.top_k == 2
    assert (moe.dim, moe.layers, moe.width) == (dense.dim, dense.layers, dense.layers[0].intermediate)
    readme, resident = (models_folder() / "mm1-3b-moe" / "README.md").read_text(), items(moe.resident_shapes())
    experts = items(moe.ffn_shapes())
    assert f"{resident + experts:,}, {resident + experts * 2 // 64:,}" in readme and "our choice" in readme


@pytest.mark.parametrize("name", ["mm1-3b", "mm1-3b-moe"])
def test_random_weights_run_alike_on_both_backends(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="this is about both backends")
    (tmp_path / "config.json").write_text(json.dumps(card(name) | SMALL))
    path = make_random(tmp_path, tmp_path / name, dtype="float32")
    if name == "mm1-3b":
        path = mlx_flash.convert(path, tmp_path / "flash")
    found = []
    for backend in ("numpy", "mlx"):
        model, _ = mlx_flash.load(path, backend=backend, memory="40MB", max_context=64, slots=0.25)
        found.append(np.stack(list(model.flash.forced(model, [5, 17, 99], [7, 8]))))
        assert model.flash.stats.bytes_read > 0
        model.flash.close()
    assert found[0].std() > 0
    np.testing.assert_allclose(found[0], found[1], atol=1e-4 * np.abs(found[0]).max())
