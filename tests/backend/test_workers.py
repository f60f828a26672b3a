"""Helpers of a kernel: every task is done once, whoever does it, and nobody waits for one that sleeps."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("numba", reason="helpers live in compiled code")

from mlx_flash.backends import workers  # noqa: E402


@pytest.fixture(scope="module")
def counting():
    """A kernel that counts how often each task is done, and takes a while over it."""
    from mlx_flash.backends.kernels_emit import fetch_add
    from mlx_flash.backends.workers_llvm import integers, task_kernel

    @task_kernel
    def count(p, task):  # type: ignore[no-untyped-def]
        seen = integers(integers(p, 3)[1], integers(p, 1)[0])
        for _ in range(integers(p, 3)[2]):
            fetch_add(seen.ctypes.data + 8 * task, 0)
        seen[task] += 1

    return count


def test_workers_do_each_task_once_whoever_helps(counting) -> None:
    crew = workers.Workers()
    for count in (1, 2, 4):
        crew.count = count
        for tasks in (1, 2, 7, 100):
            seen = np.zeros(tasks, np.int64)
            crew.run(counting, tasks, seen, 1000)
            assert seen.tolist() == [1] * tasks
    with pytest.raises(ValueError, match="0 threads"):
        crew.count = 0


def test_helpers_do_what_was_begun_while_the_caller_does_something_else(counting) -> None:
    crew, seen = workers.Workers(), np.zeros(50, np.int64)
    crew.count = 2
    finish = crew.start(counting, 50, seen, 1000)
    end = time.monotonic() + 10
    while not seen.all() and time.monotonic() < end:
        time.sleep(0.001)
    assert seen.all()
    finish()
    finish()
    assert seen.tolist() == [1] * 50


def test_more_calls_at_once_than_the_board_has_places(counting) -> None:
    """Begun and finished in another order, forgotten ones among them; every place is free again."""
    crew, all_seen, finishes = workers.Workers(), [np.zeros(9, np.int64) for _ in range(40)], []
    crew.count = 3
    for seen in all_seen:
        finishes.append(crew.start(counting, 9, seen, 100))
    del finishes[::3]
    for finish in finishes[::-1]:
        finish()
    board = workers.Workers._board
    for job in list(board.open.values()):
        job.finish()
    assert all(seen.tolist() == [1] * 9 for seen in all_seen)
    assert sorted(board.free) == list(range(workers.JOBS)) and not board.open


def test_nobody_waits_for_a_helper_that_sleeps(counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no helper ever woke up."""
    crew, seen = workers.Workers(), np.zeros(30, np.int64)
    crew.count = 2
    monkeypatch.setattr(workers.Board, "hire", lambda self, count: 0)
    crew.run(counting, 30, seen, 1000)
    assert seen.tolist() == [1] * 30
