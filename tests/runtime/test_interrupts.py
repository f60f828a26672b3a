"""Ctrl-C at any moment: the next replies of the same model have the logits of a fresh one, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.storage.pread_reader import PreadReader
from mlx_flash.engine.storage.readers import open_reader
from tests.runtime.plans import load_split
from tests.tiny import make_tiny

PROMPT, FORCED, LIMIT_S = [5, 6, 7, 8], [30, 90, 17, 250], 60
CAPACITIES = {"all": (0, 256, 512), "gate": (20, 100, 200)}  # of 64, 288 and 672 bundles; `all` keeps whole blocks

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts")
    return mlx_flash.convert(make_tiny("openelm-relu", folder), folder / "flash")


def threads_only(files, executor=None, **options) -> PreadReader:
    return PreadReader(files, **options)


def load(path: Path, select: str, reader=open_reader):
    """Some bundles of each layer resident, and three staging slabs: a budget gives tiny models one or the other."""
    return load_split(path, CAPACITIES[select], 3, reader, backend="numpy", select=select)


def reply(model) -> bytes:
    """The logits of every step: a wrong one does not always change the token."""
    cache = model.make_cache()
    return b"".join(model(ids, cache).tobytes() for ids in (PROMPT, *([token] for token in FORCED)))


class Interrupting:
    """A pending read whose first `wait` is interrupted."""

    def __init__(self, pending):
        self.pending, self.interrupted = pending, False
        self.ended, self.give_up = pending.ended, pending.give_up

    def wait(self):
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return self.pending.wait()


class Slow:
    """Stands in for os.preadv: the first read after `arm` is slow to arrive."""

    def __init__(self, preadv):
        self.preadv, self.armed = preadv, False
        self.begun, self.landed = threading.Event(), threading.Event()
        self.landed.set()

    def arm(self) -> None:
        self.begun.clear()
        self.landed.clear()
        self.armed = True

    def __call__(self, *request) -> int:
        if not self.armed:
            return self.preadv(*request)
        self.armed = False
        self.begun.set()
        time.sleep(0.05)
        try:
            return self.preadv(*request)
        finally:
            self.landed.set()


class InterruptingReader:
    """Passes requests on. The `at`-th is interrupted: before it is handed over, after, or when it is waited for; and
    slow, where threads read, so that it still is under way when the next reply begins."""

    def __init__(self, inner, at: int, where: str, slow: Slow | None):
        self.inner, self.at, self.where, self.slow, self.submits = inner, at, where, slow, 0

    def submit(self, *request):
        self.submits += 1
        if self.submits != self.at:
            return self.inner.submit(*request)
        if self.where == "before":
            raise KeyboardInterrupt
        if self.slow is not None:
            self.slow.arm()
        pending = self.inner.submit(*request)
        if self.slow is not None:
            self.slow.begun.wait(1)
        if self.where == "after":
            raise KeyboardInterrupt
        return Interrupting(pending)

    def drain(self) -> None:
        self.inner.drain()

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("reader", [threads_only, open_reader])
@pytest.mark.parametrize("where", ["before", "after", "wait"])
@pytest.mark.parametrize("select", ["all", "gate"])
def test_interrupt_reads_from_the_first_until_a_run_passes(
    flash: Path, monkeypatch: pytest.MonkeyPatch, select: str, where: str, reader
) -> None:
    fresh = load(flash, select)
    wanted = reply(fresh)
    fresh.flash.close()
    slow = Slow(os.preadv) if reader is threads_only else None
    if slow is not None:
        monkeypatch.setattr(os, "preadv", slow)
    for at in chain(range(1, 9), range(9, 500, 7)):  # every seventh of the later ones, which are alike
        model = load(flash, select, reader)
        plain = model.flash.shared.reader
        model.flash.shared.reader = InterruptingReader(plain, at, where, slow)
        try:
            got = reply(model)
        except KeyboardInterrupt:
            model.flash.shared.reader = plain
            for _ in range(2):
                assert reply(model) == wanted, f"after an interrupt at read {at} the model gives other logits"
                assert slow is None or slow.landed.wait(5)
            continue
        finally:
            with suppress(KeyboardInterrupt):  # where a block was read ahead that no reply waited for
                model.flash.close()
            model.flash.close()
        assert got == wanted
        break
    else:
        pytest.fail("no run passed")
    assert at > 8, "the run made almost no reads: this tested nothing"


def interrupt_at_random(path: Path, select: str, seconds: float) -> tuple[int, int]:
    """(interrupts, wrong replies) of one model that is interrupted at random moments."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = load(path, select)
    wanted, begin, rng = reply(model), time.perf_counter(), random.Random(1)
    reply(model)
    length = time.perf_counter() - begin
    signal.signal(signal.SIGALRM, interrupt)
    interrupts = wrong = 0
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0 or (
        interrupts <= 5 and left > -10 * seconds
    ):  # a busy machine is slow
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, max(0.001, length)))
            reply(model)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupts += 1
        except RuntimeError as error:  # what Python makes of an interrupt while a thread starts
            if "release unlocked lock" not in str(error):
                raise
        wrong += reply(model) != wanted
    model.flash.close()
    return interrupts, wrong


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no setitimer")
@pytest.mark.parametrize("select", ["all", "gate"])
def test_interrupts_at_random_moments(flash: Path, select: str) -> None:
    """In a process of its own: one that hangs can be ended, whichever lock it waits for."""
    code = "import sys; from tests.runtime.test_interrupts import *; "
    code += "print(*interrupt_at_random(Path(sys.argv[1]), sys.argv[2], 1.5))"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(flash), select]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    interrupts, wrong = map(int, done.stdout.split())
    assert interrupts > 5 and wrong == 0


def test_helpers_have_let_go_when_an_interrupt_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may use a kernel's arrays again at once."""
    pytest.importorskip("numba")
    from mlx_flash.engine.backends.numpy.kernels import loops, thread_pool, thread_pool_loops

    crew, real, calls = thread_pool.Workers(), thread_pool_loops.finish, []
    crew.count = 2

    def interrupted(*arguments: int) -> bool:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(thread_pool_loops, "finish", interrupted)
    w, out = np.ones((400, 64), np.float32), np.zeros(400, np.float32)
    with pytest.raises(KeyboardInterrupt):
        crew.run(loops.dots, 20, 0, w, w.strides[0], 0, 400, w[0], 64, out)
    assert len(calls) > 1 and (out == 64).all()


def test_a_torn_record_of_the_slots_is_forgotten(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(flash, "gate")
    wanted = reply(model)

    def torn(residency: Residency, plan: SlotPlan, used: object = None) -> None:
        residency.slot_of[plan.ids[plan.loads]] = plan.slots[plan.loads]
        raise KeyboardInterrupt

    for layer in model.layers:
        layer.ffn.residency.reset()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Residency, "commit", torn)
        reply(model)
    for _ in range(2):
        assert reply(model) == wanted
    model.flash.close()
