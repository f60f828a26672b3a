"""Helpers of a kernel: every task is done once, by any thread, and nobody waits for one that sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="helpers live in compiled code")

from mlx_flash.engine.backends.numpy.kernels import thread_pool  # noqa: E402

from ..system.test_executor import GETPID, check_executor, needs_numbers  # noqa: E402


@pytest.fixture(scope="module")
def counting():
    """A kernel that counts how often each task is done, and takes a while over it: as its last argument, an array, says
    when the task begins."""
    from mlx_flash.engine.backends.numpy.kernels.thread_pool_loops import integers, task_kernel
    from mlx_flash.engine.backends.numpy.kernels.vector_code import fetch_add

    @task_kernel
    def count(p, task):  # type: ignore[no-untyped-def]
        seen = integers(integers(p, 3)[1], integers(p, 1)[0])
        for _ in range(integers(integers(p, 3)[2], 1)[0]):
            fetch_add(seen.ctypes.data + 8 * task, 0)
        seen[task] += 1

    return count


def test_workers_do_each_task_once_whoever_helps(counting) -> None:
    crew = thread_pool.Workers()
    for count in (1, 2, 4):
        crew.count = count
        for tasks in (1, 2, 7, 100):
            seen = np.zeros(tasks, np.int64)
            crew.run(counting, tasks, seen, np.array([1000]))
            assert seen.tolist() == [1] * tasks
    with pytest.raises(ValueError, match="0 threads"):
        crew.count = 0


def test_helpers_do_what_was_begun_while_the_caller_does_something_else(counting) -> None:
    crew, seen = thread_pool.Workers(), np.zeros(50, np.int64)
    crew.count = 2
    finish = crew.start(counting, 50, seen, np.array([1000]))
    end = time.monotonic() + 10
    while not seen.all() and time.monotonic() < end:
        time.sleep(0.001)
    assert seen.all()
    finish()
    finish()
    assert seen.tolist() == [1] * 50


def test_more_calls_at_once_than_the_board_has_places(counting) -> None:
    """Begun and finished in another order, forgotten ones among them; every place is free again."""
    crew, all_seen, finishes = thread_pool.Workers(), [np.zeros(9, np.int64) for _ in range(40)], []
    crew.count = 3
    for seen in all_seen:
        finishes.append(crew.start(counting, 9, seen, np.array([100])))
    del finishes[::3]
    for finish in finishes[::-1]:
        finish()
    board = thread_pool.Workers._board
    for job in list(board.open.values()):
        job.finish()
    assert all(seen.tolist() == [1] * 9 for seen in all_seen)
    assert not board.open


class Held:
    """A job's argument that holds up its thread while the job is put on the board."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __int__(self) -> int:
        self.reached.set()
        assert self.go_on.wait(20)
        return 0


@pytest.mark.parametrize("urgent", [False, True])
def test_no_place_is_given_to_two_jobs(urgent: bool) -> None:
    """Every place has gone to a thread that is held up before its job begins, and one more thread wants a place."""
    board, places = thread_pool.Board(), thread_pool.JOBS if urgent else thread_pool.JOBS - 1
    held, ends = [Held() for _ in range(places)], [threading.Event() for _ in range(places + 1)]
    jobs: list[thread_pool.Job] = []

    def work(argument: object, end: threading.Event) -> None:
        job = thread_pool.Job(board, 0, 0, (argument,), 0, urgent=urgent)
        jobs.append(job)
        assert end.wait(20)
        job.finish()

    threads = [threading.Thread(target=work, args=each) for each in zip([*held, 0], ends, strict=True)]
    for thread, argument in zip(threads, held, strict=False):
        thread.start()
        assert argument.reached.wait(20)
    threads[-1].start()
    time.sleep(0.05)
    early = len(jobs)
    ends[0].set()
    held[0].go_on.set()  # the first job is put up and finished: its place is the last thread's
    threads[0].join(20)
    for each in held:
        each.go_on.set()
    while len(jobs) < len(threads):
        time.sleep(0.001)
    found = [job.place for job in jobs]
    for end in ends:
        end.set()
    for thread in threads:
        thread.join(20)
    assert not early, "a place was given away that another thread has"
    assert len(set(found[1:])) == places and found[0] in found[1:] and not board.open


def test_jobs_that_were_interrupted_or_forgotten_before_they_began_give_their_places_back() -> None:
    class Interrupting:
        def __int__(self) -> int:
            raise KeyboardInterrupt

    board = thread_pool.Board()
    for _ in range(3 * thread_pool.JOBS):
        with pytest.raises(KeyboardInterrupt):
            thread_pool.Job(board, 0, 0, (Interrupting(),), 0, urgent=True)
        thread_pool.Job(board, 0, 0, (), 0)


def test_a_job_that_is_finished_twice_takes_no_place_from_the_next() -> None:
    board = thread_pool.Board()
    first = thread_pool.Job(board, 0, 0, (), 0)
    first.finish()
    second = thread_pool.Job(board, 0, 0, (), 0)
    first.finish()
    third = thread_pool.Job(board, 0, 0, (), 0)
    assert first.place == second.place != third.place


INTERRUPTED = """
import random, signal, sys, threading, time
import numpy as np
from mlx_flash.engine.backends.numpy.kernels import loops, thread_pool

pool = thread_pool.Workers()
pool.count = 2
w, wrong, interrupts = np.ones((400, 64), np.float32), 0, 0

def dots():
    out = np.zeros(400, np.float32)
    pool.run(loops.dots, 20, 0, w, w.strides[0], 0, 400, w[0], 64, out)
    return int((out != 64).any())

dots()
stop, others = threading.Event(), []
def work():
    while not stop.is_set():
        others.append(dots())
thread = threading.Thread(target=work)
thread.start()

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
end, rng = time.monotonic() + float(sys.argv[1]), random.Random(1)
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00005, 0.002))
        while True:
            wrong += dots()
    except KeyboardInterrupt:
        interrupts += 1
signal.setitimer(signal.ITIMER_REAL, 0)
stop.set()
thread.join()
for _ in range(100):
    wrong += dots()
print(interrupts > 20, len(others) > 20, wrong + sum(others))
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no setitimer")
def test_two_threads_run_kernels_and_one_is_interrupted() -> None:
    """In a process of its own: one that hangs can be ended."""
    command = [sys.executable, "-c", INTERRUPTED, "1.5"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "0"], done.stdout + done.stderr


def test_steps_are_done_one_after_the_other_again_and_again(counting) -> None:
    crew, seen = thread_pool.Workers(), [np.zeros(tasks, np.int64) for tasks in (1, 30, 1, 7)]
    for count in (1, 3):
        crew.count = count
        steps = thread_pool.Steps(crew)
        for each in seen:
            steps.add(counting, len(each), each, np.array([1000]))
        before = seen[1][0]
        for _ in range(20):
            steps.run()
        assert all(each.tolist() == [before + 20] * len(each) for each in seen)


def test_places_that_run_out_take_none_from_steps_that_another_thread_runs(counting) -> None:
    """Where all are taken the oldest job is finished: one that runs steps has to be waited for."""
    crew, seen, others = thread_pool.Workers(), np.zeros(50, np.int64), [np.zeros(9, np.int64) for _ in range(60)]
    crew.count, steps = 2, thread_pool.Steps(crew)
    for _ in range(10):
        steps.add(counting, 50, seen, np.array([3000]))
    thread = threading.Thread(target=lambda: [steps.run() for _ in range(3)])
    thread.start()
    finishes = [crew.start(counting, 9, each, np.array([100])) for each in others]  # more than there are places
    thread.join()
    for finish in finishes:
        finish()
    assert seen.tolist() == [30] * 50 and all(each.tolist() == [1] * 9 for each in others)


def test_nobody_waits_for_a_helper_that_sleeps(counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no helper ever woke up."""
    crew, seen = thread_pool.Workers(), np.zeros(30, np.int64)
    crew.count = 2
    monkeypatch.setattr(thread_pool.Board, "hire", lambda self, count: 0)
    crew.run(counting, 30, seen, np.array([1000]))
    assert seen.tolist() == [1] * 30


@needs_numbers
def test_the_thread_pool_is_an_executor() -> None:
    pool = thread_pool.Workers()
    pool.count = 2
    check_executor(pool)
    call = pool.system_call(GETPID)
    pool.count = 1
    assert not call.start(0, 0, 0) and call.wait() == 0, "there is no other thread"


@needs_numbers
def test_a_system_call_is_made_by_a_helper_between_two_tasks(counting) -> None:
    pool, seen, turns = thread_pool.Workers(), np.zeros(9000, np.int64), np.array([100_000])
    pool.count = 2
    finish = pool.start(counting, 9000, seen, turns)  # half a millisecond each
    while not seen.any():
        time.sleep(0.001)
    call = pool.system_call(GETPID)
    assert call.start(0, 0, 0)
    end = time.monotonic() + 10
    while not call.done() and time.monotonic() < end:
        time.sleep(0.001)
    assert call.done() and not seen.all(), "it waited until all tasks were done"
    turns[0] = 0
    finish()
    assert call.wait() == os.getpid()
