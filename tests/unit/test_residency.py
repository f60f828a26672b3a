"""The residency's integers: a bijection, a filled prefix, least recently used first, nothing asked for is evicted."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.residency.policy import least_recently_used
from mlx_flash.residency.residency import Residency

COUNT = 12
steps = st.lists(st.sets(st.integers(0, COUNT - 1)), max_size=20)


def as_ids(ids: set[int]) -> np.ndarray:
    return np.array(sorted(ids), np.int64)


def run(residency: Residency, ids: set[int]):
    plan = residency.plan(as_ids(ids))
    residency.evict(plan)
    residency.commit(plan)
    return plan


def check_consistent(residency: Residency) -> None:
    used = residency.id_of[: residency.num_used]
    assert (used >= 0).all(), "slots below num_used are filled"
    assert (residency.id_of[residency.num_used :] == -1).all()
    assert len(set(used.tolist())) == len(used)
    for slot, bundle in enumerate(used):
        assert residency.slot_of[bundle] == slot
    assert (residency.slot_of >= 0).sum() == residency.num_used


@given(steps, st.integers(0, COUNT + 3))
def test_it_follows_a_plain_lru(calls: list[set[int]], capacity: int) -> None:
    residency, model = Residency(COUNT, capacity), OrderedDict[int, None]()
    capacity = min(capacity, COUNT)
    for ids in calls:
        plan = run(residency, ids)
        assert {int(i) for i in plan.ids[plan.hits]} == ids & set(model)
        missing = [i for i in sorted(ids) if i not in model]
        for bundle in ids & set(model):
            model.move_to_end(bundle)
        for bundle in missing:
            if len(model) == capacity:
                victim = next((b for b in model if b not in ids), None)
                if victim is None:
                    break
                del model[victim]
            model[bundle] = None
        # Ids used in one call are equally old: the victims among them may differ, their number may not.
        assert residency.num_used == len(model)
        assert ids & set(model) <= set(np.flatnonzero(residency.slot_of >= 0).tolist())
        model = OrderedDict.fromkeys(
            sorted(
                np.flatnonzero(residency.slot_of >= 0).tolist(),
                key=lambda b: (residency.last_used[residency.slot_of[b]], residency.slot_of[b]),
            )
        )
        check_consistent(residency)


@given(steps, st.integers(0, COUNT))
def test_plan_is_pure_and_complete(calls: list[set[int]], capacity: int) -> None:
    residency = Residency(COUNT, capacity)
    for ids in calls:
        before = [a.copy() for a in (residency.slot_of, residency.id_of, residency.last_used)]
        plan = residency.plan(as_ids(ids))
        after = (residency.slot_of, residency.id_of, residency.last_used)
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
        positions = np.concatenate([plan.hits, plan.loads, plan.overflow])
        assert sorted(positions.tolist()) == list(range(len(ids)))
        assert len(plan.overflow) == max(0, len(ids) - capacity)
        assert (plan.slots[plan.overflow] == -1).all()
        taken = plan.slots[plan.slots >= 0]
        assert len(set(taken.tolist())) == len(taken) and (taken < capacity).all()
        run(residency, ids)


def test_what_a_call_asks_for_stays() -> None:
    residency = Residency(10, 3)
    run(residency, {0, 1, 2})
    plan = run(residency, {0, 5})
    assert residency.slot_of[0] >= 0 and residency.slot_of[5] >= 0
    assert len(plan.hits) == 1 and len(plan.loads) == 1
    run(residency, {7})  # 1 or 2 is the oldest by now, 0 and 5 are not
    assert residency.slot_of[0] >= 0 and residency.slot_of[5] >= 0 and residency.slot_of[7] >= 0


def test_evicted_slots_hold_nothing_until_commit() -> None:
    residency = Residency(4, 2)
    run(residency, {0, 1})
    plan = residency.plan(np.array([2, 3]))
    residency.evict(plan)
    assert (residency.slot_of == -1).all()
    residency.commit(plan)
    assert (residency.slot_of[[2, 3]] >= 0).all() and (residency.slot_of[[0, 1]] == -1).all()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.data())
def test_victims_are_the_oldest(ages: list[int], data: st.DataObject) -> None:
    protected = np.array(data.draw(st.lists(st.booleans(), min_size=len(ages), max_size=len(ages))))
    count = data.draw(st.integers(0, len(ages)))
    victims = least_recently_used(np.array(ages), protected, count)
    assert len(victims) == min(count, int((~protected).sum())) and not protected[victims].any()
    kept = [a for s, a in enumerate(ages) if not protected[s] and s not in victims]
    assert not len(victims) or not kept or max(np.array(ages)[victims]) <= min(kept)
