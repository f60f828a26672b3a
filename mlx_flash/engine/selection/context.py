"""What the selectors of one model share: backend, reader, staging, counters, and the state of the current reply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from mlx_flash.engine.backends.base import Backend, Slab
from mlx_flash.engine.residency.staging import BlockRequest, BlockStream
from mlx_flash.engine.storage.reader import CountedReader, Pending, Reader
from mlx_flash.stats import Stats


class Interruptible(Protocol):
    """One layer's slots."""

    def forget(self) -> None:
        """A call was cut short, by a failed read or an interrupt: trust no slot whose bytes may be in doubt."""


class Selector(Interruptible, Protocol):
    """One layer's FFN: a callable from the normed hidden state x (..., T, d) to the FFN's output, shaped as x."""

    exact: bool  # its output is that of the whole FFN

    def __call__(self, x: Any) -> Any: ...


class SharedContext:
    """What the layers of one model have in common: one source of bundles, one ring of staging slabs, one set of
    counters.

    unfinished: the selector whose call is under way, or was cut short.
    decoding: whether the current tokens are decoded ones, not a prompt's; None: unknown, as when mlx-lm's own loop runs
    the model. A single token then counts as decoded.
    reply: how many replies have begun.
    """

    def __init__(self, backend: Backend, reader: Reader, stream: BlockStream, stats: Stats):
        self.backend, self.stream, self.stats = backend, stream, stats
        self.source = CountedReader(reader, stats)
        self.unfinished: Interruptible | None = None
        self.decoding: bool | None = None
        self.reply = 0
        self._scalars = np.empty(0, np.float32)

    @property
    def reader(self) -> Reader:
        """Reads the bundles of all layers."""
        return self.source.reader

    @reader.setter
    def reader(self, reader: Reader) -> None:
        self.source.reader = reader

    @contextmanager
    def phase(self, decoding: bool) -> Iterator[None]:
        """Within, the model runs decoded tokens, or a prompt's, which are exact with every selector."""
        self.decoding = decoding
        try:
            yield
        finally:
            self.decoding = None

    def begin_reply(self) -> None:
        """Another prompt follows: what was selected for the last one does not count for it."""
        self.reply += 1

    def is_decode(self, x: Any) -> bool:
        """Whether a lossy selector may select for x (..., T, d); a prompt's tokens are computed exactly."""
        return x.shape[-2] == 1 if self.decoding is None else self.decoding

    def prompt_scalars(self, items: int) -> np.ndarray:
        """Memory for a block's scalars (items,) fp32, used by one block after the other."""
        if self._scalars.size < items:
            self._scalars = np.empty(items, np.float32)
        return self._scalars[:items]

    def begin(self, selector: Interruptible) -> None:
        """Before a call: clean up after one that raised. Here, not in an `except`, which a second Ctrl-C would cut
        short; the same interrupt can hit here, and the next call begins again."""
        if self.unfinished is not None:
            self.reader.drain()  # first: what is still being read must not land in memory that is given anew
            self.stream.stop()
            self.unfinished.forget()
            self.reply += 1  # what the layers before it saw of that reply does not count for the next one
        self.unfinished = selector

    def end(self) -> None:
        """The call that `begin` began has succeeded."""
        self.unfinished = None

    def fetch(self, request: BlockRequest, slab: Slab) -> Pending:
        """Begin to fill a staging slab: row k gets bundle ids[k]."""
        return self.source.read(request.layer, request.ids, np.arange(len(request.ids)), slab.targets)


def blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """(first id, length) of the fixed blocks of `size` ids from `first` (a multiple of it) to `last`."""
    for begin in range(first, last, size):
        yield begin, min(size, last - begin)


def is_decode(x: Any) -> bool:
    """One new token per sequence: x is (..., 1, d)."""
    return x.shape[-2] == 1
