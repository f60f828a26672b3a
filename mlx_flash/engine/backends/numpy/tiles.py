"""A prompt's matrix products: cut into tiles of fixed shapes, which a few threads share, each with one BLAS thread.

BLAS's own threads wait for each other within every product, which takes many times longer when another process uses a
core, and their number changes the sums. Tiles avoid both. Knows arrays only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from threadpoolctl import ThreadpoolController

from mlx_flash.engine.backends.numpy.kernels.base import Weights, widen
from mlx_flash.engine.system.cores import default_threads


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

    def wide(self, w: Weights) -> np.ndarray:
        """Weights of any storage dtype as fp32: themselves, or in memory that the next call uses again."""
        if isinstance(w, np.ndarray) and w.dtype == np.float32:
            return w
        out = self.get("wide", w.shape)
        widen(w, out)
        return out


Task = Callable[[Scratch, int], None]


class Tiles:
    """Runs tasks on `threads` threads, the calling one among them. Each has a scratch memory of its own."""

    def __init__(self) -> None:
        self.threads = default_threads()
        self.scratch = Scratch()  # the calling thread's, and what outlives a task
        self._others: list[Scratch] = []
        self._blas: ThreadpoolController | None = None

    @contextmanager
    def products(self) -> Iterator[None]:
        """Within, a product of matrices runs on the thread that asks for it, and on no other."""
        if self._blas is None:
            self._blas = ThreadpoolController()  # looks through the process's libraries: once
        with self._blas.limit(limits=1, user_api="blas"):
            yield

    def each(self, count: int, task: Task) -> None:
        """Run `task(scratch, k)` for k in 0..count-1, in any order. A task's error is raised when all have ended."""
        numbers = iter(range(count))  # shared: each thread takes the next number

        def work(scratch: Scratch) -> None:
            for k in numbers:
                task(scratch, k)

        # Not a pool of futures: an interrupt while these are waited for can leave a lock of theirs taken for ever.
        errors: list[BaseException] = []
        threads = [self._thread(work, number, errors) for number in range(min(self.threads, count) - 1)]
        try:
            for thread in threads:
                thread.start()
            work(self.scratch)
            for thread in threads:
                thread.join()
        except BaseException:
            for _ in numbers:  # nothing more is begun
                pass
            # A thread may be within its last task: what it writes to must not be used again.
            self.scratch, self._others = Scratch(), []
            raise
        if errors:
            raise errors[0]

    def _thread(self, work: Callable[[Scratch], None], number: int, errors: list[BaseException]) -> threading.Thread:
        if number == len(self._others):
            self._others.append(Scratch())
        scratch = self._others[number]

        def run() -> None:
            try:
                work(scratch)
            except BaseException as error:  # raised where the products were asked for
                errors.append(error)

        return threading.Thread(target=run, name=f"products-{number}", daemon=True)
