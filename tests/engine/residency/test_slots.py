"""The residency's integers: a bijection, a filled prefix, nothing asked for is evicted, whatever the policy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.residency.window import DEFAULT, LFU, LRU, Policy

COUNT = 12
RATES = np.linspace(0.9, 0.1, COUNT).astype(np.float32)
asks = st.sets(st.integers(0, COUNT - 1))
steps = st.lists(asks, max_size=20)
policies = st.one_of(
    st.sampled_from([DEFAULT, LRU, LFU]),
    st.builds(Policy, st.sampled_from([0.0, 0.5, 0.98, 1.0]), st.floats(0, 50), st.integers(0, 4), st.floats(0, 1)),
)


def as_ids(ids: set[int]) -> np.ndarray:
    return np.array(sorted(ids), np.int64)


def run(residency: Residency, ids: set[int], used: np.ndarray | None = None) -> SlotPlan:
    plan = residency.plan(as_ids(ids))
    residency.evict(plan)
    residency.commit(plan, used)
    return plan


def resident(residency: Residency) -> set[int]:
    return set(np.flatnonzero(residency.slot_of >= 0).tolist())


def check_consistent(residency: Residency) -> None:
    used = residency.id_of[: residency.num_used]
    assert (used >= 0).all(), "slots below num_used are filled"
    assert (residency.id_of[residency.num_used :] == -1).all()
    assert len(set(used.tolist())) == len(used)
    for slot, bundle in enumerate(used):
        assert residency.slot_of[bundle] == slot
    assert (residency.slot_of >= 0).sum() == residency.num_used


class Disk:
    """Rows as the engine has them: what a slot's memory holds, read for loads, copied from a prompt's blocks."""

    def __init__(self, capacity: int):
        self.rows = np.full(capacity, -1)

    def fill(self, plan: SlotPlan) -> None:
        self.rows[plan.slots[plan.loads]] = plan.ids[plan.loads]

    def check(self, residency: Residency, plan: SlotPlan) -> None:
        held = plan.slots >= 0
        assert (self.rows[plan.slots[held]] == plan.ids[held]).all(), "a slot holds another bundle than it should"


actions = st.lists(st.tuples(st.sampled_from(["ask", "ask", "ask", "fail", "prompt"]), asks, asks), max_size=20)


@given(actions, st.integers(0, COUNT + 3), policies, st.booleans())
def test_never_a_wrong_slot(
    calls: list[tuple[str, set[int], set[int]]], capacity: int, policy: Policy, rated: bool
) -> None:
    residency = Residency(COUNT, capacity, policy, RATES if rated else None)
    disk = Disk(residency.capacity)
    for what, ids, fired in calls:
        if what == "prompt":
            used = np.array([[b in ids for b in range(COUNT)], [b in fired for b in range(COUNT)]])
            residency.begin_prompt(2)
            for block in (np.arange(0, 5), np.arange(5, COUNT)):
                plan = residency.warm(block, used[:, block])
                residency.evict(plan)
                disk.fill(plan)
                residency.place(plan)
                assert not len(plan.overflow)
                check_consistent(residency)
            assert residency.num_used == residency.capacity, "a prompt fills all slots"
            continue
        plan = residency.plan(as_ids(ids))
        residency.evict(plan)
        if what == "fail":
            disk.rows[plan.slots[plan.loads]] = -2  # unknown bytes
            residency.reset()
        else:
            disk.fill(plan)
            residency.commit(plan, np.flatnonzero(np.isin(plan.ids, as_ids(fired))))
            disk.check(residency, plan)
        check_consistent(residency)


@given(steps, st.integers(0, COUNT), policies)
def test_plan_is_pure_and_complete(calls: list[set[int]], capacity: int, policy: Policy) -> None:
    residency = Residency(COUNT, capacity, policy, RATES)
    for ids in calls:
        before = copy.deepcopy(residency.__dict__ | residency.history.__dict__)
        plan = residency.plan(as_ids(ids))
        for name, value in (residency.__dict__ | residency.history.__dict__).items():
            if name != "history":
                assert np.array_equal(value, before[name]), name
        positions = np.concatenate([plan.hits, plan.loads, plan.overflow])
        assert sorted(positions.tolist()) == list(range(len(ids)))
        assert len(plan.overflow) == max(0, len(ids) - capacity)
        assert (plan.slots[plan.overflow] == -1).all()
        taken = plan.slots[plan.slots >= 0]
        assert len(set(taken.tolist())) == len(taken) and (taken < capacity).all()
        was = resident(residency)
        run(residency, ids)
        now = resident(residency)
        assert ids & was <= now, "a call evicted its own ids"
        assert len(now & ids) == min(len(ids), capacity) and len(now) == min(capacity, len(was | ids))


@given(steps, st.integers(1, COUNT), policies)
def test_the_same_calls_give_the_same_slots(calls: list[set[int]], capacity: int, policy: Policy) -> None:
    one, two = (Residency(COUNT, capacity, policy, RATES) for _ in range(2))
    for ids in calls:
        assert (run(one, ids).slots == run(two, ids).slots).all()
    one.reset()
    fresh = Residency(COUNT, capacity, policy, RATES)
    for ids in calls:
        assert (run(one, ids).slots == run(fresh, ids).slots).all(), "a reset one is as good as new"


@given(steps, st.integers(0, COUNT + 3))
def test_lru_follows_a_plain_one(calls: list[set[int]], capacity: int) -> None:
    residency, last = Residency(COUNT, capacity, LRU), dict[int, int]()
    for token, ids in enumerate(calls):
        was = resident(residency)
        run(residency, ids)
        gone = was - resident(residency)
        oldest = sorted(last[b] for b in was - ids)
        # Ids used in one call are equally old: the victims among them may differ, their ages may not.
        assert sorted(last[b] for b in gone) == oldest[: len(gone)]
        last |= dict.fromkeys(ids, token)


@given(steps, st.integers(1, COUNT), st.integers(1, 4))
def test_the_window_stays_as_far_as_capacity_allows(calls: list[set[int]], capacity: int, window: int) -> None:
    residency = Residency(COUNT, capacity, Policy(window=window))
    for token, ids in enumerate(calls):
        was = resident(residency)
        recent = set[int]().union(*calls[max(0, token - window) : token])
        run(residency, ids)
        gone = was - resident(residency)
        assert not gone & recent or not (resident(residency) - ids - recent), "one within the window went before others"


@given(steps, st.integers(1, COUNT), st.floats(0, 1))
def test_pinned_bundles_stay_while_others_can_go(calls: list[set[int]], capacity: int, share: float) -> None:
    residency = Residency(COUNT, capacity, Policy(pinned=share, window=2), RATES)
    pins = set(range(int(share * capacity)))  # RATES fall with the id
    for ids in calls:
        was = resident(residency)
        run(residency, ids)
        gone = was - resident(residency)
        assert not gone & pins or not (resident(residency) - ids - pins)


def test_hot_bundles_outlive_recent_ones_by_default() -> None:
    residency = Residency(10, 3)
    for _ in range(5):
        run(residency, {0, 1})
    for bundle in range(2, 8):
        run(residency, {bundle})
        assert {0, 1, bundle} == resident(residency)


def test_calibrated_rates_decide_where_nothing_was_seen() -> None:
    rates = np.array([0.5, 0.1, 0.9, 0.0], np.float32)
    residency = Residency(4, 3, DEFAULT, rates)
    run(residency, {0, 1, 2})
    run(residency, {3})
    assert resident(residency) == {0, 2, 3}


def test_one_that_was_predicted_but_silent_goes_before_one_that_fired() -> None:
    for policy in (DEFAULT, LRU, LFU):
        residency = Residency(10, 3, policy)
        run(residency, {0, 1, 2}, used=np.array([0, 2]))
        run(residency, {5}, used=np.array([True]))
        assert resident(residency) == {0, 2, 5}


def test_what_overflows_is_worth_least() -> None:
    residency = Residency(6, 2)
    for _ in range(3):
        run(residency, {1, 5})
    run(residency, {2, 3})
    plan = run(residency, {0, 1, 2, 5})
    assert plan.ids[plan.hits].tolist() == [2]
    assert plan.ids[plan.loads].tolist() == [5] and plan.ids[plan.overflow].tolist() == [0, 1]


def test_evicted_slots_hold_nothing_until_commit() -> None:
    residency = Residency(4, 2)
    run(residency, {0, 1})
    plan = residency.plan(np.array([2, 3]))
    residency.evict(plan)
    assert (residency.slot_of == -1).all() and (residency.id_of == -1).all()
    residency.commit(plan)
    assert (residency.slot_of[[2, 3]] >= 0).all() and (residency.slot_of[[0, 1]] == -1).all()


@given(steps, st.lists(asks, min_size=1, max_size=10), st.integers(0, COUNT), policies)
def test_after_a_prompt_the_bundles_worth_most_are_resident(
    before: list[set[int]], prompt: list[set[int]], capacity: int, policy: Policy
) -> None:
    residency = Residency(COUNT, capacity, policy, RATES)
    for ids in before:
        run(residency, ids)
    used = np.array([[bundle in ids for bundle in range(COUNT)] for ids in prompt])
    residency.begin_prompt(len(prompt))
    for block in np.split(np.arange(COUNT), [5]):
        plan = residency.warm(block, used[:, block])
        residency.evict(plan)
        residency.place(plan)
    check_consistent(residency)
    one_by_one = Residency(COUNT, capacity, policy, RATES).history
    for ids in before + prompt:
        one_by_one.use(as_ids(ids))
    every = np.arange(COUNT)
    np.testing.assert_allclose(
        residency.history.worth(every) / residency.history.gain, one_by_one.worth(every) / one_by_one.gain, rtol=1e-9
    )
    kept = as_ids(resident(residency))
    others = np.setdiff1d(np.arange(COUNT), kept)
    assert len(kept) == capacity
    for other in others:
        assert not residency.history.beats(np.full(len(kept), other), kept).any()


class Plain:
    """The same decisions by the shortest code: the reference."""

    def __init__(self, residency: Residency):
        self.residency = residency

    def worth(self, ids: np.ndarray) -> np.ndarray:
        history = self.residency.history
        if not history.policy.decay:
            return history.last_used[ids].astype(np.float64)
        return history.score[ids] if history.base is None else history.score[ids] + history.gain * history.base[ids]

    def first_to_go(self, ids: np.ndarray, count: int, protected: np.ndarray) -> np.ndarray:
        rank = self.residency.history.rank(ids)
        order = np.lexsort((self.worth(ids), np.zeros(len(ids)) if rank is None else rank))
        return np.sort(order[~np.isin(order, protected)][: max(0, count)])

    def plan(self, ids: np.ndarray) -> SlotPlan:
        residency = self.residency
        slots = residency.slot_of[ids]
        hits, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        fresh = np.arange(residency.num_used, min(residency.capacity, residency.num_used + len(missing)))
        held = residency.id_of[: residency.num_used]
        victims = self.first_to_go(held, len(missing) - len(fresh), slots[hits])
        room = np.concatenate([victims, fresh]).astype(np.int32)
        over = self.first_to_go(ids[missing], len(missing) - len(room), np.empty(0, int))
        loads = np.delete(missing, over)
        slots[loads] = room
        return SlotPlan(ids, slots, hits, loads, missing[over])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.floats(0, 1.1), st.floats(0, 0.6), policies, st.booleans(), st.integers(0, 99))
def test_plans_are_those_of_plain_code(
    count: int, share: float, asked: float, policy: Policy, calibrated: bool, seed: int
) -> None:
    """Bit for bit, with ids of either kind, step after step."""
    rng = np.random.default_rng(seed)
    rates = rng.integers(0, 4, count).astype(np.float32) / 4 if calibrated else None  # with equals
    residency = Residency(count, int(share * count), policy, rates)
    for step in range(8):
        ids = np.flatnonzero(rng.random(count) < asked).astype(np.int32 if step % 2 else np.int64)
        expected, plan = Plain(residency).plan(ids), residency.plan(ids)
        for name in ("ids", "slots", "hits", "loads", "overflow"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(expected, name), name)
        assert plan.slots.dtype == np.int32
        score, last, clock = residency.history.score.copy(), residency.history.last_used.copy(), step
        used = rng.random(len(ids)) < 0.8
        gain = residency.history.gain
        residency.evict(plan)
        residency.commit(plan, used)
        check_consistent(residency)
        score[ids[used]] += gain
        last[ids[used]] = clock
        if residency.history.gain >= gain:
            assert (residency.history.score == score).all()
        assert (residency.history.last_used == last).all()


@given(steps, st.integers(1, COUNT), policies, st.data())
def test_kept_slots_are_left_alone(calls: list[set[int]], capacity: int, policy: Policy, data: st.DataObject) -> None:
    residency = Residency(COUNT, capacity, policy, RATES)
    for ids in calls:
        run(residency, ids)
    ids = as_ids(data.draw(asks))
    kept = data.draw(st.sets(st.integers(-1, residency.num_used - 1)))
    keep = np.array(sorted(kept), np.int32)
    plan, free = residency.plan(ids, keep), residency.plan(ids)
    assert (plan.hits == free.hits).all() and (plan.slots[plan.hits] == free.slots[free.hits]).all()
    assert kept.isdisjoint(plan.slots[plan.loads].tolist())
    taken = plan.slots[plan.slots >= 0]
    assert len(set(taken.tolist())) == len(taken)
    room = capacity - len(set(plan.slots[plan.hits].tolist()) | kept - {-1})
    missing = len(ids) - len(plan.hits)
    assert len(plan.loads) == min(room, missing) and len(plan.overflow) == missing - len(plan.loads)
    assert (residency.plan(ids, np.empty(0, np.int32)).slots == free.slots).all()
    residency.evict(plan)
    residency.commit(plan)
    check_consistent(residency)


@given(steps, st.integers(1, COUNT), policies, asks, asks)
def test_slots_that_are_being_filled_are_kept(
    calls: list[set[int]], capacity: int, policy: Policy, guessed: set[int], asked: set[int]
) -> None:
    """Reads ahead have taken slots, evicted and fresh ones, and not ended when the next plan is made."""
    residency, disk = Residency(COUNT, capacity, policy, RATES), Disk(capacity)
    for ids in calls:
        disk.fill(run(residency, ids))
    ahead = residency.plan(as_ids(guessed - resident(residency)))
    residency.evict(ahead)
    plan = residency.plan(as_ids(asked - guessed), keep=ahead.slots)
    assert set(plan.slots[plan.loads].tolist()).isdisjoint(ahead.slots.tolist())
    residency.evict(plan)
    disk.fill(ahead)
    disk.fill(plan)
    residency.place(ahead)
    residency.commit(plan)
    check_consistent(residency)
    for each in (ahead, plan):
        disk.check(residency, each)


def test_what_has_no_slot_keeps_none() -> None:
    """A plan's own slots may be given, with -1 for what overflowed."""
    residency = Residency(9, 2)
    run(residency, {0, 1})
    assert len(residency.plan(np.array([5, 6]), keep=np.array([-1, -1])).loads) == 2
    assert len(residency.plan(np.array([5, 6]), keep=np.array([-1, 0])).loads) == 1


@given(actions, st.integers(0, COUNT), st.booleans(), st.sampled_from([DEFAULT, LRU, LFU, Policy(0.5, 3.0)]), st.data())
def test_the_compiled_plan_is_the_same(
    calls: list[tuple[str, set[int], set[int]]], capacity: int, rated: bool, policy: Policy, data: st.DataObject
) -> None:
    pytest.importorskip("numba")
    rates = RATES.round(1) if rated else None  # equal ones too
    plain, fast = (Residency(COUNT, capacity, policy, rates, compiled) for compiled in (False, True))
    assert fast.compiled and not plain.compiled
    for what, ids, others in calls:
        keep = np.array(data.draw(st.lists(st.integers(-1, capacity - 1), unique=True)) if capacity else [], np.int32)
        for given_keep in (keep, None):
            one, two = (each.plan(as_ids(ids), given_keep) for each in (plain, fast))
            for name, value in vars(one).items():
                assert np.array_equal(value, vars(two)[name]), (name, value, vars(two)[name])
        for residency in (plain, fast):
            plan = residency.plan(as_ids(ids))
            if what == "fail":  # of some slots nothing is known any more
                residency.vacate(plan.slots[plan.loads])
                residency.vacate(plan.slots[plan.hits][::2])
            else:
                residency.evict(plan)
                residency.commit(plan, np.flatnonzero(np.isin(plan.ids, as_ids(others))))
