"""How long a token takes on a measured machine. Arithmetic only.

Computing takes the bytes of weights over the rates of their kernels; reading takes the bytes over the rate of reads of
that size; what the engine does at the same time is counted once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from mlx_flash.engine.storage.read_plan import Merging
from mlx_flash.runtime.machine import Machine

from .demand import Demand, LayerDemand
from .tuning import Tuning

PIECE = Merging().piece_bytes
CONTEXT = 256  # tokens in the KV cache of the token that is predicted
PROMPT = 512
# Bytes of codes per second, of those of 16-bit weights: measured once (2 threads, AVX-512, groups of 64), not probed.
CODED: Mapping[int | None, float] = {4: 0.43, 8: 0.62}
COLD = 1.5  # what a layer takes beside its weights, of that in the probe's model, which the caches hold: measured at 3B


@dataclass(frozen=True)
class Prediction:
    """Seconds per decoded token once the slots are warm, with CONTEXT tokens before it.

    reads_s: of the reads alone; waited_s: the part of it that does not overlap with computing
    dense_s: attention and output layer; sparse_s: FFN; selection_s: predictors, or the part of the FFN that is computed
    for every bundle; other_s: Python, small arrays, processor time of the reads
    prompt_tokens_per_s: of a prompt of PROMPT tokens
    assumption: see `Demand`
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


class CostModel:
    """The seconds of each part of a token, for one machine, model, tuning and number of staging slabs."""

    def __init__(self, machine: Machine, demand: Demand, tuning: Tuning, staging: int):
        self.machine, self.demand, self.tuning, self.staging = machine, demand, tuning, max(1, staging)
        self.linear = machine.kernels[f"linear.{demand.dtype}"] * CODED.get(demand.dense_bits, 1.0)
        coded = CODED.get(demand.bits, 1.0)
        self.rows = machine.kernels[f"rows.{demand.dtype}"] * coded
        self.records = min(machine.memory_bytes_per_s, machine.kernels[f"linear.{demand.dtype}"] * coded)
        self.counts, self.latency = self._latencies(demand.read_bytes)

    def _latencies(self, nbytes: int) -> tuple[list[int], list[float]]:
        """Numbers of reads that begin at once, up to the reads in flight, and the seconds until all have ended.
        More reads never take less, whatever noise a probe measured."""
        machine, depth = self.machine, self.tuning.depth
        known = {read.depth for read in machine.reads if read.scattered and read.depth < depth} | {1, depth}
        counts, seconds = sorted(known), [0.0]
        for count in counts:
            took = count * nbytes / machine.read_rate(nbytes, count, True, self.tuning.direct)
            seconds.append(max(seconds[-1], took))
        return [0, *counts], seconds

    def reads_s(self, layer: LayerDemand, count: float) -> float:
        """Seconds to read scattered bundles of one layer, begun at once. Never longer than reading the whole layer in
        a row: the reader joins neighbours into one read."""
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
        """Processor seconds of reading `nbytes` in a row. All of it counts, here and below: the thread that computes
        also begins the reads."""
        piece = min(self.demand.block * self.demand.stride, PIECE)
        return nbytes / piece * self.machine.read_cpu_s(piece, self._pieces(staging), False, self.tuning.direct)

    def cpu_s(self, count: float) -> float:
        """Processor seconds of scattered reads."""
        depth = min(self.tuning.depth, max(1.0, count))
        return count * self.machine.read_cpu_s(self.demand.read_bytes, depth, True, self.tuning.direct)

    def ffn_s(self, asked: float, fired: float) -> float:
        """Seconds of the FFN's bundles, without the part that is computed for every bundle."""
        demand = self.demand
        if demand.selector == "all":  # record after record: what does not fire has come before that is known
            return asked * (demand.first_part_bytes + demand.other_parts_bytes) / self.records
        return (asked * demand.first_part_bytes + fired * demand.other_parts_bytes) / self.rows

    @property
    def other_s(self) -> float:
        """Seconds of a layer besides weights and reads."""
        return COLD * self.machine.layer_s["all" if self.demand.selector == "all" else "selected"]

    def dense_s(self, layer: LayerDemand) -> float:
        return layer.dense_bytes / self.linear

    @property
    def head_s(self) -> float:
        """Seconds of the output layer, and of reading the keys and values of all layers."""
        return self.demand.head_bytes / self.linear + CONTEXT * self.demand.kv_bytes / self.machine.memory_bytes_per_s

    def predictor_s(self, layer: LayerDemand) -> float:
        return layer.predictor_bytes / self.machine.kernels["predictor.int8"]

    def selection_s(self, layer: LayerDemand) -> float:
        if self.demand.selector == "predictor":
            return self.predictor_s(layer)
        return layer.lead_bytes / self.linear

    def decode_all(self) -> Prediction:
        """Selector `all`: blocks are read in a circle beside all computing, as far ahead as staging allows."""
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
        """Selectors that name bundles: reads overlap with the work on bundles in memory. With look_ahead, guessed
        bundles are read while the layer before is computed."""
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
        """Seconds of a prompt of PROMPT tokens, in chunks that read each layer's blocks once. cold: slots are empty."""
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
    """How long a decoded token and a prompt take, with so many staging slabs."""
    model = CostModel(machine, demand, tuning, staging_blocks)
    found = model.decode_all() if demand.selector == "all" else model.decode_selected(tuning.look_ahead != "off")
    return replace(found, prompt_tokens_per_s=PROMPT / model.prompt_s(cold=False))
