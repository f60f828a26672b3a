"""Measures this machine's memory, the numpy backend's kernels, and the time of a layer beside its weights.

All weights come from memory far larger than the processor's caches, in calls about as large as those of a layer of a
3B model. Writes no files but a tiny model.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from mlx_flash.engine.backends.base import FFNSpec
from mlx_flash.engine.backends.numpy.backend import DTYPES, NumpyBackend
from mlx_flash.engine.storage.bundle import ITEM_BYTES, Layout, Part
from mlx_flash.engine.system.cores import default_threads
from mlx_flash.models.conversion.converter import convert
from mlx_flash.runtime.loading import load
from mlx_flash.runtime.planning.selective_persistence import cgroup_limit
from mlx_flash.tools.random_model import make_random

MEMORY_BYTES, LEAST_BYTES = 1 << 30, 1 << 26  # a server's processor may have half a GB of cache
PART_BYTES = 6 << 10  # of a bundle of 18 KiB
DIM = 3072
SELECTED = 1200  # bundles in a call: a tenth of a layer's
RANK = 256
PROMPT_TOKENS = 256
LAYERS, TOKENS = 16, 200
IDLE = 0.8  # share of its threads' time in which a program runs, at least, on a quiet machine
Work = Callable[[], float]  # does some, returns how much (bytes, operations)


class Clock(Protocol):
    """The module `time`, or a fake one."""

    def perf_counter(self) -> float: ...

    def process_time(self) -> float: ...


def big_memory() -> np.ndarray:
    """(n,) uint16 whose items are ordinary numbers as bf16, as fp16, and in pairs as fp32. 1 GiB, or a quarter of
    the memory that is free or that a control group allows, if that is less."""
    limit = cgroup_limit()
    room = min([psutil.virtual_memory().available] + ([limit] if limit else [])) // 4
    items = max(LEAST_BYTES, min(MEMORY_BYTES, room)) // 2
    memory = np.empty(items, np.uint16)
    piece = np.random.default_rng(0).integers(0x3C00, 0x4000, 1 << 22, np.uint16)
    for begin in range(0, items, len(piece)):
        memory[begin : begin + len(piece)] = piece[: items - begin]
    return memory


def _summing() -> Callable[[np.ndarray], Any]:
    """A sum that releases the interpreter's lock. It is not one of the project's kernels, as they are compared with
    it."""
    try:
        import numba
    except ImportError:
        return np.sum

    @numba.njit(nogil=True)
    def total(array):  # type: ignore[no-untyped-def]
        found = 0
        for i in range(len(array)):
            found += array[i]
        return found

    total(np.zeros(1, np.int64))
    compiled: Callable[[np.ndarray], Any] = total
    return compiled


def memory_work(memory: np.ndarray) -> Work:
    """Reads all of the memory with as many threads as the kernels use."""
    total, threads = _summing(), default_threads()
    numbers = memory[: len(memory) // 4 * 4].view(np.int64)
    pieces = np.array_split(numbers, 8 * threads)

    def work() -> float:
        left = iter(pieces)

        def sums() -> None:
            with suppress(StopIteration):
                while True:
                    total(next(left))

        helpers = [threading.Thread(target=sums, daemon=True) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        sums()
        for helper in helpers:
            helper.join()
        return numbers.nbytes

    return work


def linear_work(backend: NumpyBackend, memory: np.ndarray, dtype: str, tokens: int = 1) -> Work:
    """Multiplies by one matrix (DIM, DIM) after the other; counts bytes for one token, operations for several."""
    items = memory.view(DTYPES[dtype])
    matrices = itertools.cycle(items[: items.size // DIM**2 * DIM**2].reshape(-1, DIM, DIM))
    x = np.random.default_rng(1).standard_normal((tokens, DIM), np.float32)

    def work() -> float:
        matrix = next(matrices)
        backend.linear(x, matrix)
        return matrix.nbytes if tokens == 1 else 2 * tokens * matrix.size

    return work


class _Slots:
    """Bundles that lie as in a slab, in memory that exists already."""

    def __init__(self, memory: np.ndarray, layout: Layout):
        raw = memory.view(np.uint8)
        rows = raw[: len(raw) // layout.stride * layout.stride].reshape(-1, layout.stride)
        at = {part.name: (layout.offset(part.name), part) for part in layout.parts}
        self.matrices: dict[str, Any] = {
            name: rows[:, b : b + part.nbytes].view(DTYPES[part.dtype]) for name, (b, part) in at.items()
        }


def rows_work(backend: NumpyBackend, memory: np.ndarray, dtype: str) -> Work:
    """Computes a gated FFN over SELECTED bundles in slots, different ones in each call."""
    width = PART_BYTES // ITEM_BYTES[dtype]
    layout = Layout(
        tuple(Part(name, dtype, width) for name in ("gate", "up", "down")), memory.nbytes // 3 // PART_BYTES
    )
    spec, slots, rng = FFNSpec(layout, "silu", True), _Slots(memory, layout), np.random.default_rng(2)
    x = rng.standard_normal((1, width), np.float32)
    order = rng.permutation(layout.count)
    chosen = itertools.cycle(np.array_split(order, max(1, layout.count // SELECTED)))
    ids = np.arange(layout.count)

    def work() -> float:
        rows = next(chosen)
        step = backend.ffn(spec, x)
        step.scalars(ids[: len(rows)], slots, rows)
        step.down()
        return len(rows) * layout.bundle_bytes

    return work


def predictor_work(backend: NumpyBackend, memory: np.ndarray) -> Work:
    """Computes one layer's predictor after the other: DIM -> RANK -> 4 DIM."""
    numbers, count = memory.view(np.int8), 4 * DIM
    size = RANK * (DIM + count)
    step, bias = 0.01, np.zeros(count, np.float32)
    found = []
    for begin in range(0, len(numbers) - size + 1, size):
        a = numbers[begin : begin + RANK * DIM].reshape(RANK, DIM)
        b = numbers[begin + RANK * DIM : begin + size].reshape(count, RANK)
        found.append(backend.predictor(a, b, step, bias))
    predictors = itertools.cycle(found)
    x = np.random.default_rng(3).standard_normal((1, DIM), np.float32)

    def work() -> float:
        next(predictors)(x)()
        return size

    return work


def measure_works(works: Mapping[str, Work], seconds: float, rounds: int) -> dict[str, float]:
    """Amounts per second: medians of rounds in which all take turns; `seconds` in all."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # compiles
    each = seconds / rounds / len(works)
    for _ in range(rounds):
        for name, work in works.items():
            begin, done = time.perf_counter(), 0.0
            while not done or time.perf_counter() - begin < each:
                done += work()
            found[name].append(done / (time.perf_counter() - begin))
    return {name: statistics.median(rates) for name, rates in found.items()}


class Busy:
    """Work of `threads` threads, which measures how much processor time they got."""

    def __init__(self, work: Work, threads: int, clock: Clock = time):
        self.work, self.threads, self.clock = work, threads, clock
        self.wall_s = self.cpu_s = 0.0

    def __call__(self) -> float:
        cpu, begin = self.clock.process_time(), self.clock.perf_counter()
        done = self.work()
        self.wall_s += self.clock.perf_counter() - begin
        self.cpu_s += self.clock.process_time() - cpu
        return done

    def tell(self, announce: Callable[[str], None]) -> None:
        share = self.cpu_s / (self.wall_s * self.threads)
        if share < IDLE:
            announce(
                f"the probe had only {100 * share:.0f} % of {self.threads} processors: other programs are busy, so its "
                "figures are too low; probe again when the machine is quiet"
            )


def kernel_rates(seconds: float, rounds: int, announce: Callable[[str], None]) -> dict[str, float]:
    """Rates by the names of Machine.kernels, and "memory" and "matmul"; `announce` is called when they cannot be
    trusted."""
    memory, backend = big_memory(), NumpyBackend()
    reading = Busy(memory_work(memory), default_threads())
    works: dict[str, Work] = {"memory": reading}
    works |= {f"linear.{dtype}": linear_work(backend, memory, dtype) for dtype in DTYPES}
    works |= {f"rows.{dtype}": rows_work(backend, memory, dtype) for dtype in DTYPES}
    works["predictor.int8"] = predictor_work(backend, memory)
    works["matmul"] = linear_work(backend, memory, "bfloat16", PROMPT_TOKENS)
    found = measure_works(works, seconds, rounds)
    reading.tell(announce)
    return found


def layer_seconds(folder: Path, seconds: float, rounds: int) -> dict[str, float]:
    """Seconds per layer and token of a model so small that its weights take no time, by the names of
    Machine.layer_s. Writes a few MB into `folder`, an empty one that the caller removes."""
    card = folder / "card"
    card.mkdir()
    shape = dict(hidden_size=64, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
    config = dict(shape, model_type="llama", hidden_act="relu", num_hidden_layers=LAYERS, rms_norm_eps=1e-5)
    (card / "config.json").write_text(json.dumps(config), encoding="utf-8")
    flash = convert(make_random(card, folder / "weights"), folder / "flash")
    models: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    try:
        for name, select in (("all", "all"), ("selected", "gate")):
            models[name], _ = load(flash, backend="numpy", select=select, memory="100MB")
            times[name] = []
        for _ in range(rounds):
            for name, model in models.items():
                times[name] += _token_seconds(model, seconds / rounds / len(models))
    finally:
        for model in models.values():
            model.flash.close()
    return {name: statistics.median(found) / LAYERS for name, found in times.items()}


def _token_seconds(model: Any, seconds: float) -> list[float]:
    """Seconds of each token decoded in about that time, after a short prompt and a first token."""
    steps = model.flash.forced(model, [1, 2, 3], itertools.repeat(4, TOKENS))
    next(steps), next(steps)
    found: list[float] = []
    begin = at = time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        found.append(now - at)
        at = now
        if now - begin > seconds:
            break
    return found
