"""Ctrl-C is noted where it must not be raised, and raised at the end."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest

from mlx_flash.engine.system.interrupts import held_interrupts


def test_an_interrupt_is_raised_at_the_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_interrupts(), held_interrupts():
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_happens_and_errors_pass() -> None:
    with held_interrupts():
        pass
    with pytest.raises(ValueError), held_interrupts():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_hold_nothing() -> None:
    def run() -> None:
        with held_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_an_interrupt_while_a_kernel_is_compiled_comes_after_it() -> None:
    pytest.importorskip("numba")
    from mlx_flash.engine.numerics.compile_cache import compiled

    def twice(x):  # type: ignore[no-untyped-def]
        return 2 * x

    kernel = compiled(twice)
    inner = kernel.targetdescr.typing_context.refresh

    def interrupt() -> None:
        kernel.targetdescr.typing_context.refresh = inner
        signal.raise_signal(signal.SIGINT)
        inner()

    kernel.targetdescr.typing_context.refresh = interrupt
    with pytest.raises(KeyboardInterrupt):
        kernel(np.float32(2))
    assert kernel.signatures and kernel(np.float32(2)) == 4
