"""The settings of the reads with which a measured machine should run a model fastest. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from mlx_flash.config import LONGEST_GAP, format_bytes
from mlx_flash.engine.storage.aio_reader import DEPTH
from mlx_flash.runtime.machine import Machine

from .cost_model import PIECE, CostModel
from .demand import Demand
from .tuning import Tuning, default_tuning

STAGING = (1, 2, 3, 4, 6, 8, 12, 16)
SAME_RATE, SAME_TIME = 0.97, 1.01  # closer than a probe tells apart
# Buffered reads must win clearly: what a page cache costs under a memory limit no probe on a quiet machine sees.
CLEARLY, NEARLY = 1.1, 0.9
PAYS = 0.98  # look-ahead, of the time without


def choose_tuning(machine: Machine, demand: Demand, given: Mapping[str, Any] | None = None) -> Tuning:
    """The settings with which this machine should run this model fastest; those given stay as they are."""
    tuning = default_tuning(given or {})
    # In this order: each choice is made with those before it.
    choices: tuple[tuple[str, Callable[[Machine, Demand, Tuning], tuple[Any, str]]], ...] = (
        ("direct", _choose_direct),
        ("staging_blocks", _choose_staging),
        ("reads_in_flight", _choose_depth),
        ("merge_gap", _choose_gap),
        ("look_ahead", _choose_look_ahead),
    )
    for name, choose in choices:
        if name not in tuning.why:
            value, reason = choose(machine, demand, tuning)
            tuning = replace(tuning, **{name: value}, why={**tuning.why, name: f"measured: {reason}"})
    return tuning


def _kind(demand: Demand) -> tuple[int, bool]:
    """Bytes of most reads, and whether they are scattered."""
    if demand.selector == "all":
        return min(demand.block * demand.stride, PIECE), False
    return demand.read_bytes, True


def _depths(machine: Machine, nbytes: int, scattered: bool, direct: bool, share: float = SAME_RATE) -> list[int]:
    """The measured numbers of reads in flight that reach at least this share of the best rate."""
    alike = [read for read in machine.reads if read.scattered == scattered]
    known = sorted({read.depth for read in alike if read.direct == direct} or {read.depth for read in alike})
    rates = [machine.read_rate(nbytes, depth, scattered, direct) for depth in known]
    return [depth for depth, rate in zip(known, rates, strict=True) if rate >= share * max(rates)]


def _read_s(machine: Machine, nbytes: int, depth: float, scattered: bool, direct: bool) -> float:
    """Seconds of one more read, including processor time, which on few cores is taken from computing."""
    disk = nbytes / machine.read_rate(nbytes, depth, scattered, direct)
    return disk + machine.read_cpu_s(nbytes, depth, scattered, direct)


def _choose_direct(machine: Machine, demand: Demand, tuning: Tuning) -> tuple[bool, str]:
    nbytes, scattered = _kind(demand)
    if not (machine.measured(scattered, True) and machine.measured(scattered, False)):
        return True, "nothing to compare with"
    costs = {}
    for direct in (True, False):
        depth = _depths(machine, nbytes, scattered, direct)[0]
        costs[direct] = _read_s(machine, nbytes, depth, scattered, direct) * 1e6
    chosen = costs[True] <= CLEARLY * costs[False]
    return chosen, f"a read costs {costs[True]:.0f} us, through the page cache {costs[False]:.0f} us"


def _choose_staging(machine: Machine, demand: Demand, tuning: Tuning) -> tuple[int, str]:
    decoding = demand.selector == "all"
    if decoding and demand.all_resident:
        return 1, "nothing streams"

    def seconds(blocks: int) -> float:
        model = CostModel(machine, demand, tuning, blocks)
        return model.decode_all().total_s if decoding else model.prompt_s(cold=True)

    best = seconds(STAGING[-1])
    chosen = next(blocks for blocks in STAGING if seconds(blocks) <= SAME_TIME * best)
    return chosen, f"more would not make {'decoding' if decoding else 'a prompt'} faster"


def _choose_depth(machine: Machine, demand: Demand, tuning: Tuning) -> tuple[int, str]:
    nbytes, scattered = _kind(demand)
    blocks = tuning.staging_blocks * ceil(demand.block * demand.stride / PIECE)
    wanted = min(DEPTH, max(blocks, ceil(max(layer.missed for layer in demand.layers) if scattered else 0)))
    # More are begun at once where that costs little speed: the disk has work while the thread that computes does not
    # look. With 128 instead of 256 in flight decoding OpenELM-3B took a tenth longer.
    good = _depths(machine, nbytes, scattered, tuning.direct)
    if good[-1] < wanted:
        good = _depths(machine, nbytes, scattered, tuning.direct, NEARLY)
    depth = next((depth for depth in good if depth >= wanted), good[-1])
    rate = format_bytes(machine.read_rate(nbytes, depth, scattered, tuning.direct))
    return max(depth, min(blocks, DEPTH)), f"{rate}/s at {format_bytes(nbytes)} a read"


def _choose_gap(machine: Machine, demand: Demand, tuning: Tuning) -> tuple[int, str]:
    read = _read_s(machine, demand.read_bytes, tuning.depth, True, tuning.direct)
    depth = _depths(machine, PIECE, False, tuning.direct)[0]
    byte = _read_s(machine, PIECE, depth, False, tuning.direct) / PIECE
    # What a read costs beside its bytes; so many more bytes cost the same.
    gap = max(0, min(LONGEST_GAP, int(read / byte - demand.read_bytes)))
    return gap // 512 * 512, f"a read costs {read * 1e6:.0f} us, 1 MB in a row {byte * 1e12:.0f} us"


def _choose_look_ahead(machine: Machine, demand: Demand, tuning: Tuning) -> tuple[str, str]:
    if demand.selector != "predictor":
        return "off", "only `predictor` guesses by itself"
    if not any(layer.missed * layer.recall for layer in demand.layers):
        return "off", "nothing is to be read that could be guessed"
    model = CostModel(machine, demand, tuning, tuning.staging_blocks)
    without, ahead = model.decode_selected(False).total_s, model.decode_selected(True).total_s
    reason = f"{ahead * 1e3:.3g} ms a token with it, {without * 1e3:.3g} without"
    return ("auto" if ahead < PAYS * without else "off"), reason
