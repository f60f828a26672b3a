"""Matrix products of a prompt: cut into tiles of fixed shapes, each done by one thread of BLAS, shared by a few.

BLAS's own threads wait for each other within every product, which takes many times longer where another process holds
a core; and its sums depend on how many there are. Tiles do neither. Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
from threadpoolctl import ThreadpoolController

from .kernels import widen
from .workers import DEFAULT_THREADS, available_cores


class Scratch:
    """fp32 memory that is kept and reused, by name; it grows to the largest shape asked for."""

    def __init__(self) -> None:
        self._flat: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape, contents undefined."""
        items = int(np.prod(shape))
        if name not in self._flat or self._flat[name].size < items:
            self._flat.pop(name, None)  # free the old one first
            self._flat[name] = np.empty(items, np.float32)
        return self._flat[name][:items].reshape(shape)

    def wide(self, w: np.ndarray) -> np.ndarray:
        """Weights of any storage dtype as fp32: themselves, or in memory that the next call uses again."""
        if w.dtype == np.float32:
            return w
        out = self.get("wide", w.shape)
        widen(w, out)
        return out


Task = Callable[[Scratch, int], None]


class Tiles:
    """Runs tasks on `threads` threads, the calling one among them. Each has a scratch memory of its own."""

    def __init__(self) -> None:
        self.threads = min(available_cores(), DEFAULT_THREADS)
        self.scratch = Scratch()  # the calling thread's, and what outlives a task
        self._others: list[Scratch] = []
        self._pool: ThreadPoolExecutor | None = None
        self._blas: ThreadpoolController | None = None

    @contextmanager
    def products(self) -> Iterator[None]:
        """Within, a product of matrices runs on the thread that asks for it, and on no other."""
        if self._blas is None:
            self._blas = ThreadpoolController()  # looks through the process's libraries: once
        with self._blas.limit(limits=1, user_api="blas"):
            yield

    def each(self, count: int, task: Task) -> None:
        """`task(scratch, k)` for k in 0..count-1, in any order; what one raises is raised when all have ended."""
        numbers = iter(range(count))  # one for all: the next number goes to whoever asks first

        def work(scratch: Scratch) -> None:
            for k in numbers:
                task(scratch, k)

        others = self._start(work, min(self.threads, count) - 1)
        try:
            work(self.scratch)
        finally:
            for _ in numbers:  # after an error or Ctrl-C: nothing more is begun
                pass
            wait(others)
        for other in others:
            other.result()

    def _start(self, work: Callable[[Scratch], None], count: int) -> list[Future[None]]:
        if count < 1:
            return []
        if self._pool is None or len(self._others) < count:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="products")
            self._others += [Scratch() for _ in range(count - len(self._others))]
        return [self._pool.submit(work, self._others[k]) for k in range(count)]
