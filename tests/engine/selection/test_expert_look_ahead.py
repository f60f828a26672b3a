"""Guesses of the next layer's experts: whatever becomes of their reads, the right bytes are served."""

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
from mlx_flash.engine.selection.look_ahead import ExpertLookAhead
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.reader import ReadReport, Target
from mlx_flash.engine.storage.readers import MemoryReader
from mlx_flash.errors import ReadError
from mlx_flash.stats import Stats
from tests.engine.selection.test_router import BUNDLES, COUNT, LAYOUT, Recording, serve

LAYERS, TOP_K = 3, 3


class Late:
    """A read that is done when it is waited for, or when `ended` happens to come after it."""

    def __init__(self, reader, read, rows, which):
        self.rows, self.which = rows, which
        self.reader, self.read, self.outcome, self.begun = reader, read, None, reader.rng.random() < reader.begins

    def half(self):
        """What was in flight when the request was given up still comes."""
        self.rows[self.which, :4] = 255
        return ReadError("given up")

    def wait(self):
        if self.outcome is None:
            self.outcome = self.read() or ReadReport(8, 1)
        if isinstance(self.outcome, ReadError):
            raise self.outcome
        return self.outcome

    def ended(self):
        if self.outcome is None and self.reader.rng.random() < self.reader.quick:
            self.outcome = self.read() or ReadReport(8, 1)
        return self.outcome is not None

    def give_up(self):
        if not self.begun:
            self.outcome = self.outcome or ReadError("given up")
        self.read = self.half


class LateReader(Recording):
    """Bytes come late, one request in `failing` never, and one `submit` in `interrupting` is interrupted."""

    def __init__(self, seed=0, quick=0.0, failing=0.0, interrupting=0.0, begins=0.0):
        super().__init__()
        MemoryReader.__init__(self, [(LAYOUT, BUNDLES)] * LAYERS)
        self.rng, self.quick, self.failing, self.interrupting = (
            np.random.default_rng(seed),
            quick,
            failing,
            interrupting,
        )
        self.late, self.came, self.begins = [], [], begins

    def submit(self, layer, ids, rows, targets):
        if self.rng.random() < self.interrupting:
            raise KeyboardInterrupt
        for used, which in self.in_use:
            assert used is not targets[0].rows or not which & set(rows.tolist()), "a row in use was overwritten"
        targets[0].rows[rows] = 0  # until they have come, the bytes are anything

        def read():
            if self.rng.random() < self.failing:
                return ReadError("failed")
            targets[0].rows[rows] = BUNDLES[ids, :8]
            self.came += ids.tolist()

        self.read += ids.tolist()
        self.late.append(Late(self, read, targets[0].rows, rows))
        return self.late[-1]

    def drain(self):
        for late in self.late:
            late.give_up()
        self.late = []


def make(capacity, reader, mode="on", routers=True, residency=Residency):
    shared = SharedContext(None, reader, BlockStream([]), Stats())

    def slab(rows):
        return SimpleNamespace(targets=(Target(0, np.zeros((rows, 8), np.uint8)),)) if rows else None

    ahead = ExpertLookAhead(shared, [TOP_K] * LAYERS, mode)
    ring = ExpertStaging(slab(4), 4) if capacity < COUNT else None
    layers = []
    for layer in range(LAYERS):
        if routers:
            ahead.add_router(layer, lambda x: x)
        found = ahead if capacity < COUNT else None
        layers.append(RouterSelector(layer, shared, residency(COUNT, capacity), slab(capacity), ring, found))
    return layers, ahead


def logits_of(ids):
    logits = np.zeros(COUNT, np.float32)
    logits[ids] = np.arange(len(ids), 0, -1)
    return logits


def token(layers, reader, chosen, guesses):
    """A token whose layers choose chosen[l] (k,), each with a guess of what the next will."""
    for layer, selector in enumerate(layers):
        x = None if guesses[layer] is None else logits_of(guesses[layer])
        assert sorted(serve(selector, reader, chosen[layer][None], x=x)) == sorted(chosen[layer].tolist())


@given(
    capacity=st.integers(0, COUNT),
    kind=st.sampled_from(["right", "wrong", "random", "half"]),
    quick=st.sampled_from([0.0, 0.5, 1.0]),
    failing=st.sampled_from([0.0, 0.0, 0.1]),
    interrupting=st.sampled_from([0.0, 0.0, 0.1]),
    seed=st.integers(0, 9999),
)
def test_no_guess_changes_what_is_served(capacity, kind, quick, failing, interrupting, seed):
    reader = LateReader(seed, quick, failing, interrupting, begins=0.5)
    layers, _ = make(capacity, reader)
    rng = np.random.default_rng(seed)
    for _ in range(12):
        if rng.random() < 0.15:
            chosen = np.stack([rng.permutation(COUNT)[:TOP_K] for _ in range(4)])
            work = [(lambda selector=selector, chosen=chosen: serve(selector, reader, chosen)) for selector in layers]
        else:
            chosen = np.stack([rng.permutation(COUNT)[:TOP_K] for _ in range(LAYERS)])
            others = [np.setdiff1d(np.arange(COUNT), each)[:TOP_K] for each in chosen]
            guesses = {
                "right": [*chosen[1:], chosen[0]],
                "wrong": [*others[1:], others[0]],
                "random": [rng.permutation(COUNT)[:TOP_K] for _ in range(LAYERS)],
                "half": [np.append(a[:1], b[:2]) for a, b in zip([*chosen[1:], chosen[0]], others, strict=True)],
            }[kind]
            guesses = guesses if rng.random() < 0.7 else [None] * LAYERS  # off, as a trial has it for some tokens
            work = [lambda chosen=chosen, guesses=guesses: token(layers, reader, chosen, guesses)]
        try:
            for each in work:
                each()
                if rng.random() < 0.05:
                    break  # the reply is dropped between two layers
        except (KeyboardInterrupt, ReadError) as error:
            assert failing if isinstance(error, ReadError) else interrupting
            reader.in_use = []  # the reply's results are dropped
    assert not layers[0].shared.stats.guessed or capacity >= 4
    if capacity == COUNT:
        assert not layers[0].shared.stats.guessed


def test_right_guesses_are_read_once_and_counted():
    reader = LateReader()
    layers, _ = make(8, reader)
    chosen = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    token(layers, reader, chosen, [[3, 4, 5], [6, 7, 8], None])
    assert reader.read == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # two of a layer's three early: a quarter of its slots
    stats = layers[0].shared.stats
    assert (stats.guessed, stats.guessed_right, stats.hits, stats.misses) == (4, 4, 0, 9)
    token(layers, reader, chosen, [None, None, None])
    assert len(reader.read) == 9 and (stats.guessed, stats.hits, stats.misses) == (4, 9, 9)
    token(layers, reader, chosen, [[3, 4, 5], [6, 7, 8], None])
    assert (stats.guessed_right, stats.hits, stats.misses) == (4, 18, 9)


def test_a_wrong_guess_that_has_not_begun_is_given_up_and_its_slot_is_the_first_to_be_filled():
    reader = LateReader()
    layers, _ = make(8, reader)
    token(layers, reader, np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]]), [[9, 10, 11], None, None])
    assert not {9, 10, 11} & set(reader.came) and not layers[1].loader.prefetches
    residency = layers[1].residency
    empty = np.flatnonzero(residency.id_of[: residency.num_used] < 0)
    assert len(empty) == 2 and (residency.slot_of[[9, 10]] < 0).all()
    while residency.num_used < 8:  # fill the slots that were never used
        token(layers, reader, np.array([[0, 1, 2], [0, 1, 2], [6, 7, 8]]), [None, None, None])
    token(layers, reader, np.array([[0, 1, 2], [6, 7, 3], [6, 7, 8]]), [None, None, None])
    assert sorted(residency.slot_of[[6, 7]]) == sorted(empty)  # rather than what is worth something


def test_a_failed_guess_is_read_again_if_it_is_needed():
    reader = LateReader(quick=1.0, failing=0.0)
    layers, _ = make(8, reader)
    chosen = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    layers[1].loader.prefetch(np.array([3, 9]))
    for late in reader.late:
        late.outcome = ReadError("the disk failed")
    token(layers, reader, chosen, [None, None, None])
    assert reader.read.count(3) == 2 and reader.read.count(9) == 1


def test_what_was_guessed_and_is_resident_stays():
    reader = LateReader(quick=1.0)
    layers, _ = make(4, reader)
    token(layers, reader, np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]]), [None, None, None])
    layers[1].residency.history.use(np.array([5]))
    token(layers, reader, np.array([[0, 1, 2], [3, 4, 9], [6, 7, 8]]), [[3, 4, 9], None, None])
    assert {3, 4, 5, 9} == set(layers[1].residency.id_of.tolist())  # 9 was read into the free slot
    token(layers, reader, np.array([[0, 1, 2], [3, 4, 11], [6, 7, 8]]), [[3, 4, 11], None, None])
    assert {3, 4} <= set(layers[1].residency.id_of.tolist())


def test_auto_times_every_token_and_turns_itself_off():
    reader = LateReader(quick=1.0)
    layers, ahead = make(8, reader, "auto")
    seen = []
    ahead.trial = SimpleNamespace(on=True, token=seen.append)
    rng = np.random.default_rng(0)
    for n in range(6):
        chosen = np.stack([rng.permutation(COUNT)[:TOP_K] for _ in range(LAYERS)])
        ahead.trial.on = n < 3
        before = layers[0].shared.stats.guessed
        token(layers, reader, chosen, [chosen[1], chosen[2], None])
        assert (layers[0].shared.stats.guessed > before) == (n < 3) and len(seen) == n + 1
        assert (ahead.target(1) is layers[1].loader) == (n < 3)
    assert ahead.target(LAYERS) is None
    for layer in range(1, LAYERS + 1):
        assert len(seen) == 6
        ahead.guess(layer, None)
    assert len(seen) == 7


@pytest.mark.parametrize(("capacity", "known"), [(3, True), (8, False)])
def test_too_few_slots_or_no_router_mean_no_guess(capacity, known):
    reader = LateReader(quick=1.0)
    layers, ahead = make(capacity, reader, routers=known)
    assert ahead.target(1) is None
    chosen = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    token(layers, reader, chosen, [chosen[1], chosen[2], None])
    assert not layers[0].shared.stats.guessed


def test_an_empty_slot_is_filled_first():
    residency = Residency(6, 4)
    residency.place(residency.plan(np.arange(4)))
    residency.vacate(np.array([2]))
    assert residency.slot_of[2] == -1
    plan = residency.plan(np.array([5]))
    assert plan.slots.tolist() == [2]
    residency.evict(plan)
    residency.commit(plan)
    assert residency.id_of.tolist() == [0, 1, 5, 3]
    residency.vacate(np.array([2]))
    residency.history.pass_tokens(100_000)  # what is worth less than anything stays so
    assert residency.plan(np.array([4])).slots.tolist() == [2]


@pytest.mark.parametrize("step", ["evict", "place"])
def test_an_interrupt_while_slots_change_hands_forgets_them(step):
    class Interrupted(Residency):
        armed = None

        def evict(self, plan):
            super().evict(plan)
            self.interrupt("evict")

        def place(self, plan):
            self.interrupt("place")
            super().place(plan)

        def interrupt(self, where):
            if where == self.armed:
                raise KeyboardInterrupt

    reader = LateReader(quick=1.0)
    layers, _ = make(4, reader, residency=Interrupted)
    chosen = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    for extra in (9, 10, 11):
        token(layers, reader, np.array([[0, 1, 2], [3, 4, extra], [6, 7, 8]]), [None] * LAYERS)
    residency = layers[1].residency
    residency.armed = step
    with pytest.raises(KeyboardInterrupt):
        token(layers, reader, chosen, [[0, 1, 2], None, None])
    residency.armed = None
    reader.in_use = []
    serve(layers[0], reader, chosen[:1])
    assert (residency.slot_of < 0).all() and residency.num_used == 0 and not layers[1].loader.prefetches
    token(layers, reader, chosen, [None] * LAYERS)
