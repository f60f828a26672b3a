"""Plans on a machine that was measured: what they show, and that no setting of the reads changes a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.errors import BudgetError, FormatError
from mlx_flash.runtime.loading import load_planned
from mlx_flash.runtime.machine import Machine
from mlx_flash.runtime.planning.neuron_plan import NeuronPlan
from mlx_flash.runtime.planning.planner import LoadMachine, plan_checkpoint, plan_model
from mlx_flash.runtime.planning.tuning import Tuning
from mlx_flash.tools.inspection import inspect_model, inspect_plan, print_inspection
from tests.calibrated import calibrate_by_hand
from tests.runtime.machines import machine
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


def measured(path: Path, machine: LoadMachine, **fields: Any) -> NeuronPlan:
    """The plan on a machine that `machine` tells about."""
    return plan_checkpoint(path, config(**fields), machine=machine)


def test_without_a_probe_all_is_as_it_was(flash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_checkpoint(flash, config(select="gate"))
    assert plan.tuning == Tuning() and plan.prediction is None and plan.machine is None
    assert plan.memory.staging_blocks == 6 and plan.tuning.reader_options == {"direct": True, "merging": Merging()}
    report = inspect_model(flash, config())
    assert report["machine"] == {"measured": False, "problem": None} and report["prediction"] is None
    assert {entry["why"] for entry in report["tuning"].values()} == {"default"}
    print_inspection(report)
    assert "mlx_flash bench --probe" in capsys.readouterr().out


def test_a_measured_plan_is_chosen_predicted_and_shown(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for select in ("all", "gate", "predictor", "prompt:0.5", "prompt:auto", "threshold:0.5", "static:0.5"):
        plan = measured(calibrated, lambda path: machine(), select=select)
        assert all(why.startswith("measured: ") for why in plan.tuning.why.values()) and len(plan.tuning.why) == 5
        assert plan.memory.staging_blocks <= plan.tuning.staging_blocks
        report = inspect_plan(plan)
        found = report["prediction"]
        parts = ("waited_s", "dense_s", "sparse_s", "selection_s", "other_s")
        assert found["total_s"] == pytest.approx(sum(found[name] for name in parts))
        assert found["tokens_per_s"] == pytest.approx(1 / found["total_s"]) and found["prompt_tokens_per_s"] > 0
        assert report["machine"]["measured"] and report["machine"]["device"] == "disk"
        print_inspection(report)
        out = capsys.readouterr().out
        assert f"predicted for {report['selector']}: {found['tokens_per_s']:.3g} tokens/s" in out
        assert "(measured: " in out and "bench --probe" not in out
    given = inspect_plan(measured(calibrated, lambda path: machine(), direct="off", merge_gap=512))["tuning"]
    assert given["direct"] == {"value": False, "why": "given"} and given["merge_gap"]["value"] == 512
    tiny = inspect_plan(measured(calibrated, lambda path: machine(), memory=1000))
    assert not tiny["fits"] and tiny["prediction"] is None and tiny["tuning"]["merge_gap"]["why"].startswith("meas")


def test_a_measured_plan_needs_no_more_memory(calibrated: Path) -> None:
    for select in ("all", "gate", "predictor"):
        before = plan_checkpoint(calibrated, config(select=select)).costs
        after = measured(calibrated, lambda path: machine(read_s=1e-3), select=select).costs
        assert after.smallest <= before.smallest


def test_the_machine_of_the_checkpoints_folder_is_asked_for(flash: Path) -> None:
    asked: list[Path] = []
    plan_model(flash, config(), machine=asked.append)
    assert asked == [flash]


def test_a_damaged_probe_stops_nobody(flash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def damaged(path: Path) -> Machine:
        raise FormatError(f"{path}: the probe's file is not JSON")

    plan = measured(flash, damaged)
    model, _ = load_planned(plan)
    model.flash.close()
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "not JSON" in shown.err
    assert model.flash.plan.tuning == Tuning()
    report = inspect_plan(plan)
    assert not report["machine"]["measured"] and "not JSON" in report["machine"]["problem"]
    print_inspection(report)
    assert "not JSON" in capsys.readouterr().out


def test_no_setting_changes_a_bit(calibrated: Path) -> None:
    def logits(machine: LoadMachine = lambda path: None, **fields: Any) -> bytes:
        model, _ = load_planned(measured(calibrated, machine, max_context=32, prefill_chunk=8, **fields))
        seen = b"".join(step.tobytes() for step in model.flash.forced(model, list(range(11)), [5, 6, 7, 8]))
        model.flash.close()
        return seen

    chosen = {"merge_gap": "64KiB", "reads_in_flight": 1, "staging_blocks": 2, "slots": 0.3}
    for select in ("all", "gate", "predictor"):
        whole = logits(select=select, look_ahead="off")
        for direct in ("on", "off"):
            assert logits(select=select, direct=direct, look_ahead="off", **chosen) == whole
        assert logits(lambda path: machine(read_s=1e-4), select=select, slots=0.5) == whole


def test_settings_reach_the_reader_and_staging(calibrated: Path) -> None:
    fields = {"select": "gate", "merge_gap": 1024, "direct": "off", "reads_in_flight": 3, "staging_blocks": 2}
    model, _ = mlx_flash.load(calibrated, config(**fields))
    shared = model.flash.shared
    assert (shared.reader.merging.gap, shared.reader.direct, shared.reader.threads) == (1024, False, 3)
    assert len(shared.stream.slabs) == 2
    model.flash.close()
    least = inspect_model(calibrated, config(**fields, slots=0))["smallest_budget_bytes"]
    assert plan_checkpoint(calibrated, config(**fields, memory=least)).memory.staging_blocks == 2, (
        "also where it is tight"
    )
    whole, _ = mlx_flash.load(calibrated, config(select="all"))
    assert not whole.flash.shared.stream.slabs, "nothing streams, nothing is kept for it"
    whole.flash.close()


def test_slots_by_share_fit_or_are_refused_with_the_numbers(calibrated: Path) -> None:
    counts = [layout.count for layout in plan_checkpoint(calibrated, config()).checkpoint.layouts]
    half = plan_checkpoint(calibrated, config(select="gate", slots=0.5))
    assert list(half.memory.capacities) == [count // 2 for count in counts]
    assert not sum(plan_checkpoint(calibrated, config(select="gate", slots=0)).memory.capacities)
    low = inspect_model(calibrated, config(select="gate"))["smallest_budget_bytes"]
    with pytest.raises(BudgetError, match=r"slots .* or a smaller --slots"):
        plan_checkpoint(calibrated, config(select="gate", slots=0.5, memory=low), loads=True)
    enough = inspect_model(calibrated, config(select="gate", slots=0.5))["smallest_budget_bytes"]
    assert plan_checkpoint(calibrated, config(select="gate", slots=0.5, memory=enough)).memory.staging_blocks == 1
