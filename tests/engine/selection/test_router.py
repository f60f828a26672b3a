"""The router's step with plain arrays: every chosen expert is served once, from rows that hold its bytes while they are
being used; and the plan of a budget in experts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.engine.residency.expert_staging import ExpertStaging
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.staging import BlockStream
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.bundle import Layout, Part
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.storage.readers import FaultyReader, MemoryReader
from mlx_flash.errors import BudgetError, ReadError
from mlx_flash.models.specs.mixtures import is_mixture
from mlx_flash.runtime.planning.expert_budget import STAGING_BYTES, ExpertCosts
from mlx_flash.stats import Stats

COUNT = 12
LAYOUT = Layout((Part("x", "uint8", 8),), COUNT)
BUNDLES = np.zeros((COUNT, LAYOUT.stride), np.uint8)
BUNDLES[:, :8] = np.arange(1, COUNT + 1)[:, None]


class Recording(MemoryReader):
    """Notes what is read; a write over rows that a group still uses is an error."""

    def __init__(self):
        super().__init__([(LAYOUT, BUNDLES)])
        self.read: list[int] = []
        self.in_use: list[tuple[object, set[int]]] = []

    def submit(self, layer, ids, rows, targets):
        self.read += ids.tolist()
        memory = targets[0].rows
        for used, which in self.in_use:
            assert used is not memory or not which & set(rows.tolist()), "a row was overwritten while it was in use"
        return super().submit(layer, ids, rows, targets)


def make(capacity, staging, reader=None):
    reader = reader or Recording()
    shared = SharedContext(None, reader, BlockStream([]), Stats())

    def slab(rows):
        return SimpleNamespace(targets=(Target(0, np.zeros((rows, 8), np.uint8)),)) if rows else None

    ring = ExpertStaging(slab(staging), staging) if staging else None
    return RouterSelector(0, shared, Residency(COUNT, capacity), slab(capacity), ring), reader


def serve(selector, reader, chosen, lazily=True, x=None):
    """Run a call as a lazy backend does: rows count as used until the group is settled. Returns the ids served."""
    served = []
    reader = getattr(reader, "inner", reader)
    for group in selector.groups(chosen, len(chosen) == 1, x):
        memory = group.slab.targets[0].rows
        np.testing.assert_array_equal(memory[group.rows, 0], group.ids + 1)
        served += group.ids.tolist()
        if lazily:
            entry = (memory, set(group.rows.tolist()))
            reader.in_use.append(entry)

            def settle(entry=entry, group=group):
                if any(each is entry for each in reader.in_use):
                    np.testing.assert_array_equal(entry[0][group.rows, 0], group.ids + 1)
                    reader.in_use = [each for each in reader.in_use if each is not entry]

            group.settle = settle
    return served


calls = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99)), min_size=1, max_size=12)


@given(calls=calls, capacity=st.integers(0, COUNT), staging=st.integers(1, 6))
def test_every_chosen_expert_is_served_once_and_read_at_most_once(calls, capacity, staging):
    selector, reader = make(capacity, 0 if capacity == COUNT else staging)
    for tokens, top_k, seed in calls:
        rng = np.random.default_rng(seed)
        chosen = np.stack([rng.permutation(COUNT)[:top_k] for _ in range(tokens)])
        wanted = np.unique(chosen).tolist()
        held = set(np.flatnonzero(selector.residency.slot_of >= 0).tolist())
        reader.read = []
        served = serve(selector, reader, chosen)
        assert sorted(served) == wanted
        assert sorted(reader.read) == sorted(set(wanted) - held)  # once, whatever the capacity
        if set(wanted) <= held:
            assert len(served) == len(wanted) and not reader.read
        slots = selector.residency.slot_of
        memory = selector.slab.targets[0].rows if capacity else None
        for expert in np.flatnonzero(slots >= 0):
            assert memory[slots[expert], 0] == expert + 1
    if capacity == COUNT and len(held | set(wanted)) == COUNT:
        assert selector.complete


def test_what_a_prompt_uses_most_stays():
    selector, reader = make(4, 2)
    chosen = np.array([[0, 1], [0, 2], [0, 3], [4, 1], [5, 0], [6, 1], [7, 0], [8, 1]])
    serve(selector, reader, chosen)
    assert {0, 1} <= set(np.flatnonzero(selector.residency.slot_of >= 0).tolist())
    reader.read = []
    serve(selector, reader, np.array([[0, 1]]))
    assert not reader.read and selector.shared.stats.hits == 2 and selector.shared.stats.misses == 0
    serve(selector, reader, np.array([[10, 1]]))
    assert reader.read == [10] and (selector.shared.stats.hits, selector.shared.stats.misses) == (3, 1)


def test_a_failed_read_forgets_the_slots_and_the_next_call_is_right():
    for fail_at in range(1, 6):
        selector, reader = make(5, 2, FaultyReader(Recording(), fail_at))
        chosen = np.arange(9).reshape(3, 3)
        try:
            serve(selector, reader, chosen, lazily=False)
        except ReadError:
            assert selector.shared.unfinished is selector
            assert sorted(serve(selector, reader, chosen, lazily=False)) == list(range(9))
            assert selector.shared.unfinished is None
        else:
            break
    assert fail_at > 3


def test_without_room_there_must_be_staging():
    with pytest.raises(ValueError, match="no staging"):
        make(3, 0)


COSTS = ExpertCosts("tiny", {"dense part": 1000}, (100, 100, 50), (8, 8, 8), (2, 2, 3), (0, 0, 1))


def test_the_smallest_budget_is_the_top_experts_of_a_layer():
    assert COSTS.smallest == 1000 + 2 * 100 + 3 * 50  # layers of two kinds cannot share staging
    plan = COSTS.split(COSTS.smallest)
    assert plan.capacities == (0, 0, 0) and plan.total_bytes == COSTS.smallest
    with pytest.raises(BudgetError, match=r"tiny needs at least 1.35 kB \(dense part 1.00 kB.*the top 3 experts"):
        COSTS.split(COSTS.smallest - 1)
    whole = COSTS.split(COSTS.largest)
    assert whole.capacities == (8, 8, 8) and whole.parts["staging"] == 0 and COSTS.largest == 1000 + 8 * 250


@given(budget=st.integers(COSTS.smallest, COSTS.largest + 100))
def test_a_plan_fits_its_budget_and_gives_every_layer_its_share(budget):
    plan = COSTS.split(budget)
    assert plan.total_bytes <= budget and max(plan.capacities) - min(plan.capacities) <= 1
    rows = COSTS.staging_rows(plan.staging_blocks)
    assert not rows or (rows[0] >= 2 and rows[1] >= 3)
    assert plan.parts["slots"] == sum(c * s for c, s in zip(plan.capacities, COSTS.slots, strict=True))
    if budget < COSTS.largest:  # less is left over than staging may take and one more expert
        assert budget - plan.total_bytes < 100


def test_a_given_share_and_more_staging_for_small_experts():
    some = ExpertCosts("tiny", {}, (1 << 20,) * 2, (64, 64), (4, 4), (0, 0), share=0.5)
    plan = some.split(200 << 20)
    assert plan.capacities == (32, 32) and plan.parts["staging"] == STAGING_BYTES
    assert (
        ExpertCosts("tiny", {}, (1 << 20,) * 2, (64, 64), (4, 4), (0, 0), share=1.0).split(1 << 30).staging_blocks == 0
    )
    with pytest.raises(BudgetError, match="--slots"):
        some.split(64 << 20)


def test_which_configs_are_mixtures():
    assert is_mixture({"model_type": "mixtral", "num_local_experts": 8})
    assert is_mixture({"model_type": "llama4", "text_config": {"num_local_experts": 16}})
    assert is_mixture({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}})
    assert is_mixture({"model_type": "hunyuan", "num_experts": [1, 16]})
    for config in (
        {"model_type": "qwen3", "num_experts": 8},  # a family that is converted
        {"model_type": "qwen3_5", "num_experts": 0, "text_config": None},
        {"model_type": "hunyuan", "num_experts": 1},
        {"model_type": "gemma", "num_experts": True},
        {},
    ):
        assert not is_mixture(config)
