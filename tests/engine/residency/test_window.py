"""What bundles are worth: uses that fade, calibrated rates, the window, pins; and which go first."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.engine.residency import window as policy_module
from mlx_flash.engine.residency.window import DEFAULT, LFU, LRU, History, Policy, least

COUNT = 9
EVERY = np.arange(COUNT)
uses = st.lists(st.sets(st.integers(0, COUNT - 1)), max_size=25)
some_rates = st.lists(st.floats(0, 1, width=32), min_size=COUNT, max_size=COUNT).map(lambda r: np.array(r, np.float32))


def ids_of(used: set[int]) -> np.ndarray:
    return np.array(sorted(used), np.int64)


def seen(policy: Policy, tokens: list[set[int]], rates: np.ndarray | None = None, pins: int = 0) -> History:
    history = History(policy, COUNT, pins, rates)
    for used in tokens:
        history.use(ids_of(used))
    return history


@given(uses, st.floats(0.01, 1), st.floats(0, 50), some_rates)
def test_a_use_fades_with_every_token_and_the_prior_does_not(
    tokens: list[set[int]], decay: float, prior: float, rates: np.ndarray
) -> None:
    history = seen(Policy(decay, prior), tokens, rates)
    ages = {bundle: [len(tokens) - t for t, used in enumerate(tokens) if bundle in used] for bundle in range(COUNT)}
    expected = [prior * float(rates[b]) + sum(decay**age for age in ages[b]) for b in range(COUNT)]
    np.testing.assert_allclose(history.worth(EVERY) / history.gain, expected, rtol=1e-9, atol=1e-30)


def test_worth_survives_more_tokens_than_a_float_has_exponents() -> None:
    history = History(Policy(decay=0.5), 2)
    for token in range(3000):
        history.use(np.array([token % 2]))
    assert np.isfinite(history.worth(np.arange(2))).all() and history.gain <= policy_module.RESCALE
    np.testing.assert_allclose(history.worth(np.arange(2)) / history.gain, [1 / 3, 2 / 3])
    history.pass_tokens(5000)
    assert (history.worth(np.arange(2)) == 0).all() and history.clock == 8000


@given(uses, uses, st.sampled_from([DEFAULT, LRU, LFU, Policy(decay=0.3)]))
def test_a_prompt_at_once_counts_like_its_tokens_one_by_one(
    before: list[set[int]], prompt: list[set[int]], policy: Policy
) -> None:
    whole, steps = seen(policy, before), seen(policy, before + prompt)
    used = np.array([[bundle in token for bundle in range(COUNT)] for token in prompt], bool).reshape(-1, COUNT)
    whole.pass_tokens(len(prompt))
    for block in (np.arange(0, 4), np.arange(4, COUNT)):
        whole.use_many(block, used[:, block])
    np.testing.assert_allclose(whole.worth(EVERY) / whole.gain, steps.worth(EVERY) / steps.gain, rtol=1e-9)
    assert (whole.last_used == steps.last_used).all() and whole.clock == steps.clock


@given(uses)
def test_lru_and_lfu_are_what_they_are_called(tokens: list[set[int]]) -> None:
    last = [max((t for t, used in enumerate(tokens) if b in used), default=-1) for b in range(COUNT)]
    often = [sum(b in used for used in tokens) for b in range(COUNT)]
    assert seen(LRU, tokens).order(EVERY).tolist() == sorted(range(COUNT), key=lambda b: (last[b], b))
    assert seen(LFU, tokens).order(EVERY).tolist() == sorted(range(COUNT), key=lambda b: (often[b], b))


@given(uses, some_rates, st.integers(0, 3), st.integers(0, COUNT))
def test_the_window_goes_after_the_rest_and_pins_go_last(
    tokens: list[set[int]], rates: np.ndarray, window: int, pins: int
) -> None:
    history = seen(Policy(window=window), tokens, rates, pins)
    recent = set[int]().union(*tokens[max(0, len(tokens) - window) :])
    hottest = set(sorted(range(COUNT), key=lambda b: (-rates[b], b))[:pins])
    ranks = [2 if b in hottest else int(b in recent) for b in range(COUNT)]
    rank = history.rank(EVERY)
    assert (rank.tolist() if rank is not None else [0] * COUNT) == ranks
    order = history.order(EVERY).tolist()
    assert [ranks[b] for b in order] == sorted(ranks)
    for before, after in zip(order, order[1:], strict=False):
        if ranks[before] == ranks[after]:
            assert history.worth(np.array([before])) <= history.worth(np.array([after]))


@given(uses, some_rates, st.integers(0, 3), st.integers(0, 4), st.data())
def test_first_to_go_is_the_head_of_the_order_without_the_protected(
    tokens: list[set[int]], rates: np.ndarray, window: int, pins: int, data: st.DataObject
) -> None:
    history = seen(Policy(window=window, prior=0), tokens, rates, pins)
    ids = np.array(data.draw(st.permutations(range(COUNT))))[: data.draw(st.integers(0, COUNT))]
    protected = np.array(sorted(data.draw(st.sets(st.integers(0, COUNT - 1)))), np.int64)
    protected = protected[protected < len(ids)]
    for count in range(len(ids) + 2):
        expected = [p for p in history.order(ids).tolist() if p not in protected][:count]
        assert history.first_to_go(ids, count, protected).tolist() == sorted(expected)


@given(uses, some_rates, st.integers(0, 3), st.integers(0, 4))
def test_beats_agrees_with_the_order(tokens: list[set[int]], rates: np.ndarray, window: int, pins: int) -> None:
    history = seen(Policy(window=window), tokens, rates, pins)
    order = history.order(EVERY)
    assert not history.beats(order[:-1], order[1:]).any() and not history.beats(EVERY, EVERY).any()
    for first, second in zip(order, order[1:], strict=False):
        pair = history.worth(np.array([first, second]))
        rank = history.rank(np.array([first, second]))
        same = pair[0] == pair[1] and (rank is None or rank[0] == rank[1])
        assert history.beats(np.array([second]), np.array([first]))[0] == (not same)


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 13))
def test_least_takes_the_smallest_and_of_equals_the_first(values: list[int], count: int) -> None:
    expected = sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
    assert least(np.array(values, np.float64), count).tolist() == expected


@pytest.mark.parametrize("wrong", [{"decay": 1.1}, {"decay": -0.1}, {"prior": -1.0}, {"window": -1}, {"pinned": 2.0}])
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Policy(**wrong)  # type: ignore[arg-type]


@given(st.floats(0, 1), st.floats(0, 1e6), st.integers(0, 9), st.floats(0, 1))
def test_plain_values_and_back(decay: float, prior: float, window: int, pinned: float) -> None:
    policy = Policy(decay, prior, window, pinned)
    plain = json.loads(json.dumps(policy.plain()))
    assert Policy.of(plain) == policy and type(Policy.of(plain | {"window": float(window)}).window) is int
    assert Policy.of({"decay": decay}) == Policy(decay) and Policy.of({}) == DEFAULT


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decay": 1.5}, "decay and pinned"),
        ({"window": -1}, "window"),
        ({"window": 1.5}, "whole number of tokens, not 1.5"),
        ({"prior": float("inf")}, "finite"),
        ({"decay": float("nan")}, "finite"),
        ({"prior": 10**400}, "finite"),
        ({"prior": "40"}, "finite"),
        ({"window": True}, "finite"),
        ({"prior": None}, "finite"),
        ({"prior": [1]}, "finite"),
        ({"speed": 1}, "decay, prior, window, pinned, not of .*speed"),
        ({3: 1}, "not of"),
        ([0.9], "not of"),
        (None, "not of"),
    ],
)
def test_plain_values_that_make_no_policy(values: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Policy.of(values)  # type: ignore[arg-type]


def least_by_sorting(values: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(values, kind="stable")[: max(0, count)].tolist())


@given(st.integers(1, 400), st.integers(0, 9), st.integers(0, 99))
def test_least_of_many_with_equals(size: int, kinds: int, seed: int) -> None:
    """Also with infinite ones, as those are that must not go."""
    rng = np.random.default_rng(seed)
    values = (
        np.append(rng.random(size), np.inf)[rng.integers(0, size + 1, size)]
        if not kinds
        else rng.integers(0, kinds, size).astype(np.float64)
    )
    before = values.copy()
    for count in {0, 1, size // 3, size - 1, size, size + 1}:
        assert least(values, count).tolist() == least_by_sorting(values, count)
    assert (values == before).all()
