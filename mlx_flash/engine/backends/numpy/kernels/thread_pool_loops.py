"""The compiled half of `thread_pool`: jobs on a board in shared memory, and the loops that take tasks from them.

A job's place on the board is used again and again, and helpers look at it at any time. So a thread reads a job's kernel
and arguments only when it holds a ticket, and tickets are given out only when all else has been written; the caller
returns only when the task of every ticket is done. Importing compiles nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mlx_flash.engine.numerics.compile_cache import built_on, cached, compiled

from . import vector_code
from .vector_code import fetch_add

# A job's place, in items of 8 bytes: tickets left and tasks done, each in a cache line of its own as all threads write
# to them; then the kernel's address, the number of tasks and the kernel's arguments.
JOBS, JOB_ITEMS, DONE, PARAMETERS = 16, 64, 8, 16
STEP_ITEMS = 32  # of one call in `Steps`: kernel, tasks and arguments
# A helper's place: whether it sleeps, the two ends of the pipe that it sleeps on, room for the byte that wakes it,
# whether it is to end.
HELPER_ITEMS, END = 8, 4
ITEM = 8  # bytes
PATIENCE = 20000  # times that `finish` looks whether the others are done: about 100 microseconds
# Times that a helper looks for the next job before it sleeps, about 600 microseconds in all: waking it takes 50 to 300.
# After the first ALONE looks it yields the core before each look.
VIGIL, ALONE = 1500, 300


BUILT_ON = built_on(vector_code.__file__, __file__)
_INT = ir.IntType(64)


def jit(function: Any) -> Any:
    """`compiled`, whose cache on disk is also renewed when this file or `vector_code` changes."""
    function.__qualname__ += f"-{BUILT_ON}"
    return compiled(function)


def task_kernel(function: Any) -> Any:
    """Mark a function as a kernel: `kernel(p, task)` does one task. At address p are the number of tasks and the call's
    arguments, all int64. Compiled when first used."""
    function.__qualname__ += f"-{BUILT_ON}"
    return function


@cache
def address_of(kernel: Any) -> int:
    """The address of a kernel's machine code."""

    def make(**options: Any) -> Any:
        return numba.cfunc(types.void(types.int64, types.int64), **options)

    made = cached(make, kernel)
    _alive.append(made)
    return int(made.address)


_alive: list[Any] = []


def _pointer_to(item: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(item)(types.int64), generate

    return pointer


_floats_at, _integers_at = _pointer_to(types.float32), _pointer_to(types.int64)


@jit
def floats(address, n):  # type: ignore[no-untyped-def]
    """The n fp32 at an address."""
    return numba.carray(_floats_at(address), n)


@jit
def integers(address, n):  # type: ignore[no-untyped-def]
    """The n int64 at an address."""
    return numba.carray(_integers_at(address), n)


@intrinsic
def _load(typing: Any, address: Any) -> Any:
    """The int64 at an address that other threads write to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _INT.as_pointer()), "seq_cst", ITEM)

    return types.int64(types.int64), generate


@intrinsic
def _exchange(typing: Any, address: Any, value: Any) -> Any:
    """Write the int64 at an address; returns the old value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], _INT.as_pointer())
        return builder.atomic_rmw("xchg", at, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _call(typing: Any, kernel: Any, parameters: Any, task: Any) -> Any:
    """Call the kernel at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kernel, *rest = arguments
        kind = ir.FunctionType(ir.VoidType(), [_INT, _INT])
        builder.call(builder.inttoptr(kernel, kind.as_pointer()), rest)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _system_call(name: str) -> Any:
    """The C library's `name(file, address, count)`: "read" or "write"."""

    @intrinsic
    def call(typing: Any, file: Any, address: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            file, address, count = arguments
            int32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_INT, [int32, pointer, _INT]), name
            )
            return builder.call(function, [builder.trunc(file, int32), builder.inttoptr(address, pointer), count])

        return types.int64(types.int64, types.int64, types.int64), generate

    return call


_read, _write = _system_call("read"), _system_call("write")


@intrinsic
def _give_way(typing: Any) -> Any:
    """Yield the core to another thread that waits for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _by_number(typing: Any, number: Any, a: Any, b: Any, c: Any) -> Any:
    """The C library's `syscall` with three arguments."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_INT, [_INT], var_arg=True)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "syscall"), arguments)

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@jit
def _take(job):  # type: ignore[no-untyped-def]
    """Do one task of the job at this place; returns whether there was one."""
    ticket = fetch_add(job, -1) if _load(job) > 0 else 0
    if ticket <= 0:
        return False
    kernel, tasks = integers(job + PARAMETERS * ITEM, 2)[0], integers(job + PARAMETERS * ITEM, 2)[1]
    _call(kernel, job + (PARAMETERS + 1) * ITEM, tasks - ticket)
    fetch_add(job + DONE * ITEM, 1)
    return True


@jit
def wait_for_tasks(parameters, count):  # type: ignore[no-untyped-def]
    """Within a task: return when `count` of the job's tasks are done. They were taken earlier, so all are under way."""
    while _load(parameters - (PARAMETERS + 1 - DONE) * ITEM) < count:
        pass


@jit
def begin(job, tasks, helpers, count):  # type: ignore[no-untyped-def]
    """Give out the tickets, and wake those of the first `count` helpers that sleep."""
    _exchange(job + DONE * ITEM, 0)
    _exchange(job, tasks)
    for i in range(count):
        place = helpers + i * HELPER_ITEMS * ITEM
        if _load(place) and _exchange(place, 0):
            _write(integers(place, 3)[2], place, 1)  # any byte


@jit
def finish(job, tasks):  # type: ignore[no-untyped-def]
    """Do tasks until none is left, then wait a while for the others; returns whether all tasks are done."""
    while _take(job):
        pass
    asked = 0
    while _load(job + DONE * ITEM) < tasks and asked < PATIENCE:
        asked += 1
    return asked < PATIENCE


@jit
def run_steps(job, steps, count, helpers, awake):  # type: ignore[no-untyped-def]
    """Do `count` calls one after the other at this place. Each takes STEP_ITEMS: its kernel, the number of its tasks
    and its arguments."""
    place = integers(job + PARAMETERS * ITEM, STEP_ITEMS)
    for k in range(count):
        at = steps + k * STEP_ITEMS * ITEM
        step = integers(at, STEP_ITEMS)
        if step[1] == 1:
            _call(step[0], at + ITEM, 0)
            continue
        place[:] = step
        begin(job, step[1], helpers, awake)
        while not finish(job, step[1]):
            _give_way()


@jit
def serve(board, place):  # type: ignore[no-untyped-def]
    """What a helper thread runs: do tasks of the board's jobs, sleep when there are none, until told to end."""
    idle = 0
    while not _load(place + END * ITEM):
        found = False
        for i in range(JOBS):
            while _take(board + i * JOB_ITEMS * ITEM):
                found = True
                _take(board)  # the first place is for urgent jobs
        if found:
            if idle > VIGIL:
                _exchange(place, 0)
            idle = 0
        elif idle < VIGIL:
            if idle >= ALONE:
                _give_way()
            idle += 1
        elif idle == VIGIL:
            _exchange(place, 1)  # and look once more: a job may have begun before the caller could see this
            idle += 1
        else:
            _read(integers(place, 3)[1], place + 3 * ITEM, ITEM)
            _exchange(place, 0)
            idle = 0


@task_kernel
def system_call(p, task):  # type: ignore[no-untyped-def]
    """Make a system call. Arguments: its number, its three arguments, the address for its result, -1 if it fails."""
    v = integers(p, 6)
    integers(v[5], 1)[0] = _by_number(v[1], v[2], v[3], v[4])
