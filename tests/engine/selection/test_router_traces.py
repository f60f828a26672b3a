"""What experts run with by default, on the choices that two large models made in a real run: fewer misses than LRU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_flash.engine.residency.expert_staging import ExpertStaging
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.staging import BlockStream
from mlx_flash.engine.residency.window import LRU
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.bundle import Layout, Part
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.storage.readers import MemoryReader
from mlx_flash.stats import Stats
from mlx_flash.tools.simulation import least_misses, policy_misses
from mlx_flash.tools.trace import Trace, read_route_csv
from tests.conftest import shared_path


def router_misses(trace: Trace, layer: int, slots: int) -> int:
    """Of the selector that a mixture runs with: the prompt in one chunk, then its decoded tokens."""
    count = trace.counts[layer]
    layout = Layout((Part("x", "uint8", 1),), count)
    shared = SharedContext(None, MemoryReader([(layout, np.zeros((count, 512), np.uint8))]), BlockStream([]), Stats())

    def slab(rows: int) -> SimpleNamespace:
        return SimpleNamespace(targets=(Target(0, np.zeros((rows, 1), np.uint8)),))

    selector = RouterSelector(0, shared, Residency(count, slots), slab(slots), ExpertStaging(slab(12), 12))
    tokens = trace.ids[layer]
    prompt = [ids for ids in tokens[: trace.prompt] if len(ids)]  # the last layer saw the prompt's last token only
    for chosen, decoding in [(np.stack(prompt), False)] + [(ids[None], True) for ids in tokens[trace.prompt :]]:
        for _ in selector.groups(chosen, decoding):
            pass
    return shared.stats.misses


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_fewer_misses_than_lru_at_a_quarter_and_a_half(name: str) -> None:
    trace = read_route_csv(shared_path(f"data/traces/{name}.route.csv"))
    for share in (0.25, 0.5):
        ours = lru = least = 0
        for layer in range(0, len(trace.counts), 3):
            slots, tokens = int(share * trace.counts[layer]), trace.ids[layer]
            ours += router_misses(trace, layer, slots)
            lru += int(policy_misses(tokens, trace.counts[layer], slots, LRU)[trace.prompt :].sum())
            least += int(least_misses(tokens, trace.counts[layer], slots)[trace.prompt :].sum())
        print(name, share, ours, lru, least)
        assert least <= ours < lru, f"{name}, slots for {share}: {ours} misses, LRU {lru}, Belady {least}"
