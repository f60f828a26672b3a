"""Reading bundles with Linux's asynchronous I/O: a request takes a few system calls, and no Python per read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from mlx_flash.engine.system.executor import Executor
from mlx_flash.engine.system.linux_aio import LinuxAio

from .aio_requests import AioContext, AioRequest
from .extents import Source
from .pread_reader import OpenFile, PreadReader
from .read_plan import Merging, Pieces
from .reader import Pending, Target

DEPTH = 256


class AioReader(PreadReader):
    """Like PreadReader, but the kernel itself reads everything that may go around the page cache.

    depth: reads in flight; if it is more than the device takes, submitting waits for the device
    executor: its threads submit the first reads of a request while the caller goes on
    aio: the system calls, to be replaced in tests

    Raises OSError if the system has no asynchronous I/O, or no room for another context (fs.aio-max-nr).
    """

    def __init__(
        self,
        files: Sequence[Source],
        threads: int = 8,
        direct: bool = True,
        merging: Merging | None = None,
        depth: int = DEPTH,
        executor: Executor | None = None,
        aio: LinuxAio | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth {depth}: out of range")
        super().__init__(files, threads, direct, merging)
        self._context = AioContext(depth, aio or LinuxAio(), executor)
        self._close_context = weakref.finalize(self, self._context.close)

    def _begin(self, file: OpenFile, plan: Pieces, targets: Sequence[Target]) -> Pending:
        request = AioRequest(self._context, self._crew, file, plan, targets, self.scrap)
        request.begin()
        return request

    def drain(self) -> None:
        """See `Reader.drain`."""
        self._context.drain()
        super().drain()

    def close(self) -> None:
        """See `Reader.close`."""
        self._context.close()
        super().close()
