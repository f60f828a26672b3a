"""One layer's slots, with reads that end when the test says so: prefetches, failures, steps that still read slots."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_flash.engine.residency.slot_loader import SlotLoader
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.storage.reader import CountedReader, ReadReport, Target
from mlx_flash.engine.storage.readers import MemoryReader
from mlx_flash.errors import ReadError
from mlx_flash.stats import Stats

COUNT, CAPACITY = 9, 4


class Read:
    """Writes each bundle's id into its row when it is waited for, unless it fails or was given up."""

    def __init__(self, ids: np.ndarray, rows: np.ndarray, target: Target):
        self.ids, self.rows, self.target = ids, rows, target
        self.over = self.fails = False

    def wait(self) -> ReadReport:
        self.over = True
        if self.fails:
            raise ReadError("made to fail")
        self.target.rows[self.rows] = self.ids[:, None]
        return ReadReport(len(self.ids), 1)

    def ended(self) -> bool:
        return self.over

    def give_up(self) -> None:
        self.fails = True


class Reader(MemoryReader):
    def __init__(self) -> None:
        super().__init__([])
        self.reads: list[Read] = []

    def submit(self, layer: int, ids: np.ndarray, rows: np.ndarray, targets: Sequence[Target]) -> Read:
        self.reads.append(Read(ids.copy(), rows.copy(), targets[0]))
        return self.reads[-1]


class Step:
    """Is lazy: notes in which order steps are settled."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def settle(self) -> None:
        self.log.append(self.name)


def make(one_by_one: bool = False) -> tuple[SlotLoader, Reader]:
    reader, target = Reader(), Target(0, np.zeros((CAPACITY, 1), np.uint8))
    return SlotLoader(0, Residency(COUNT, CAPACITY), [target], CountedReader(reader, Stats()), one_by_one), reader


def ids(*which: int) -> np.ndarray:
    return np.array(which, np.int32)


def step(loader: SlotLoader, wanted: np.ndarray) -> list[int]:
    """A step as a selector makes it; returns the bytes of the wanted bundles that have slots."""
    loader.land_ended()
    plan = loader.plan(wanted)
    loader.make_room(plan)
    pending = loader.read(plan, plan.loads)
    loader.finish()
    pending.wait()
    loader.residency.commit(plan)
    slots = plan.slots[plan.slots >= 0]
    return loader.targets[0].rows[slots, 0].tolist()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_was_prefetched_is_not_read_again(one_by_one: bool) -> None:
    loader, reader = make(one_by_one)
    assert step(loader, ids(1, 2)) == [1, 2]
    assert loader.prefetch(ids(1, 5, 7)) == 2
    assert len(reader.reads) == (3 if one_by_one else 2)
    assert loader.count_arriving(ids(2, 5, 7)) == 2 and loader.count_arriving(ids(1, 8)) == 0
    before = len(reader.reads)
    assert step(loader, ids(5, 7)) == [5, 7]
    assert not loader.prefetches and not loader.arriving.any()
    assert not sum(len(read.ids) for read in reader.reads[before:])


def test_a_failed_prefetch_empties_its_slots_and_what_is_needed_is_read_again() -> None:
    loader, reader = make(one_by_one=True)
    loader.prefetch(ids(3, 5))
    reader.reads[0].over = reader.reads[0].fails = True
    assert step(loader, ids(3, 5)) == [3, 5]
    assert [read.ids.tolist() for read in reader.reads] == [[3], [5], [3]]


def test_a_prefetch_that_fails_when_a_step_counts_on_it_is_an_error() -> None:
    loader, reader = make()
    loader.prefetch(ids(3, 5))
    reader.reads[0].fails = True  # only seen when it is waited for
    with pytest.raises(ReadError):
        step(loader, ids(3))
    loader.forget()
    assert not loader.prefetches and not loader.arriving.any() and loader.residency.num_used == 0
    assert step(loader, ids(3)) == [3]


def test_wrong_guesses_are_given_up_and_right_ones_are_not() -> None:
    loader, reader = make(one_by_one=True)
    loader.prefetch(ids(3, 5, 6))
    loader.give_up_others(ids(5, 8))
    assert [read.fails for read in reader.reads] == [True, False, True]
    loader.land_given_up()
    assert [each.slots.tolist() for each in loader.prefetches] == [[1]]
    assert (loader.residency.slot_of[[3, 6]] < 0).all() and loader.residency.slot_of[5] == 1
    assert loader.arriving_in(np.array([0, 1])) == loader.prefetches and loader.arriving_in(np.array([0])) == []


def test_an_interrupted_prefetch_is_forgotten() -> None:
    loader, reader = make()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    loader.add_step([SimpleNamespace(settle=interrupted)])
    with pytest.raises(KeyboardInterrupt):
        loader.prefetch(ids(3, 5))
    loader.forget_prefetches()
    assert not loader.arriving.any() and (loader.residency.slot_of < 0).all()


def test_slots_are_overwritten_only_after_all_steps_have_read_them() -> None:
    loader, _ = make()
    log: list[str] = []
    for name in "abcd":
        loader.add_step([Step(name, log), Step(name.upper(), log)], lazy=2)
    assert log == ["a", "A", "b", "B"]
    loader.make_room(loader.plan(ids()))
    assert log[4:] == [], "nothing is overwritten"
    loader.make_room(loader.plan(ids(4)))
    assert log[4:] == ["c", "C", "d", "D"]


def test_copies_into_and_out_of_slots() -> None:
    loader, reader = make()
    staging = [Target(0, np.array([[0], [11], [12], [13]], np.uint8))]
    log: list[str] = []
    loader.add_step([Step("a", log)])
    loader.residency.begin_prompt(1)
    loader.warm(ids(2, 4), np.ones((1, 2), bool), staging, np.array([1, 3]))
    assert log == ["a"] and not reader.reads
    out = [Target(0, np.zeros((2, 1), np.uint8))]
    assert loader.copy_out(ids(2, 4), out) and out[0].rows[:, 0].tolist() == [11, 13]
    assert not loader.copy_out(ids(2, 5), out)
