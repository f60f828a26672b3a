"""Tasks of a prompt's products: each is run once, and an error ends them all."""

from __future__ import annotations

import threading
import time

import pytest

from mlx_flash.engine.backends.numpy.tiles import Scratch, Tiles


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tiles_do_every_task_once_and_give_up_their_memory_after_an_error(threads: int) -> None:
    tiles = Tiles()
    tiles.threads = threads
    done: list[int] = []
    tiles.each(40, lambda scratch, k: done.append(k))
    assert sorted(done) == list(range(40))
    before = tiles.scratch
    here = threading.get_ident()

    def interrupted(scratch: Scratch, k: int) -> None:
        if threading.get_ident() == here:
            raise KeyboardInterrupt
        time.sleep(0.001)  # so that the caller gets a task, too

    with pytest.raises(KeyboardInterrupt):
        tiles.each(40, interrupted)
    assert tiles.scratch is not before and not tiles._others, "a thread may still write to it"

    def fails(scratch: Scratch, k: int) -> None:
        time.sleep(0.001)  # so that every thread gets one
        raise ValueError(str(k))

    with pytest.raises(ValueError):
        tiles.each(40, fails)
    tiles.each(3, lambda scratch, k: done.append(k))
    assert done[40:] and sorted(done[40:]) == [0, 1, 2]
