"""Whatever interrupts AioReader and whenever, its requests can be repeated, and memory is safe once it is drained."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.engine.storage.aio_reader import AioReader
from mlx_flash.engine.storage.reader import LayerFile
from mlx_flash.errors import ReadError

from .aio import APART, IDS, ROOT, WIDE, Interrupt, SpoiledAio, WatchedAio, check_drained, contexts, needs_aio, submit
from .test_readers import NOTHING, check, page_aligned

pytestmark = needs_aio


def test_drain_ends_what_is_in_flight(wide):
    with AioReader([wide[0]], depth=100, merging=NOTHING) as reader:
        slab = page_aligned(300, 16384)
        for _ in range(3):
            pending = submit(reader, slab)
            check_drained(reader, slab, wide[1], pending)
            with pytest.raises(ReadError, match="given up"):
                pending.wait()


@pytest.mark.parametrize("name", ["submit", "events", "destroy", "setup"])
@pytest.mark.parametrize("repeat", ["wait", "drain"])
def test_what_a_system_call_returned_may_be_lost(wide, name, repeat):
    """Ctrl-C just after the 1st, 2nd, 3rd ... call, until a run passes."""
    for at in range(1, 100):
        left, lost = at, False

        def act(call_name, call):
            nonlocal left, lost
            result = call()
            left -= call_name == name
            if not left and not lost:
                lost = True
                raise KeyboardInterrupt
            return result

        with AioReader([wide[0]], depth=100, merging=NOTHING, aio=(aio := WatchedAio())) as reader:
            slab, pending = page_aligned(300, 16384), None
            if name in ("destroy", "setup"):
                aio.interrupt_next("submit")  # so that a new context is needed
                with pytest.raises(KeyboardInterrupt):
                    submit(reader, slab)
            aio.act = act
            try:
                pending = submit(reader, slab)
                pending.wait()
            except KeyboardInterrupt:
                if repeat == "wait" and pending is not None:
                    pending.wait()
                    np.testing.assert_array_equal(slab, wide[1][IDS])
                check_drained(reader, slab, wide[1], pending)
            aio.act = lambda name, call: call()
        if not lost:
            break
    assert 1 < at < 100


def read_and_drain(reader, slab, at):
    """(steps, pending) of a request that is read in two goes and given up in the third, interrupted at step `at`."""
    pending = None
    with Interrupt(at) as interrupt:
        try:
            pending = submit(reader, slab)
            pending.ended()
            pending.wait()
            pending = submit(reader, slab)
            pending.give_up()
            reader.drain()
        except KeyboardInterrupt:
            pass
    return interrupt.count, pending


def check_interrupts(file, samples, executor=None):
    """All steps of a request, of `wait` and of `drain`, one interrupt each, a sample of them."""
    slab = page_aligned(300, 2048)
    with AioReader([file[0]], depth=64, merging=NOTHING, executor=executor) as reader:
        submit(reader, slab).wait()
        steps, _ = read_and_drain(reader, slab, -1)
        for at in random.Random(4).sample(range(1, steps), min(steps - 1, samples)):
            _, pending = read_and_drain(reader, slab, at)
            try:
                if pending is not None:
                    pending.wait()
                    np.testing.assert_array_equal(slab, file[1][IDS])
            except ReadError as error:
                assert "given up" in str(error)
            reader.drain()
            slab[:] = 0xA5
            check(reader, 0, file[1], range(0, 300, 7), range(43), [(0, 2048, 2048, 0)], 43)
            assert (slab == 0xA5).all(), f"written to after an interrupt at step {at}"
    assert steps > 150


def test_an_interrupt_at_any_step(file):
    check_interrupts(file, 150)


def test_an_interrupt_at_any_step_after_a_read_that_ended_short(file):
    """Among them: before threads know what to read on, and after half of what was read has been noted."""
    slab, at = page_aligned(150, 2048), 0
    with AioReader([file[0]], merging=NOTHING, aio=(aio := SpoiledAio(40, 512))) as reader:
        while True:
            at += 1
            slab[:], aio.spoiled, aio.block = 0, False, None
            pending = submit(reader, slab, APART)
            with Interrupt(at) as interrupt, suppress(KeyboardInterrupt):
                pending.wait()
            assert pending.wait().reads == 150 and aio.spoiled
            np.testing.assert_array_equal(slab, file[1][APART], err_msg=f"after an interrupt at step {at}")
            if interrupt.count < at:
                break
    assert at > 100


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a file's __del__
def test_an_interrupt_while_it_is_closed_or_forgotten(file):
    before = contexts()
    for at in range(1, 3000, 67):
        reader, slab = AioReader([file[0]], threads=1, merging=NOTHING), page_aligned(300, 2048)
        submit(reader, slab)
        with Interrupt(at) as interrupt, suppress(KeyboardInterrupt):
            reader.close()
        del reader
        gc.collect()
        slab[:] = 0xA5
        assert contexts() == before
        if interrupt.count < at:
            break
    assert 50 < at < 2900


def read_under_signals(path, seconds, raising):
    """(signals, wrong replies): one reader, signals at random moments."""
    signals = wrong = 0

    def handle(*_):
        nonlocal signals
        signals += 1
        if raising:
            raise KeyboardInterrupt

    file, bundles = LayerFile(Path(path), WIDE), None
    slab, rng = page_aligned(300, 16384), random.Random(1)
    reader = AioReader([file], merging=NOTHING, depth=100)
    submit(reader, slab).wait()
    bundles = slab.copy()
    signal.signal(signal.SIGALRM, handle)
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0 or signals <= 5 and left > -10 * seconds:  # a busy machine is slow
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0003, 0.02), 0 if raising else 0.001)
        try:
            slab[:] = 0
            submit(reader, slab).wait()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            reader.drain()
            slab[:] = 0xA5
            submit(reader, page_aligned(300, 16384)).wait()
            wrong += not (slab == 0xA5).all()
        else:
            wrong += not np.array_equal(slab, bundles)
    signal.setitimer(signal.ITIMER_REAL, 0)
    submit(reader, slab)  # and ends with reads in flight
    return signals, wrong


@pytest.mark.parametrize("raising", [True, False])
def test_signals_at_random_moments(wide, raising):
    """In a process of its own: one that hangs can be ended."""
    code = (
        "import sys; from tests.engine.storage.test_aio_interrupts import *\n"
        f"print(*read_under_signals(sys.argv[1], 1.5, {raising}))"
    )
    command = [sys.executable, "-c", code, str(wide[0].path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    signals, wrong = map(int, done.stdout.split())
    assert signals > 5 and wrong == 0


def test_a_forked_child_is_told(wide):
    """Its parent's context is not there. The child reports by its exit status."""
    code = """
import os, sys
from tests.engine.storage.test_aio_interrupts import *
reader, slab = AioReader([LayerFile(Path(sys.argv[1]), WIDE)], merging=NOTHING, depth=50), page_aligned(300, 16384)
submit(reader, slab).wait()
whole = slab.copy()
under_way = submit(reader, slab)
child = os.fork()
if not child:
    told = 0
    for pending in (under_way, submit(reader, slab)):
        assert pending.ended()
        try:
            pending.wait()
        except ReadError as error:
            told += "forked" in str(error)
    reader.drain()
    reader.close()
    del reader, pending, under_way
    gc.collect()
    os._exit(told)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
slab[:] = 0
print(status, under_way.wait().reads, submit(reader, slab).wait().reads, np.array_equal(slab, whole))
"""
    command = [sys.executable, "-c", code, str(wide[0].path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["2", "1200", "1200", "True"], done.stderr
