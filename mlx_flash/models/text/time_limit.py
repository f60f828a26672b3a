"""A limit on the time of a call. A chat template is code that came with the model and can loop for hours."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call()`, which runs in a thread of its own; what it raises is raised here.

    Raises TimeoutError after `seconds`, and ends the call at its next Python instruction: a single long call into
    compiled code is left running in a daemon thread.
    """
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="call within a time limit")
    thread.start()
    try:
        thread.join(seconds)
    finally:  # an interrupt ends the call too
        if thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError)
            )
    if thread.is_alive() or (failure and type(failure[0]) is TimeoutError):
        raise TimeoutError(f"no result within {seconds:g} s")
    if failure:
        raise failure[0]
    return result[0]
