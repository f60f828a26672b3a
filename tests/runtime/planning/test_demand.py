"""What a decoded token of a tiny model asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.config import FlashConfig, Selection
from mlx_flash.models.specs.model_spec import LayerSpec
from mlx_flash.runtime.planning.demand import ALIKE, WORST, Demand, token_demand
from mlx_flash.runtime.planning.planner import plan_checkpoint
from tests.calibrated import calibrate_by_hand
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost-model")
    return mlx_flash.convert(make_tiny("openelm-relu", folder), folder / "flash")


@pytest.fixture(scope="module")
def calibrated(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    return calibrate_by_hand(mlx_flash.convert(flash.parent / "openelm-relu", folder / "flash"))


def config(**fields: Any) -> FlashConfig:
    return FlashConfig(**{"backend": "numpy", **fields})


def test_demand_counts_every_matrix(flash: Path) -> None:
    plan = plan_checkpoint(flash, config(select="all"))
    shapes = plan.spec.resident_shapes()
    matrices = sum(4 * int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    found = plan.demand
    assert sum(layer.dense_bytes for layer in found.layers) + found.head_bytes == matrices  # tied: the head is one
    assert found.first_part_bytes + found.other_parts_bytes == plan.checkpoint.layouts[0].bundle_bytes
    assert [layer.missed for layer in found.layers] == [0.0] * 3 and found.assumption == ""
    assert found.kv_bytes == plan.spec.kv_items_per_token * 4


def test_demand_follows_the_curves_and_says_where_it_guesses(flash: Path, calibrated: Path) -> None:
    plan = plan_checkpoint(calibrated, config(select="predictor"))
    layouts, known = plan.checkpoint.layouts, plan.calibration

    def of(name: str, fraction: float | None, share: float, found: Any = known) -> Demand:
        slots = [int(share * layout.count) for layout in layouts]
        return token_demand(replace(plan.setup, calibration=found), Selection(name, fraction), slots)

    for share, missed in ((0.0, 0.4), (0.2, 0.3), (0.4, 0.2), (1.0, 0.0)):
        for layer in of("predictor", None, share).layers:
            assert layer.asked == pytest.approx(0.4 * layer.bundles)
            assert layer.missed == pytest.approx(missed * layer.bundles, abs=1)
    gate = of("gate", None, 0.5)
    row = layouts[0].parts[0].nbytes
    assert gate.layers[0].lead_bytes == layouts[0].count * row and gate.read_bytes == gate.stride - row
    assert gate.first_part_bytes == 0 and gate.other_parts_bytes == 2 * row and gate.assumption == ""
    worst = of("gate", None, 0.25, None)
    assert worst.assumption == WORST
    assert [(w.asked, w.missed) for w in worst.layers] == [(w.bundles, w.bundles - w.capacity) for w in worst.layers]
    half = of("prompt", 0.5, 0.25)
    assert [w.missed for w in half.layers] == [round(0.5 * w.bundles) - w.capacity for w in half.layers]
    assert half.assumption == "" and sum(w.missed for w in of("static", 0.5, 0.75).layers) == 0
    cut = of("threshold", 0.75, 0.5)
    assert cut.assumption == ALIKE and cut.layers[0].missed == pytest.approx(0.125 * cut.layers[0].bundles)
    seen = worst.observed([1.0, 2.0, 3.0], [0.5, 0.0, 1.0])
    assert [w.asked for w in seen.layers] == [w.fired for w in seen.layers] == [1, 2, 3]
    assert seen.assumption == "" and sum(w.missed for w in seen.layers) == 1.5


def test_attention_of_every_shape_is_counted(flash: Path) -> None:
    plan = plan_checkpoint(flash, config(select="all"))
    odd = replace(plan.spec, layers=(LayerSpec(6, 2, 7), *plan.spec.layers[1:]))
    found = token_demand(replace(plan.setup, spec=odd), Selection("all"), [0, 0, 0])
    assert found.layers[0].dense_bytes == 4 * odd.head_dim * odd.dim * (6 + 2 + 2 + 6)
