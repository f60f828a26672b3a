"""What a token costs on a measured machine, and the settings of the reads that make it cheapest. Arithmetic only.

Bytes of weights over the rates of their kernels, reads over the rate of reads of their size, and of the two what the
engine lets run at the same time. Knows a machine's figures and a model's demand; neither files nor readers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np

from mlx_flash.config import LONGEST_GAP, FlashConfig, format_bytes
from mlx_flash.engine.storage.aio_reader import DEPTH
from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.runtime.machine import Machine

from .demand import Demand, LayerDemand
from .selective_persistence import STAGING_BLOCKS

DEFAULT, GIVEN = "default", "given"
PIECE = Merging().piece_bytes
CONTEXT = 256  # tokens in the KV cache of the token that is predicted
PROMPT = 512
STAGING = (1, 2, 3, 4, 6, 8, 12, 16)
SAME_RATE, SAME_TIME = 0.97, 1.01  # closer than a probe tells apart
# Buffered reads must win clearly: what a page cache costs under a memory limit no probe on a quiet machine sees.
CLEARLY, NEARLY = 1.1, 0.9
# Bytes of codes per second, of those of 16-bit weights: measured once (2 threads, AVX-512, groups of 64), not probed.
CODED: Mapping[int | None, float] = {4: 0.43, 8: 0.62}
COLD = 1.5  # what a layer takes beside its weights, of that in the probe's model, which the caches hold: measured at 3B
PAYS = 0.98  # look-ahead, of the time without
OVER = 1.0  # gaps that pay may be as many bytes as are asked for


@dataclass(frozen=True)
class Tuning:
    """How bundles are read; `why` says of each field where it comes from: default, given, or what was measured.

    merge_gap: bytes; reads_in_flight: None is what the reader takes by itself; staging_blocks: at most, as the budget
    may have room for fewer; look_ahead: "auto" (times itself), "on" or "off"
    """

    merge_gap: int = Merging().gap
    reads_in_flight: int | None = None
    direct: bool = True
    staging_blocks: int = STAGING_BLOCKS
    look_ahead: str = "auto"
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def merging(self) -> Merging:
        """For the reader. A gap that somebody measured or asked for need not stay small beside what is read."""
        default = self.why.get("merge_gap", DEFAULT) == DEFAULT
        return Merging(self.merge_gap) if default else Merging(self.merge_gap, OVER)

    @property
    def reader_options(self) -> dict[str, Any]:
        """For `open_reader`."""
        depth = {} if self.reads_in_flight is None else {"depth": self.reads_in_flight}
        return {"direct": self.direct, "merging": self.merging, **depth}

    @property
    def depth(self) -> int:
        """Reads in flight, in numbers."""
        return DEPTH if self.reads_in_flight is None else self.reads_in_flight

    def report(self) -> dict[str, dict[str, Any]]:
        """Every field's value and where it comes from."""
        names = ("merge_gap", "reads_in_flight", "direct", "staging_blocks", "look_ahead")
        return {name: {"value": getattr(self, name), "why": self.why.get(name, DEFAULT)} for name in names}


@dataclass(frozen=True)
class Prediction:
    """Seconds per decoded token, once the slots are warm, with CONTEXT tokens before it.

    reads_s: what the reads take by themselves; waited_s: of it, what no computing hides. dense_s: attention, output
    layer; selection_s: predictors, or the part that is computed of every bundle; sparse_s: the rest of the FFN;
    other_s: Python, small arrays, the processor's part of the reads. prompt_tokens_per_s: of a prompt of PROMPT tokens.
    assumption: what was not known of the model, "" where all was
    """

    reads_s: float
    waited_s: float
    dense_s: float
    sparse_s: float
    selection_s: float
    other_s: float
    bytes_per_token: float
    prompt_tokens_per_s: float
    assumption: str = ""

    @property
    def total_s(self) -> float:
        return self.waited_s + self.dense_s + self.sparse_s + self.selection_s + self.other_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.total_s


# Of one layer: seconds before its blocks, blocks, seconds to read one, seconds to compute one.
Row = tuple[float, float, float, float]


class _Model:
    """Seconds of everything, for one machine, model, tuning and number of staging slabs."""

    def __init__(self, machine: Machine, demand: Demand, tuning: Tuning, staging: int):
        self.machine, self.demand, self.tuning, self.staging = machine, demand, tuning, max(1, staging)
        self.linear = machine.kernels[f"linear.{demand.dtype}"] * CODED.get(demand.dense_bits, 1.0)
        coded = CODED.get(demand.bits, 1.0)
        self.rows = machine.kernels[f"rows.{demand.dtype}"] * coded
        self.records = min(machine.memory_bytes_per_s, machine.kernels[f"linear.{demand.dtype}"] * coded)
        self.counts, self.latency = self._latencies(demand.read_bytes)

    def _latencies(self, nbytes: int) -> tuple[list[int], list[float]]:
        """Numbers of reads begun at once, up to the reads in flight, and the seconds until all have ended; never less
        for more, whatever noise a probe measured."""
        machine, depth = self.machine, self.tuning.depth
        known = {read.depth for read in machine.reads if read.scattered and read.depth < depth} | {1, depth}
        counts, seconds = sorted(known), [0.0]
        for count in counts:
            took = count * nbytes / machine.read_rate(nbytes, count, True, self.tuning.direct)
            seconds.append(max(seconds[-1], took))
        return [0, *counts], seconds

    def reads_s(self, layer: LayerDemand, count: float) -> float:
        """Scattered bundles of one layer, begun at once. Never longer than reading the whole layer in a row takes: of
        bundles that lie side by side the reader makes one read."""
        beyond = max(1.0, count / self.counts[-1])  # as many as fit at a time
        seconds = beyond * float(np.interp(count, self.counts, self.latency))
        return min(seconds, layer.bundles * self.demand.stride / self.stream_rate(self.staging))

    def _pieces(self, staging: int) -> int:
        """Reads in flight while so many staging slabs fill."""
        return min(self.tuning.depth, staging * ceil(self.demand.block * self.demand.stride / PIECE))

    def stream_rate(self, staging: int) -> float:
        """Bytes per second of blocks that are read one after the other into so many staging slabs."""
        nbytes, depth = min(self.demand.block * self.demand.stride, PIECE), self._pieces(staging)
        known = {read.depth for read in self.machine.reads if not read.scattered and read.depth < depth} | {1, depth}
        return max(self.machine.read_rate(nbytes, each, False, self.tuning.direct) for each in known)

    def stream_cpu_s(self, nbytes: float, staging: int) -> float:
        """What reading so much in a row costs the processor. All of it counts, here and below: the thread that computes
        is the one that begins the reads."""
        piece = min(self.demand.block * self.demand.stride, PIECE)
        return nbytes / piece * self.machine.read_cpu_s(piece, self._pieces(staging), False, self.tuning.direct)

    def cpu_s(self, count: float) -> float:
        """What so many scattered reads cost it."""
        depth = min(self.tuning.depth, max(1.0, count))
        return count * self.machine.read_cpu_s(self.demand.read_bytes, depth, True, self.tuning.direct)

    def ffn_s(self, asked: float, fired: float) -> float:
        """The bundles' own sums, without what is computed of every bundle."""
        demand = self.demand
        if demand.selector == "all":  # record after record: what does not fire has come before that is known
            return asked * (demand.first_part_bytes + demand.other_parts_bytes) / self.records
        return (asked * demand.first_part_bytes + fired * demand.other_parts_bytes) / self.rows

    @property
    def other_s(self) -> float:
        """Per layer."""
        return COLD * self.machine.layer_s["all" if self.demand.selector == "all" else "selected"]

    def dense_s(self, layer: LayerDemand) -> float:
        return layer.dense_bytes / self.linear

    @property
    def head_s(self) -> float:
        """What a token needs outside the layers, and the keys and values that all of them look at."""
        return self.demand.head_bytes / self.linear + CONTEXT * self.demand.kv_bytes / self.machine.memory_bytes_per_s

    def predictor_s(self, layer: LayerDemand) -> float:
        return layer.predictor_bytes / self.machine.kernels["predictor.int8"]

    def selection_s(self, layer: LayerDemand) -> float:
        if self.demand.selector == "predictor":
            return self.predictor_s(layer)
        return layer.lead_bytes / self.linear

    def decode_all(self) -> Prediction:
        """Selector `all`: reads go on in a circle under everything else, as far as staging reaches."""
        demand, layers, staging = self.demand, self.demand.layers, self.staging
        dense, other = sum(map(self.dense_s, layers)) + self.head_s, self.other_s * len(layers)
        sparse = sum(self.ffn_s(layer.asked, layer.fired) for layer in layers)
        nbytes = sum((layer.bundles - layer.capacity) * demand.stride for layer in layers)
        rate, block = self.stream_rate(staging), demand.block * demand.stride
        read, cpu = block / rate, self.stream_cpu_s(block, staging)

        def ring() -> Iterable[Row]:
            for _ in range(2):  # of two tokens the second finds the ring full
                for layer in layers:
                    share = layer.fired / layer.bundles
                    before = self.dense_s(layer) + self.other_s + self.ffn_s(layer.capacity, share * layer.capacity)
                    blocks = (layer.bundles - layer.capacity) / demand.block
                    yield before, blocks, read, self.ffn_s(demand.block, share * demand.block) + cpu
                yield self.head_s, 0, 0.0, 0.0

        other += nbytes / block * cpu
        waited = max(0.0, ring_s(ring(), staging, False) / 2 - dense - sparse - other) if nbytes else 0.0
        return Prediction(nbytes / rate, waited, dense, sparse, 0.0, other, nbytes, 0.0, demand.assumption)

    def decode_selected(self, look_ahead: bool) -> Prediction:
        """Selectors that name bundles: reads overlap with what needs none of them, within the layer, and with guesses
        within the one before."""
        demand, waited, reads, nbytes, cpu, selection = self.demand, 0.0, 0.0, 0.0, 0.0, 0.0
        dense = sum(map(self.dense_s, demand.layers)) + self.head_s
        sparse, other = 0.0, self.other_s * len(demand.layers)
        window = 0.0  # computing since guesses for this layer could be read
        for layer in demand.layers:
            work = self.ffn_s(layer.asked, layer.fired)
            hits = 1 - layer.missed / layer.asked if layer.asked else 1.0
            # The scalars of hits, which are all but the down rows; with too few slots for a token everything waits.
            hidden = hits * work * 2 / 3 if layer.asked <= layer.capacity else 0.0
            choice = self.selection_s(layer)
            ahead = layer.recall * layer.missed if look_ahead and layer.precision else 0.0
            guessed = ahead / layer.precision if ahead else 0.0
            window += self.dense_s(layer) + choice + self.other_s
            guess_s, left_s = self.reads_s(layer, guessed), self.reads_s(layer, layer.missed - ahead)
            # What reads take includes the processor's part, which nothing hides and is counted by itself.
            guess_cpu, left_cpu = self.cpu_s(guessed), self.cpu_s(layer.missed - ahead)
            waited += max(0.0, guess_s - guess_cpu - window) + max(0.0, left_s - left_cpu - hidden)
            # A request is planned and begun by about as many steps of Python as a layer takes without any.
            cpu += guess_cpu + left_cpu + self.other_s * ((guessed > 0) + (layer.missed > ahead))
            reads += guess_s + left_s
            nbytes += (guessed + layer.missed - ahead) * demand.read_bytes
            selection += choice + (self.predictor_s(layer) if look_ahead else 0.0)
            sparse, window = sparse + work, work
        return Prediction(reads, waited, dense, sparse, selection, other + cpu, nbytes, 0.0, demand.assumption)

    def prompt_s(self, cold: bool) -> float:
        """A prompt of PROMPT tokens in chunks, each layer's blocks once per chunk. cold: nothing is in slots."""
        demand, machine, staging = self.demand, self.machine, self.staging
        left, total, block = PROMPT, self.head_s, demand.block * demand.stride
        read, cpu = block / self.stream_rate(staging), self.stream_cpu_s(block, staging)
        circle = demand.selector == "all"

        def ring(flop_s: float) -> Iterable[Row]:
            bundle = (demand.stride / demand.item_bytes) * flop_s
            for layer in demand.layers:
                before, work = (
                    layer.dense_bytes / demand.dense_item_bytes * flop_s + self.other_s,
                    demand.block * bundle,
                )
                blocks, resident = layer.bundles / demand.block, layer.resident and not cold
                if circle and not cold:  # resident rows are computed where they are, the others pass through
                    yield before + layer.capacity * bundle, blocks - layer.capacity / demand.block, read, work + cpu
                elif resident:  # copied from slots into staging
                    yield before, blocks, 0.0, work + 2 * block / machine.memory_bytes_per_s
                else:
                    yield before, blocks, read, work + cpu

        while left > 0:
            tokens = min(demand.chunk, left)
            total += ring_s(ring(2 * tokens / machine.matmul_flops), staging, not circle)
            left -= tokens
        return total


def ring_s(layers: Iterable[Row], staging: int, restart: bool) -> float:
    """Seconds of layers whose blocks pass through a ring of staging slabs, read in order while others are computed.

    A layer's last block may be a fraction. restart: reading begins when the layer is reached, else it goes on from the
    layer before.
    """
    clock = disk = 0.0
    free = deque([0.0] * staging)
    for before, blocks, read, compute in layers:
        begin = clock + before if restart else 0.0
        clock += before
        while blocks > 0:
            share = min(1.0, blocks)
            disk = max(disk, free.popleft(), begin) + share * read
            clock = max(clock, disk) + share * compute
            free.append(clock)
            blocks -= 1
    return clock


def predict(machine: Machine, demand: Demand, tuning: Tuning, staging_blocks: int) -> Prediction:
    """What decoding and a prompt take with a plan that has so many staging slabs."""
    model = _Model(machine, demand, tuning, staging_blocks)
    found = model.decode_all() if demand.selector == "all" else model.decode_selected(tuning.look_ahead != "off")
    return replace(found, prompt_tokens_per_s=PROMPT / model.prompt_s(cold=False))


def given_settings(config: FlashConfig) -> dict[str, Any]:
    """The settings of the reads that the user chose, by Tuning's names."""
    names = ("merge_gap", "reads_in_flight", "staging_blocks", "look_ahead")
    found = {name: getattr(config, name) for name in names if getattr(config, name) != "auto"}
    return found if config.direct == "auto" else found | {"direct": config.direct == "on"}


def default_tuning(given: Mapping[str, Any]) -> Tuning:
    """What was good on the machines it was written on, where nothing was measured."""
    return replace(Tuning(), **given, why={name: GIVEN for name in given})


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
    """Size of most reads, and whether they are scattered."""
    if demand.selector == "all":
        return min(demand.block * demand.stride, PIECE), False
    return demand.read_bytes, True


def _depths(machine: Machine, nbytes: int, scattered: bool, direct: bool, share: float = SAME_RATE) -> list[int]:
    """The measured depths at which reads are about as fast as they get: at least this share of the best rate."""
    alike = [read for read in machine.reads if read.scattered == scattered]
    known = sorted({read.depth for read in alike if read.direct == direct} or {read.depth for read in alike})
    rates = [machine.read_rate(nbytes, depth, scattered, direct) for depth in known]
    return [depth for depth, rate in zip(known, rates, strict=True) if rate >= share * max(rates)]


def _read_s(machine: Machine, nbytes: int, depth: float, scattered: bool, direct: bool) -> float:
    """One more read of many, processor included: with few cores its time is lost to computing."""
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
        model = _Model(machine, demand, tuning, blocks)
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
    model = _Model(machine, demand, tuning, tuning.staging_blocks)
    without, ahead = model.decode_selected(False).total_s, model.decode_selected(True).total_s
    reason = f"{ahead * 1e3:.3g} ms a token with it, {without * 1e3:.3g} without"
    return ("auto" if ahead < PAYS * without else "off"), reason
