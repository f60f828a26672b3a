"""The settings of the reads that are chosen for made-up machines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.apps.options import run_config
from mlx_flash.cli import make_parser
from mlx_flash.config import FlashConfig
from mlx_flash.errors import UsageError
from mlx_flash.runtime.planning.cost_model import PIECE, predict
from mlx_flash.runtime.planning.tuning import Tuning, default_tuning, given_settings
from mlx_flash.runtime.planning.tuning_choice import STAGING, choose_tuning
from tests.runtime.machines import DEPTHS, NOISE, SIZES, machine, wanted


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
