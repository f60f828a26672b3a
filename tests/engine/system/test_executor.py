"""Every executor against one set of promises."""

from __future__ import annotations

import os
import platform
import sys
import time

import pytest

from mlx_flash.engine.system.executor import Executor, InlineExecutor

GETPID = {"x86_64": 39, "aarch64": 172}.get(platform.machine())
needs_numbers = pytest.mark.skipif(
    sys.platform != "linux" or GETPID is None, reason="the call's number is not known here"
)


def check_executor(executor: Executor) -> None:
    """Calls give their results, again and again, on any thread; failures give -1."""
    assert GETPID is not None
    call, failing = executor.system_call(GETPID), executor.system_call(1_000_000)
    assert call.wait() == 0 and call.done(), "nothing was started"
    for _ in range(3):
        assert call.start(0, 0, 0) and call.wait() == call.wait() == os.getpid() and call.done()
        assert failing.start(0, 0, 0) and failing.wait() == -1
    assert call.start(0, 0, 0)
    end = time.monotonic() + 10
    while not call.done() and time.monotonic() < end:
        time.sleep(0.001)
    assert call.done() and call.wait() == os.getpid()


@needs_numbers
@pytest.mark.parametrize("deferred", [False, True])
def test_inline_executors_keep_the_promises(deferred: bool) -> None:
    check_executor(InlineExecutor(deferred))


@needs_numbers
def test_when_an_inline_executor_makes_the_call() -> None:
    made: list[int] = []
    for deferred in (False, True):
        executor = InlineExecutor(deferred)
        executor.syscall = lambda *arguments: made.append(arguments[0]) or 7  # type: ignore[func-returns-value]
        call = executor.system_call(5)
        made.clear()
        call.start(1, 2, 3)
        assert made == ([] if deferred else [5])
        assert call.wait() == call.wait() == 7 and made == [5]
