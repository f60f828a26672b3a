"""What `ablation_table2.py` measures: geometries, a generator of activations, and one class per way of reading weights.

Reading, slots and residency are the package's own. Weights are random bytes and no FFN is computed: this shows what
is read and how fast, and says nothing of quality.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mlx_flash.engine.backends.base import BLOCK
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.staging import BlockRequest, BlockStream
from mlx_flash.engine.residency.window import LRU
from mlx_flash.engine.selection.context import SharedContext, blocks
from mlx_flash.engine.storage.bundle import Layout, Part, layer_header
from mlx_flash.engine.storage.reader import LayerFile
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.engine.storage.writer import check_free_space
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.runtime.planning.selective_persistence import STAGING_BLOCKS, split_slots
from mlx_flash.stats import Stats
from mlx_flash.tools.bench import trace_replay

WINDOW = 4  # tokens, as the paper's for OPT-6.7B
# AGES[j]: share of a layer's neurons that were named last j + 1 tokens ago; AGES[0] is thus the share named per token,
# and, as every neuron ages into the next class unless it is named again, AGES[WINDOW] the share named per token that no
# window of 4 tokens holds. The first four add up to the 24 % that the window holds (arXiv 2312.11514, section 3.1).
AGES = (0.090, 0.066, 0.0485, 0.0355, 0.024)
FIRING = 0.03  # truly active, a third of what the predictor names
RANDOM_BYTES = 64 << 20
OPT_67B = {
    "model_type": "opt",
    "hidden_size": 4096,
    "word_embed_proj_dim": 4096,
    "ffn_dim": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
}

Token = list[np.ndarray]  # per layer the ids named for one token, ascending


@dataclass(frozen=True)
class Geometry:
    """What is read of a model. ranks: of each layer's predictor, 0 where there is none."""

    name: str
    layouts: tuple[Layout, ...]
    dense_bytes: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any], dtype: str, ranks: Sequence[int]) -> Geometry:
        """The geometry of a Hugging Face config, in a 16-bit dtype."""
        spec = read_spec(config)
        dense = 2 * sum(prod(shape) for shape in spec.resident_shapes().values())
        return cls(name, tuple(spec.layout(i, dtype) for i in range(len(spec.layers))), dense, tuple(ranks))

    @property
    def ffn_bytes(self) -> int:
        return sum(layout.count * layout.stride for layout in self.layouts)

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.ffn_bytes

    @property
    def dim(self) -> int:
        return self.layouts[0].parts[0].length

    @property
    def predictor_bytes(self) -> int:
        """int8 weights, and each neuron's bias."""
        pairs = zip(self.layouts, self.ranks, strict=True)
        return sum(rank * (self.dim + layout.count) + 4 * (layout.count + 1) for layout, rank in pairs if rank)

    @property
    def dense_layout(self) -> Layout:
        """The dense part as if it were bundles, so that it is read like them."""
        layout = self.layouts[0]
        return Layout(layout.parts, -(-self.dense_bytes // layout.stride))

    def files(self, folder: Path) -> list[LayerFile]:
        """Every layer's file, then the dense part's."""
        names = [*(f"layer-{i:03d}.safetensors" for i in range(len(self.layouts))), "dense.safetensors"]
        return [LayerFile(folder / name, layout) for name, layout in zip(names, self.all_layouts, strict=True)]

    @property
    def all_layouts(self) -> list[Layout]:
        return [*self.layouts, self.dense_layout]


def known_geometry(name: str, models: Path) -> Geometry:
    """`openelm-3b` (ranks: FACTS' 256) or `opt-6.7b` (the paper's: 128, and 1024 in the last four layers)."""
    if name == "opt-6.7b":
        return Geometry.of(name, OPT_67B, "float16", [128] * 28 + [1024] * 4)
    config = json.loads((models / name / "config.json").read_text())
    return Geometry.of(name, config, "bfloat16", [256] * config["num_transformer_layers"])


def write_random(file: LayerFile, rng: np.random.Generator) -> None:
    """A layer's file of incompressible bytes, on disk when this returns and not in the page cache."""
    left = file.layout.count * file.layout.stride
    with open(file.path, "wb") as out:
        out.write(layer_header(file.layout))
        while left:
            length = min(left, RANDOM_BYTES)
            out.write(rng.integers(0, 2**64, -(-length // 8), np.uint64).view(np.uint8)[:length].data)
            left -= length
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_geometry(geometry: Geometry, folder: Path, seed: int) -> list[LayerFile]:
    """Write all files of a geometry. Raises SpaceError."""
    files = geometry.files(folder)
    check_free_space(folder, sum(file.layout.file_bytes for file in files) + (64 << 20))
    rng = np.random.Generator(np.random.SFC64(seed))
    for file in files:
        write_random(file, rng)
    return files


def synthetic_layer(count: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For one layer of `count` neurons, token by token: the ids a predictor names (see replay.py, with AGES), and those
    of them that fire, by chance."""
    firing = np.random.default_rng(rng.integers(1 << 62))  # another stream: what is named does not depend on it
    for named in trace_replay.synthetic_layer(count, AGES, rng):
        yield named, np.sort(firing.permutation(named)[: round(FIRING * count)])


def synthetic_trace(counts: Sequence[int], tokens: int, seed: int) -> tuple[list[Token], float]:
    """`tokens` tokens of named ids, and the share of all neurons that fire."""
    layers = [synthetic_layer(count, np.random.default_rng([seed, i])) for i, count in enumerate(counts)]
    trace: list[Token] = []
    fired = 0
    for _ in range(tokens):
        pairs = [next(layer) for layer in layers]
        trace.append([named for named, _ in pairs])
        fired += sum(len(firing) for _, firing in pairs)
    return trace, fired / (tokens * sum(counts))


@dataclass(frozen=True)
class TraceStatistics:
    """Shares of all neurons, means over the tokens after the first WINDOW: named per token, held by a window of the
    last WINDOW tokens, named but not held. slots: per layer the neurons that a window held in the mean."""

    named: float
    held: float
    new: float
    slots: tuple[int, ...]


def trace_statistics(trace: Sequence[Token], counts: Sequence[int]) -> TraceStatistics:
    """Raises ValueError for a trace that does not fill a window."""
    if len(trace) <= WINDOW:
        raise ValueError(f"{len(trace)} tokens: more than {WINDOW} are needed")
    named = held = new = 0
    slots = []
    for layer, count in enumerate(counts):
        layer_held = 0
        for t in range(WINDOW, len(trace)):
            window = np.zeros(count, bool)
            window[np.concatenate([token[layer] for token in trace[t - WINDOW : t]])] = True
            layer_held += int(window.sum())
            named += len(trace[t][layer])
            new += int((~window[trace[t][layer]]).sum())
        held += layer_held
        slots.append(-(-layer_held // (len(trace) - WINDOW)))
    total = (len(trace) - WINDOW) * sum(counts)
    return TraceStatistics(named / total, held / total, new / total, tuple(slots))


class Predictors:
    """Low-rank predictors of the real sizes with random weights: computed, for their time, and then overridden."""

    def __init__(self, geometry: Geometry, backend: NumpyBackend, seed: int):
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((1, geometry.dim), np.float32)
        self.layers = []
        for layout, rank in zip(geometry.layouts, geometry.ranks, strict=True):
            if rank:
                shapes = ((rank, geometry.dim), (layout.count, rank))
                a, b = (rng.integers(-127, 128, shape, np.int8) for shape in shapes)
                self.layers.append(backend.predictor(a, b, 1e-4, np.zeros(layout.count, np.float32)))

    def seconds(self) -> float:
        """Compute all layers for one token."""
        begin = time.perf_counter()
        for predict in self.layers:
            np.flatnonzero(predict(self.x)() > 0)
        return time.perf_counter() - begin


@dataclass(frozen=True)
class Reading:
    """What one token took. io_s: time in which reads were under way; plan_s: deciding what to read."""

    io_s: float
    plan_s: float
    bytes: int
    reads: int


class StreamRow:
    """Naive and hybrid: every weight that is not resident, in large sequential reads through the engine's staging.

    resident_bytes: about so many are resident, dense part first, then blocks from each layer's start
    """

    def __init__(self, geometry: Geometry, files: Sequence[LayerFile], backend: NumpyBackend, resident_bytes: int = 0):
        layouts, stride = geometry.all_layouts, geometry.layouts[0].stride
        dense = min(geometry.dense_layout.count, resident_bytes // stride)
        slots = resident_bytes // stride - dense
        self.capacities = [*split_slots(slots, [layout.count for layout in geometry.layouts], BLOCK), dense]
        self.resident_bytes = sum(self.capacities) * stride
        self.counts = [layout.count for layout in layouts]
        names = [part.name for part in layouts[0].parts]
        staging = [backend.slab(layouts[0], BLOCK, names) for _ in range(STAGING_BLOCKS)]
        self.reader = open_reader(files)
        self.shared = SharedContext(backend, self.reader, BlockStream(staging), Stats())

    def token(self, ids: Token) -> Reading:
        """Read all; which neurons are named does not matter."""
        stream, stats = self.shared.stream, self.shared.stats
        stats.reset()
        wanted = [
            BlockRequest(layer, np.arange(first, first + length))
            for layer, (capacity, count) in enumerate(zip(self.capacities, self.counts, strict=True))
            for first, length in blocks(capacity, count, BLOCK)
        ]
        begin = time.perf_counter()
        stream.start(wanted, self.shared.fetch)
        for _ in wanted:
            stream.release(stream.take()[1])
        return Reading(time.perf_counter() - begin, 0.0, stats.bytes_read, stats.reads)

    def close(self) -> None:
        self.reader.close()


def unbundled(file: LayerFile) -> LayerFile:
    """The same file as if it held single parts, all of the first one, then all of the second, ..."""
    layout = file.layout
    first = layout.parts[0]
    if first.nbytes * len(layout.parts) != layout.stride or any(part.nbytes != first.nbytes for part in layout.parts):
        raise ValueError(f"{file.path}: a bundle of {layout.stride} bytes is not {len(layout.parts)} equal parts")
    return LayerFile(file.path, Layout((Part("part", first.dtype, first.length),), layout.count * len(layout.parts)))


class NamedRow:
    """Predictor, windowing, bundling: the neurons that are named and not resident, all of a layer's at once.

    capacities: slots per layer, least recently used goes first; None: nothing is kept
    bundled: a neuron is one record; else each of its parts is, far apart, though its slot is the same
    """

    def __init__(
        self,
        geometry: Geometry,
        files: Sequence[LayerFile],
        backend: NumpyBackend,
        capacities: Sequence[int] | None,
        bundled: bool,
        most_named: int,
    ):
        files = files[: len(geometry.layouts)]
        self.counts = [file.layout.count for file in files]
        self.parts = 1 if bundled else len(geometry.layouts[0].parts)
        files = files if bundled else [unbundled(file) for file in files]
        names = [part.name for part in files[0].layout.parts]
        capacities = capacities or [0] * len(files)
        self.residencies = [Residency(n, c, LRU) for n, c in zip(self.counts, capacities, strict=True)]
        pairs = zip(files, capacities, strict=True)
        self.slabs = [backend.slab(file.layout, c * self.parts, names) for file, c in pairs]
        self.staging = backend.slab(files[0].layout, most_named * self.parts, names)
        self.resident_bytes = sum(slab.nbytes for slab in self.slabs)
        self.reader = open_reader(files)

    def records(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Where the parts of neurons `ids` (n,) are in the file, (n * parts,)."""
        return (ids[:, None] + count * np.arange(self.parts)).ravel()

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """Where they go in the slab: a neuron's parts follow each other."""
        return (slots[:, None] * self.parts + np.arange(self.parts)).ravel()

    def token(self, ids: Token) -> Reading:
        """Make a token's neurons resident, or, without slots for them, read them into staging."""
        io_s = plan_s = 0.0
        nbytes = reads = 0
        for layer, named in enumerate(ids):
            residency, count = self.residencies[layer], self.counts[layer]
            begin = time.perf_counter()
            plan = residency.plan(named)
            residency.evict(plan)
            loads, rest = named[plan.loads].astype(np.int64), named[plan.overflow].astype(np.int64)
            wanted = [(loads, plan.slots[plan.loads], self.slabs[layer]), (rest, np.arange(len(rest)), self.staging)]
            requests = [(self.records(i, count), self.rows(s), slab.targets) for i, s, slab in wanted if len(i)]
            read_at = time.perf_counter()
            reports = [p.wait() for p in [self.reader.submit(layer, *request) for request in requests]]
            read_end = time.perf_counter()
            residency.commit(plan)
            plan_s += read_at - begin + time.perf_counter() - read_end
            io_s += read_end - read_at
            nbytes += sum(report.bytes for report in reports)
            reads += sum(report.reads for report in reports)
        return Reading(io_s, plan_s, nbytes, reads)

    def close(self) -> None:
        self.reader.close()


def mount_of(folder: Path) -> tuple[str, str]:
    """(device, file system) that a folder is on, as the system calls them."""
    path = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    found = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return (found.device, found.fstype) if found else ("unknown", "unknown")


def needs_disk(folder: Path) -> None:
    """Raise OSError where files are in memory, or where there is no direct I/O so that reads would come from there."""
    if mount_of(folder)[1] in ("tmpfs", "ramfs"):
        raise OSError("files there are in memory, not on a disk")
    direct = getattr(os, "O_DIRECT", 0)  # macOS has F_NOCACHE instead, which every file takes
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        os.close(os.open(probe.name, os.O_RDONLY | direct))
