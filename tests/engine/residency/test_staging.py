"""Blocks that pass through staging, where layers' bundles are made differently: each layer gets slabs of its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.engine.residency.staging import BlockRequest, BlockStream
from mlx_flash.engine.storage.bundle import Layout, Part, Quantisation, bundle_kinds, with_codings
from mlx_flash.engine.storage.reader import Done


@dataclass(eq=False)
class Memory:
    kind: int
    place: int


def test_every_layer_gets_slabs_of_its_kind() -> None:
    kinds, places = [0, 2, 1, 0], 3
    rings = [[Memory(kind, place) for place in range(places)] for kind in range(3)]
    stream = BlockStream(rings[0], rings[1:], kinds)
    filling: list[tuple[int, Memory]] = []

    def fetch(request: BlockRequest, slab: Any) -> Done:
        assert slab.kind == kinds[request.layer]
        filling.append((request.layer, slab))
        assert len({each.place for _, each in filling}) == len(filling), "a place is used twice at once"
        return Done()

    for _ in range(2):  # also after it was stopped halfway
        filling.clear()
        wanted = [BlockRequest(layer, np.arange(2)) for _ in range(3) for layer in range(4)]
        stream.start(wanted, fetch)
        for step, request in enumerate(wanted[:7]):
            assert stream.next_is(request.layer, 0) and len(filling) == places, step
            found, slab = stream.take()
            assert found is request and slab.kind == kinds[request.layer] and filling.pop(0) == (request.layer, slab)
            stream.release(slab)
        stream.stop()


def test_layers_are_of_one_kind_whatever_their_size() -> None:
    def layout(count: int, bits: int) -> Layout:
        plain = Layout(tuple(Part(name, "float32", 64) for name in ("gate", "up", "down")), count)
        return with_codings(plain, [Quantisation(4, 64), None, Quantisation(bits, 64)], 64)

    layouts = [layout(128, 4), layout(64, 6), layout(256, 4), layout(128, 6)]
    kinds, firsts = bundle_kinds(layouts)
    assert kinds == [0, 1, 0, 1] and firsts == layouts[:2]
