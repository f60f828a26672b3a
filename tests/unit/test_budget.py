"""The budget's arithmetic: nothing over the budget, no slot wasted, errors with the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.config import FlashConfig, format_bytes, parse_bytes
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.residency import budget
from mlx_flash.residency.budget import Costs, auto_budget, split_budget, split_slots

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
    costs = Costs("m", {"dense part": 10**6, "KV cache": 10**5}, 256 * 1536, 1536, tuple(counts), 256)
    plan = split_budget(costs, costs.smallest + extra)
    assert plan.total_bytes <= plan.budget_bytes
    assert plan.staging_blocks >= 1
    if extra >= costs.largest - costs.smallest:
        assert list(plan.capacities) == counts


def test_the_smallest_budget_is_legal_and_a_byte_less_is_not() -> None:
    costs = Costs("tiny", {"dense part": 1000, "KV cache": 20}, 512, 2, (256, 512), 256)
    plan = split_budget(costs, costs.smallest)
    assert plan.capacities == (0, 0) and plan.staging_blocks == 1
    with pytest.raises(
        BudgetError, match=r"tiny needs at least 1\.53 kB \(dense part 1\.00 kB, KV cache 20 B, staging"
    ):
        split_budget(costs, costs.smallest - 1)


def test_auto_is_the_least_of_its_three(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs("m", {"dense part": 1000}, 512, 2, (256,), 256)
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
