"""How long tokens are predicted to take on made-up machines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.runtime.planning.cost_model import COLD, predict, ring_s
from mlx_flash.runtime.planning.tuning import Tuning
from tests.runtime.machines import DEPTHS, NOISE, SIZES, machine, wanted


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
