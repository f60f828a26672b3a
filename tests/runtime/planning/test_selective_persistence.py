"""The budget's arithmetic: nothing over the budget, no slot wasted, errors with the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.config import FlashConfig, format_bytes, parse_bytes
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.runtime.planning import selective_persistence as budget
from mlx_flash.runtime.planning.selective_persistence import NeuronCosts, auto_budget, split_budget, split_slots

layer_counts = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(lambda n: [256 * i for i in n])


@given(layer_counts, st.integers(0, 100_000), st.sampled_from([1, 256]))
def test_slots_are_split_in_proportion_and_none_is_wasted(counts: list[int], total: int, unit: int) -> None:
    slots = split_slots(total, counts, unit)
    assert sum(slots) <= max(total, 0)
    assert all(0 <= s <= c and s % unit == 0 for s, c in zip(slots, counts, strict=True))
    if total >= sum(counts):
        assert list(slots) == counts
    else:
        assert total - sum(slots) < unit, "what is left is less than a unit"
        for share, count in zip(slots, counts, strict=True):
            assert abs(share - total * count / sum(counts)) <= unit


@given(layer_counts, st.integers(0, 10**9))
def test_a_plan_stays_within_its_budget(counts: list[int], extra: int) -> None:
    costs = NeuronCosts("m", {"dense part": 10**6, "KV cache": 10**5}, 256 * 1536, 1536, tuple(counts), 256)
    plan = split_budget(costs, costs.smallest + extra)
    assert plan.total_bytes <= plan.budget_bytes
    assert plan.staging_blocks >= 1
    if extra >= costs.largest - costs.smallest:
        assert list(plan.capacities) == counts


def test_the_smallest_budget_is_legal_and_a_byte_less_is_not() -> None:
    costs = NeuronCosts("tiny", {"dense part": 1000, "KV cache": 20}, 512, 2, (256, 512), 256)
    plan = split_budget(costs, costs.smallest)
    assert plan.capacities == (0, 0) and plan.staging_blocks == 1
    with pytest.raises(
        BudgetError, match=r"tiny needs at least 1\.53 kB \(dense part 1\.00 kB, KV cache 20 B, staging"
    ):
        split_budget(costs, costs.smallest - 1)


def test_auto_is_the_least_of_its_three(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = NeuronCosts("m", {"dense part": 1000}, 512, 2, (256,), 256)
    monkeypatch.setattr(budget, "cgroup_limit", lambda: None)
    assert auto_budget(costs) == costs.largest
    monkeypatch.setattr(budget, "cgroup_limit", lambda: 3000)
    assert auto_budget(costs) == 1500


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/", {"memory.max": "max"}, None),
        ("0::/a/b", {"a/memory.max": "500", "a/b/memory.max": "max"}, 500),
        ("0::/a/b", {"a/memory.max": "500", "a/b/memory.max": "400"}, 400),
        ("5:memory:/docker/abc", {"memory/memory.limit_in_bytes": "700"}, 700),
        ("5:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": str(1 << 62)}, None),
        ("5:cpu:/x", {"memory/x/memory.limit_in_bytes": "1"}, None),
    ],
)
def test_cgroup_limits_are_read(tmp_path: Path, line: str, files: dict[str, str], limit: int | None) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert budget.cgroup_limit(tmp_path) == limit


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), (" 800 MB ", 8 * 10**8), ("7", 7), (".5kb", 500), ("12mib", 12 << 20)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "1,5GB", "nan", "2GB extra"])
def test_unreadable_sizes_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="cannot read the size"):
        parse_bytes(text)


@given(st.integers(0, 10**13))
def test_format_keeps_three_digits(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006, abs=1)


def test_sizes_beyond_any_machine_are_refused() -> None:
    with pytest.raises(BudgetError, match="more than any machine"):
        parse_bytes("9" * 400 + "GB")


@pytest.mark.parametrize(
    "fields",
    [{"select": "some"}, {"max_context": 0}, {"prefill_chunk": 0}, {"max_context": "4"}, {"max_context": True}]
    + [{"memory": None}, {"memory": 1.5}, {"memory": True}],
)
def test_config_is_validated(fields: dict) -> None:
    with pytest.raises(UsageError):
        FlashConfig(**fields)


def test_staging_that_is_not_needed_takes_nothing() -> None:
    costs = NeuronCosts("m", {"dense part": 1000}, 512, 2, (512, 512), 256, resident_staging=0)
    assert costs.largest == 1000 + 2 * 1024
    plan = split_budget(costs, costs.largest)
    assert plan.capacities == (512, 512) and plan.staging_blocks == 0 and plan.total_bytes == costs.largest
    assert split_budget(costs, costs.largest - 1).staging_blocks == 1
    tiny = NeuronCosts("m", {"dense part": 1000}, 512, 2, (20,), 256, resident_staging=0)
    assert tiny.largest == tiny.smallest == 1512, "a block of staging is more than all bundles"
    assert split_budget(tiny, 1512).capacities == (20,)


def test_staging_blocks_that_are_asked_for_are_there() -> None:
    costs = NeuronCosts("m", {"dense part": 1000}, 512, 2, (512, 512), 1, staging_blocks=3, least_staging=3)
    assert costs.smallest == 1000 + 3 * 512 and split_budget(costs, costs.smallest).staging_blocks == 3
    with pytest.raises(BudgetError, match=r"staging 1\.54 kB"):
        split_budget(costs, costs.smallest - 1)
    few = NeuronCosts("m", {"dense part": 1000}, 512, 2, (512, 512), 1, staging_blocks=2)
    assert split_budget(few, 10**6).staging_blocks == 2


@given(layer_counts, st.floats(0, 1), st.integers(0, 10**8), st.sampled_from([1, 256]), st.sampled_from([None, 0]))
def test_a_share_of_the_slots_is_kept_or_refused(
    counts: list[int], share: float, extra: int, unit: int, resident_staging: int | None
) -> None:
    costs = NeuronCosts(
        "m", {"dense part": 9}, 10**6, 1536, tuple(counts), unit, share=share, resident_staging=resident_staging
    )
    plan = split_budget(costs, costs.smallest + extra)
    for slots, count in zip(plan.capacities, counts, strict=True):
        assert slots % unit == 0 and share * count - unit < slots <= share * count
    assert plan.total_bytes <= plan.budget_bytes and plan.staging_blocks <= costs.staging_blocks
    assert plan.staging_blocks >= 1 or plan.capacities == costs.counts
    assert costs.smallest <= costs.largest
    if sum(plan.capacities):
        with pytest.raises(BudgetError, match="slots .* or a smaller --slots"):
            split_budget(costs, costs.smallest - 1)


@pytest.mark.parametrize(
    "fields",
    [{"merge_gap": -1}, {"merge_gap": "2MiB"}, {"merge_gap": True}, {"merge_gap": "wide"}, {"merge_gap": None}]
    + [{"reads_in_flight": 0}, {"reads_in_flight": "8"}, {"reads_in_flight": True}, {"reads_in_flight": 10**6}]
    + [{"direct": "maybe"}, {"direct": True}, {"staging_blocks": 0}, {"staging_blocks": 1.0}]
    + [{"slots": -0.1}, {"slots": 1.01}, {"slots": float("nan")}, {"slots": True}, {"slots": "half"}, {"slots": None}],
)
def test_settings_of_the_reads_are_validated(fields: dict) -> None:
    with pytest.raises(UsageError, match="|".join([*fields, "cannot read the size"])):
        FlashConfig(**fields)


def test_settings_of_the_reads_are_taken() -> None:
    assert FlashConfig(merge_gap="16KiB").merge_gap == 16384 and FlashConfig(merge_gap=0).merge_gap == 0
    assert FlashConfig(slots=1, reads_in_flight=4096, staging_blocks=1, direct="off").slots == 1


def test_slots_of_several_sizes_stay_within_the_budget() -> None:
    """Layers of other bit widths: a slot costs what it takes in its layer."""
    sizes, counts = (300, 500, 300), (10, 20, 40)
    costs = NeuronCosts("m", {"dense part": 1000}, 100, 500, counts, unit=4, layer_slots=sizes)
    everything = 300 * 10 + 500 * 20 + 300 * 40
    assert costs.slots_bytes(counts) == everything
    assert costs.largest == 1000 + 6 * 100 + everything and costs.smallest == 1100
    assert split_budget(costs, costs.largest).parts["slots"] == everything
    for given_bytes in range(costs.smallest, costs.largest, 377):
        plan = split_budget(costs, given_bytes)
        assert plan.total_bytes <= given_bytes and plan.capacities != counts
        assert plan.parts["slots"] == sum(size * n for size, n in zip(sizes, plan.capacities, strict=True))
    half = replace(costs, share=0.5)
    assert half.shared_slots == (4, 8, 20) and half.smallest == 1100 + 300 * 4 + 500 * 8 + 300 * 20
    assert split_budget(half, half.smallest).capacities == (4, 8, 20)
