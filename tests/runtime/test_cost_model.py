"""The cost model: what it chooses on made-up machines, what it predicts, and that no setting changes a bit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_flash
from mlx_flash.apps.options import run_config
from mlx_flash.cli import make_parser
from mlx_flash.config import FlashConfig, Selection
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.errors import BudgetError, FormatError, UsageError
from mlx_flash.models.specs.model_spec import LayerSpec
from mlx_flash.runtime.loading import decide, plan_run
from mlx_flash.runtime.machine import KERNELS, Machine, ReadRate
from mlx_flash.runtime.planning.cost_model import (
    COLD,
    PIECE,
    STAGING,
    Tuning,
    choose_tuning,
    default_tuning,
    given_settings,
    predict,
    ring_s,
)
from mlx_flash.runtime.planning.demand import ALIKE, WORST, Demand, LayerDemand, token_demand
from mlx_flash.tools.inspection import inspect_model, print_inspection
from tests.calibrated import calibrate_by_hand
from tests.tiny import make_tiny

DEPTHS, SIZES = (1, 4, 16, 64, 256), (4096, 16384, 65536, PIECE)


def machine(
    overhead_s: float = 100e-6,
    row_rate: float = 2e9,
    read_s: float = 10e-6,
    cpu_s: float = 0.0,
    buffered: float | None = None,
    noise: np.ndarray | None = None,
    scale: float = 1.0,
    compute: float = 1.0,
    **fields: Any,
) -> Machine:
    """A disk that answers after `overhead_s`, begins a read every `read_s` and moves `row_rate` bytes a second; reads
    through the page cache take `buffered` times as long."""

    def rate(nbytes: int, depth: int, scattered: bool) -> float:
        busy = nbytes / row_rate + (read_s if scattered else 0.0)
        return nbytes / max(busy, (overhead_s + busy) / depth)

    kinds = [(n, d, scattered) for n in SIZES for d in DEPTHS for scattered in (True, False)]
    factors = np.ones(len(kinds)) if noise is None else noise
    reads = [
        ReadRate(*kind, True, float(rate(*kind) * f * scale), cpu_s) for kind, f in zip(kinds, factors, strict=True)
    ]
    if buffered is not None:
        reads += [replace(read, direct=False, bytes_per_s=read.bytes_per_s / buffered) for read in reads]
    kernels = {name: 10e9 * compute for name in KERNELS}
    known = {"kernels": kernels, "matmul_flops": 100e9 * compute, "layer_s": {"all": 1e-5, "selected": 1e-4}}
    about = {"device": "disk", "host": "here", "cores": 2, "when": "2025-01-01T00:00:00", "reader": "AioReader"}
    made = Machine(reads=tuple(reads), memory_bytes_per_s=10e9, **{**about, **known, **fields})
    made.check()
    return made


NOISE = st.lists(st.floats(0.5, 2.0), min_size=40, max_size=40).map(np.array)


def wanted(selector: str = "predictor", missed: float = 0.025, slots: float = 0.5, **fields: Any) -> Demand:
    """Three layers of a model of width 1024 in 16 bits, a tenth of the bundles asked for."""
    layers = []
    for count in (1024, 2048, 4096):
        asked = float(count) if selector == "all" else 0.1 * count
        capacity = int(slots * count) // 256 * 256
        misses = float(count - capacity) if selector == "all" else missed * count
        layers.append(LayerDemand(count, capacity, 8 << 20, 0, 1 << 20, asked, asked, misses, 0.5, 0.8))
    known: dict[str, Any] = {"head_bytes": 64 << 20, "kv_bytes": 4096, "chunk": 256, **fields}
    return Demand(selector, "bfloat16", tuple(layers), 6144, 6144, 2048, 4096, **known)


# What is chosen


def test_gaps_are_read_over_while_that_is_cheaper_than_another_read() -> None:
    chosen = choose_tuning(machine(read_s=10e-6, row_rate=2e9), wanted())
    assert chosen.merge_gap == pytest.approx(20_000, abs=2500)  # between measured sizes it is a guess
    assert chosen.merge_gap % 512 == 0 and chosen.why["merge_gap"].startswith("measured: ")
    assert chosen.merging.gap == chosen.merge_gap and chosen.merging.share > Tuning().merging.share
    dear = choose_tuning(machine(read_s=10e-6, row_rate=2e9, cpu_s=5e-6), wanted())
    assert dear.merge_gap > chosen.merge_gap, "the processor's part counts"


@given(st.floats(0, 1e-4), st.floats(0, 1e-4), st.floats(2e8, 2e10))
def test_the_slower_the_reads_the_longer_the_gap(a: float, b: float, row_rate: float) -> None:
    demands = replace(wanted(), read_bytes=4096)  # a measured size: no interpolation
    gaps = [choose_tuning(machine(read_s=s, row_rate=row_rate), demands).merge_gap for s in sorted((a, b))]
    assert 0 <= gaps[0] <= gaps[1] <= PIECE


def test_reads_in_flight_are_enough_for_the_rate_and_for_a_layers_misses() -> None:
    few = wanted(missed=0.002)  # 8 bundles of the largest layer
    assert choose_tuning(machine(overhead_s=150e-6), few).reads_in_flight == 16
    assert choose_tuning(machine(overhead_s=600e-6), few).reads_in_flight == 64
    assert choose_tuning(machine(overhead_s=150e-6), wanted(missed=0.03)).reads_in_flight == 256
    thrash = [0.5 if depth == 256 else 1.0 for _ in SIZES for depth in DEPTHS for _ in range(2)]
    slow = machine(overhead_s=150e-6, noise=np.array(thrash))
    assert choose_tuning(slow, wanted(missed=0.03)).reads_in_flight == 64, "where more are slower they are not begun"


def test_direct_unless_the_page_cache_clearly_wins() -> None:
    for buffered, direct in ((2.0, True), (1.0, True), (0.95, True), (0.5, False)):
        chosen = choose_tuning(machine(buffered=buffered), wanted())
        assert chosen.direct is direct, buffered
        assert choose_tuning(machine(buffered=buffered), wanted("all")).direct is direct, buffered
    assert choose_tuning(machine(), wanted()).direct, "not measured"


def test_staging_is_no_more_than_helps() -> None:
    def seconds(staging: int) -> float:
        return predict(machine(), wanted("all"), chosen, staging).total_s

    chosen = choose_tuning(machine(), wanted("all"))
    assert chosen.staging_blocks in STAGING and chosen.staging_blocks > 1
    assert seconds(chosen.staging_blocks) <= 1.02 * seconds(64)
    less = STAGING[STAGING.index(chosen.staging_blocks) - 1]
    assert seconds(less) > seconds(chosen.staging_blocks)
    assert choose_tuning(machine(), wanted("all", slots=1.0)).staging_blocks == 1, "nothing streams"
    assert choose_tuning(machine(), wanted(slots=1.0)).staging_blocks > 1, "a first prompt does"


def test_look_ahead_is_off_where_it_cannot_pay() -> None:
    model = wanted(missed=0.05)
    # With reads of which each waits for the disk's answer there is something to hide, and room to hide it in.
    assert choose_tuning(machine(overhead_s=1e-3), model).look_ahead == "auto"
    assert choose_tuning(machine(read_s=1e-3), model).look_ahead == "off", "the disk has no time for wrong guesses"
    assert choose_tuning(machine(overhead_s=1e-3), wanted(missed=0.0)).look_ahead == "off"
    assert choose_tuning(machine(overhead_s=1e-3), wanted("gate", missed=0.05)).look_ahead == "off"
    unknown = replace(model, layers=tuple(replace(layer, recall=0.0) for layer in model.layers))
    assert choose_tuning(machine(overhead_s=1e-3), unknown).look_ahead == "off"


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "merge_gap": st.integers(0, 1 << 20),
        "reads_in_flight": st.integers(1, 4096),
        "direct": st.booleans(),
        "staging_blocks": st.integers(1, 40),
        "look_ahead": st.sampled_from(["on", "off"]),
    },
)


@settings(max_examples=30)
@given(SETTINGS, st.sampled_from(["all", "predictor", "gate", "prompt"]), NOISE)
def test_what_is_given_stays(given: dict, selector: str, noise: np.ndarray) -> None:
    chosen = choose_tuning(machine(noise=noise, buffered=1.0), wanted(selector), given)
    for name in ("merge_gap", "reads_in_flight", "direct", "staging_blocks", "look_ahead"):
        if name in given:
            assert getattr(chosen, name) == given[name] and chosen.why[name] == "given"
        else:
            assert chosen.why[name].startswith("measured: ")
    assert chosen.reads_in_flight is not None and chosen.reads_in_flight >= 1 and chosen.staging_blocks >= 1
    kept = default_tuning(given)
    assert {name: kept.report()[name] for name in given} == {n: {"value": v, "why": "given"} for n, v in given.items()}
    assert all(entry["why"] == "default" for name, entry in kept.report().items() if name not in given)


def test_a_configs_settings_are_the_tunings() -> None:
    assert given_settings(FlashConfig()) == {}
    config = FlashConfig(merge_gap="16KiB", reads_in_flight=3, direct="off", staging_blocks=2, look_ahead="on")
    found = {"merge_gap": 16384, "reads_in_flight": 3, "direct": False, "staging_blocks": 2, "look_ahead": "on"}
    assert given_settings(config) == found


def test_every_setting_has_its_flag() -> None:
    wanted = {"merge_gap": "4KiB", "reads_in_flight": 7, "direct": "off", "staging_blocks": 2, "slots": 0.25}
    words = [word for name, value in wanted.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert run_config(make_parser().parse_args(["inspect", *words])) == FlashConfig(**wanted)
    auto = [word for name in wanted for word in ("--" + name.replace("_", "-"), "auto")]
    assert run_config(make_parser().parse_args(["inspect", *auto])) == FlashConfig()
    with pytest.raises(UsageError, match="--staging-blocks: invalid int value: 'two'"):
        make_parser().parse_args(["inspect", "--staging-blocks", "two"])


# What is predicted


def test_all_takes_the_longer_of_reading_and_computing() -> None:
    demands, tuning = wanted("all", slots=0.0), Tuning(staging_blocks=8)
    nbytes = 7168 * 6144
    slow_disk = predict(machine(row_rate=1e9), demands, tuning, 8)
    assert slow_disk.bytes_per_token == nbytes
    assert slow_disk.reads_s == pytest.approx(nbytes / 1e9, rel=0.05)
    assert slow_disk.total_s == pytest.approx(slow_disk.reads_s, rel=0.1)
    fast_disk = predict(machine(row_rate=100e9, overhead_s=0), demands, tuning, 8)
    busy = (nbytes + (3 * 8 << 20) + (64 << 20) + 256 * 4096) / 10e9 + 3 * 1e-5
    assert fast_disk.total_s == pytest.approx(busy, rel=0.05)
    assert fast_disk.waited_s < 0.05 * busy
    # One slab cannot fill while it is computed: both take their time.
    alone = predict(machine(row_rate=10e9, overhead_s=0), demands, tuning, 1)
    assert alone.total_s == pytest.approx(busy + alone.reads_s, rel=0.05)


def test_a_selected_layer_waits_for_what_its_hits_do_not_hide() -> None:
    demands, disk = wanted(missed=0.05), machine(overhead_s=1e-3)
    found = predict(disk, demands, Tuning(look_ahead="off"), 6)
    assert found.dense_s == pytest.approx(((3 * 8 << 20) + (64 << 20) + 256 * 4096) / 10e9)
    assert found.sparse_s == pytest.approx(716.8 * 6144 / 10e9)
    assert found.selection_s == pytest.approx((3 << 20) / 10e9)
    assert found.other_s == pytest.approx(COLD * 2 * 3e-4)  # a request per layer costs as much again
    assert found.bytes_per_token == pytest.approx(358.4 * 6144)
    # Half of a layer's bundles are hits; two of their three parts need no other neuron.
    assert found.waited_s == pytest.approx(found.reads_s - found.sparse_s / 3, rel=1e-6)
    assert found.tokens_per_s == pytest.approx(1 / found.total_s)
    short = replace(demands, layers=tuple(replace(layer, capacity=10) for layer in demands.layers))
    assert predict(disk, short, Tuning(look_ahead="off"), 6).waited_s == pytest.approx(found.reads_s)
    ahead = predict(disk, demands, Tuning(look_ahead="on"), 6)
    assert ahead.waited_s < found.waited_s and ahead.selection_s == 2 * found.selection_s
    assert ahead.bytes_per_token == pytest.approx(found.bytes_per_token * (0.5 + 0.5 / 0.8))
    assert predict(machine(cpu_s=1e-5), demands, Tuning(look_ahead="off"), 6).other_s == pytest.approx(
        COLD * 2 * 3e-4 + 358.4 * 1e-5
    )


@pytest.mark.parametrize("selector", ["all", "predictor"])
def test_nothing_is_waited_for_when_everything_is_resident(selector: str) -> None:
    found = predict(machine(), wanted(selector, missed=0.0, slots=1.0), Tuning(), 1)
    assert found.reads_s == found.waited_s == found.bytes_per_token == 0
    assert found.total_s == found.dense_s + found.sparse_s + found.selection_s + found.other_s


CASES = st.tuples(st.sampled_from(["all", "predictor", "gate"]), NOISE, st.sampled_from([1, 2, 6]))


@settings(max_examples=40)
@given(CASES, st.floats(1, 10), st.sampled_from([1, 8, 64, None]), st.sampled_from(["on", "off"]))
def test_a_faster_disk_or_processor_never_predicts_fewer_tokens(
    case: tuple, factor: float, depth: int | None, look_ahead: str
) -> None:
    selector, noise, staging = case
    tuning, demands = Tuning(reads_in_flight=depth, look_ahead=look_ahead), wanted(selector)
    slow = predict(machine(noise=noise, cpu_s=1e-6), demands, tuning, staging)
    for faster in (machine(noise=noise, cpu_s=1e-6, scale=factor), machine(noise=noise, cpu_s=1e-6, compute=factor)):
        fast = predict(faster, demands, tuning, staging)
        assert fast.tokens_per_s >= slow.tokens_per_s * (1 - 1e-9)
        assert fast.prompt_tokens_per_s >= slow.prompt_tokens_per_s * (1 - 1e-9)


@settings(max_examples=40)
@given(CASES, st.lists(st.floats(0, 1), min_size=2, max_size=2), st.sampled_from([8, 256]))
def test_more_slots_never_predict_fewer_tokens(case: tuple, shares: list[float], depth: int) -> None:
    selector, noise, staging = case
    speeds = []
    for share in sorted(shares):
        # Misses fall with the slots, from all that is asked for to none.
        demands = wanted(selector, missed=0.1 * (1 - share), slots=share)
        tuning = Tuning(reads_in_flight=depth, look_ahead="off")
        speeds.append(predict(machine(noise=noise), demands, tuning, staging).tokens_per_s)
    assert speeds[0] <= speeds[1] * (1 + 1e-9)


@given(
    st.lists(st.tuples(*[st.floats(0, 5)] * 4), min_size=1, max_size=5),
    st.integers(1, 6),
    st.booleans(),
    st.floats(0, 3),
)
def test_a_ring_is_between_its_sum_and_its_longest(rows: list, staging: int, restart: bool, more: float) -> None:
    took = ring_s(rows, staging, restart)
    compute = sum(before + blocks * work for before, blocks, _, work in rows)
    reads = sum(blocks * read for _, blocks, read, _ in rows)
    assert max(compute, reads) * (1 - 1e-9) <= took <= (compute + reads) * (1 + 1e-9) + 1e-12
    assert ring_s(rows, staging + 1, restart) <= took * (1 + 1e-9)
    assert ring_s([(b, n, r + more, w) for b, n, r, w in rows], staging, restart) >= took * (1 - 1e-9)


def test_noise_in_a_probe_makes_nothing_cheaper_than_less_of_it() -> None:
    zigzag = [
        1.0 if depth in (1, 64) else 0.2 if depth == 4 else 8.0 for _ in SIZES for depth in DEPTHS for _ in (0, 1)
    ]
    disk, tuning = machine(noise=np.array(zigzag)), Tuning(look_ahead="off")
    reads = [predict(disk, wanted(missed=missed), tuning, 6).reads_s for missed in np.linspace(0, 0.1, 60)]
    assert reads == sorted(reads) and reads[-1] > 0
    streamed = [predict(disk, wanted("all"), tuning, staging).total_s for staging in range(1, 20)]
    assert streamed == sorted(streamed, reverse=True)


# What a model asks for


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost-model")
    return mlx_flash.convert(make_tiny("openelm-relu", folder), folder / "flash")


@pytest.fixture(scope="module")
def calibrated(flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    return calibrate_by_hand(mlx_flash.convert(flash.parent / "openelm-relu", folder / "flash"))


def use(monkeypatch: pytest.MonkeyPatch, load_machine: Any) -> None:
    monkeypatch.setattr(sys.modules["mlx_flash.runtime.loading"], "load_machine", load_machine)


def config(**fields: Any) -> FlashConfig:
    return FlashConfig(**{"backend": "numpy", **fields})


def test_demand_counts_every_matrix(flash: Path) -> None:
    plan = decide(flash, config(select="all"))
    shapes = plan.spec.resident_shapes()
    matrices = sum(4 * int(np.prod(shape)) for shape in shapes.values() if len(shape) == 2)
    found = plan.demand
    assert sum(layer.dense_bytes for layer in found.layers) + found.head_bytes == matrices  # tied: the head is one
    assert found.first_part_bytes + found.other_parts_bytes == plan.checkpoint.layouts[0].bundle_bytes
    assert [layer.missed for layer in found.layers] == [0.0] * 3 and found.assumption == ""
    assert found.kv_bytes == plan.spec.kv_items_per_token * 4


def test_demand_follows_the_curves_and_says_where_it_guesses(flash: Path, calibrated: Path) -> None:
    plan = decide(calibrated, config(select="predictor"))
    layouts, spec, known = plan.checkpoint.layouts, plan.spec, plan.calibration

    def of(name: str, fraction: float | None, share: float, found: Any = known) -> Demand:
        slots = [int(share * layout.count) for layout in layouts]
        return token_demand(spec, "float32", layouts, Selection(name, fraction), found, slots, 256)

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
    plan = decide(flash, config(select="all"))
    odd = replace(plan.spec, layers=(LayerSpec(6, 2, 7), *plan.spec.layers[1:]))
    found = token_demand(odd, "float32", plan.checkpoint.layouts, Selection("all"), None, [0, 0, 0], 8)
    assert found.layers[0].dense_bytes == 4 * odd.head_dim * odd.dim * (6 + 2 + 2 + 6)


# The plan


def test_without_a_probe_all_is_as_it_was(flash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_run(flash, config(select="gate"))
    assert plan.tuning == Tuning() and plan.prediction is None and plan.machine is None
    assert plan.memory.staging_blocks == 6 and plan.tuning.reader_options == {"direct": True, "merging": Merging()}
    report = inspect_model(flash, config())
    assert report["machine"] == {"measured": False, "problem": None} and report["prediction"] is None
    assert {entry["why"] for entry in report["tuning"].values()} == {"default"}
    print_inspection(report)
    assert "mlx_flash bench --probe" in capsys.readouterr().out


def test_a_measured_plan_is_chosen_predicted_and_shown(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, lambda path: machine())
    for select in ("all", "gate", "predictor", "prompt:0.5", "prompt:auto", "threshold:0.5", "static:0.5"):
        plan = plan_run(calibrated, config(select=select))
        assert all(why.startswith("measured: ") for why in plan.tuning.why.values()) and len(plan.tuning.why) == 5
        assert plan.memory.staging_blocks <= plan.tuning.staging_blocks
        report = inspect_model(calibrated, config(select=select))
        found = report["prediction"]
        parts = ("waited_s", "dense_s", "sparse_s", "selection_s", "other_s")
        assert found["total_s"] == pytest.approx(sum(found[name] for name in parts))
        assert found["tokens_per_s"] == pytest.approx(1 / found["total_s"]) and found["prompt_tokens_per_s"] > 0
        assert report["machine"]["measured"] and report["machine"]["device"] == "disk"
        print_inspection(report)
        out = capsys.readouterr().out
        assert f"predicted for {report['selector']}: {found['tokens_per_s']:.3g} tokens/s" in out
        assert "(measured: " in out and "bench --probe" not in out
    given = inspect_model(calibrated, config(direct="off", merge_gap=512))["tuning"]
    assert given["direct"] == {"value": False, "why": "given"} and given["merge_gap"]["value"] == 512
    tiny = inspect_model(calibrated, config(memory=1000))
    assert not tiny["fits"] and tiny["prediction"] is None and tiny["tuning"]["merge_gap"]["why"].startswith("meas")


def test_a_measured_plan_needs_no_more_memory(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for select in ("all", "gate", "predictor"):
        before = decide(calibrated, config(select=select)).costs
        use(monkeypatch, lambda path: machine(read_s=1e-3))
        after = decide(calibrated, config(select=select)).costs
        use(monkeypatch, lambda path: None)
        assert after.smallest <= before.smallest


def test_a_damaged_probe_stops_nobody(
    flash: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(path: Path) -> Machine:
        raise FormatError(f"{path}: the probe's file is not JSON")

    use(monkeypatch, damaged)
    model, _ = mlx_flash.load(flash, config())
    model.flash.close()
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "not JSON" in shown.err
    assert model.flash.plan.tuning == Tuning()
    report = inspect_model(flash, config())
    assert not report["machine"]["measured"] and "not JSON" in report["machine"]["problem"]
    print_inspection(report)
    assert "not JSON" in capsys.readouterr().out


def test_no_setting_changes_a_bit(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(**fields: Any) -> bytes:
        model, _ = mlx_flash.load(calibrated, config(max_context=32, prefill_chunk=8, **fields))
        seen = b"".join(step.tobytes() for step in model.flash.forced(model, list(range(11)), [5, 6, 7, 8]))
        model.flash.close()
        return seen

    chosen = {"merge_gap": "64KiB", "reads_in_flight": 1, "staging_blocks": 2, "slots": 0.3}
    for select in ("all", "gate", "predictor"):
        whole = logits(select=select, look_ahead="off")
        for direct in ("on", "off"):
            assert logits(select=select, direct=direct, look_ahead="off", **chosen) == whole
        use(monkeypatch, lambda path: machine(read_s=1e-4))
        assert logits(select=select, slots=0.5) == whole
        use(monkeypatch, lambda path: None)


def test_settings_reach_the_reader_and_staging(calibrated: Path) -> None:
    fields = {"select": "gate", "merge_gap": 1024, "direct": "off", "reads_in_flight": 3, "staging_blocks": 2}
    model, _ = mlx_flash.load(calibrated, config(**fields))
    shared = model.flash.shared
    assert (shared.reader.merging.gap, shared.reader.direct, shared.reader.threads) == (1024, False, 3)
    assert len(shared.stream.slabs) == 2
    model.flash.close()
    least = inspect_model(calibrated, config(**fields, slots=0))["smallest_budget_bytes"]
    assert plan_run(calibrated, config(**fields, memory=least)).memory.staging_blocks == 2, "also where it is tight"
    whole, _ = mlx_flash.load(calibrated, config(select="all"))
    assert not whole.flash.shared.stream.slabs, "nothing streams, nothing is kept for it"
    whole.flash.close()


def test_slots_by_share_fit_or_are_refused_with_the_numbers(calibrated: Path) -> None:
    counts = [layout.count for layout in decide(calibrated, config()).checkpoint.layouts]
    half = plan_run(calibrated, config(select="gate", slots=0.5))
    assert list(half.memory.capacities) == [count // 2 for count in counts]
    assert not sum(plan_run(calibrated, config(select="gate", slots=0)).memory.capacities)
    low = inspect_model(calibrated, config(select="gate"))["smallest_budget_bytes"]
    with pytest.raises(BudgetError, match=r"slots .* or a smaller --slots"):
        plan_run(calibrated, config(select="gate", slots=0.5, memory=low))
    enough = inspect_model(calibrated, config(select="gate", slots=0.5))["smallest_budget_bytes"]
    assert plan_run(calibrated, config(select="gate", slots=0.5, memory=enough)).memory.staging_blocks == 1
