"""Traces: which bundle ids each layer asked for, token by token. Recording, files, and public route traces.

Knows ids only: neither the bundles nor what was resident at the time.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_flash.errors import FormatError, UsageError

try:
    from compression.zstd import ZstdError  # type: ignore[import-not-found] # Python 3.14's zipfile raises it
except ImportError:
    ZstdError = zlib.error

VERSION = 1
ROUTE_HEADER = re.compile(r"n_layer=(\d+) n_expert=(\d+)")
ROUTE_COLUMNS = ["turn", "phase", "step", "layer", "slot", "expert"]
MOST = 1 << 20  # layers, or bundles of a layer: more is a lying header
# NumPy's errors for a file of another kind, cut short or damaged (TypeError: a bare array, not an archive).
UNREADABLE = (
    *(OSError, ValueError, KeyError, AttributeError, EOFError, MemoryError, TypeError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, ZstdError, NotImplementedError),
)


@dataclass(frozen=True, eq=False)
class Trace:
    """counts[l]: bundles of layer l; ids[l][t]: int32 (n,), ascending, the ids that token t asked for; the first
    `prompt` tokens belong to the prompt."""

    counts: tuple[int, ...]
    ids: list[list[np.ndarray]]
    prompt: int

    @property
    def tokens(self) -> int:
        return len(self.ids[0]) if self.ids else 0

    def rates(self, first: int, last: int) -> list[np.ndarray]:
        """Per layer (count,) fp32: the share of tokens first..last-1 that asked for each bundle."""
        counted = []
        for count, tokens in zip(self.counts, self.ids, strict=True):
            asked = np.concatenate([np.empty(0, np.int32), *tokens[first:last]])
            counted.append(np.bincount(asked, minlength=count) / np.float32(max(1, last - first)))
        return [rates.astype(np.float32) for rates in counted]

    def save(self, path: str | Path) -> None:
        """Write an .npz file, whole or not at all: per layer all ids and where each token's begin."""
        arrays = {"version": np.array(VERSION), "counts": np.array(self.counts), "prompt": np.array(self.prompt)}
        for layer, tokens in enumerate(self.ids):
            arrays[f"ids-{layer}"] = np.concatenate([np.empty(0, np.int32), *tokens]).astype(np.int32)
            arrays[f"begins-{layer}"] = np.cumsum([0, *map(len, tokens)])
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read an .npz file. Raises UsageError when it is not there, FormatError when it is no trace."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"{path} is not a file; record a trace, or give a route trace (.csv)")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return _checked(path, {name: arrays[name] for name in arrays.files})
        except UNREADABLE as error:
            raise FormatError(f"{path} is not a trace: {error}") from error


def _checked(path: Path, arrays: dict[str, np.ndarray]) -> Trace:
    """The trace in these arrays; raises FormatError, or KeyError for one that is missing."""

    def integers(name: str, dims: int) -> np.ndarray:
        if arrays[name].dtype.kind not in "iu" or arrays[name].ndim != dims:
            raise FormatError(f"{path}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}, not integers")
        return arrays[name].astype(np.int64)

    version, prompt, counts = int(integers("version", 0)), int(integers("prompt", 0)), integers("counts", 1)
    if version != VERSION:
        raise FormatError(f"{path} has version {version}, this mlx_flash reads {VERSION}")
    if not 0 < len(counts) <= MOST or not ((counts > 0) & (counts <= MOST)).all():
        raise FormatError(f"{path}: {len(counts)} layers of {counts.min(initial=0)}..{counts.max(initial=0)} bundles")
    ids: list[list[np.ndarray]] = []
    for layer, count in enumerate(counts.tolist()):
        asked, begins = integers(f"ids-{layer}", 1), integers(f"begins-{layer}", 1)
        if not len(begins) or begins[0] != 0 or begins[-1] != len(asked) or (np.diff(begins) < 0).any():
            raise FormatError(f"{path}: layer {layer} does not say where its {len(asked)} ids begin")
        rising = np.diff(asked, prepend=-1) > 0
        rising[begins[:-1][np.diff(begins) > 0]] = True  # a token's first id need not be above the last token's
        if not rising.all() or asked.min(initial=0) < 0 or asked.max(initial=0) >= count:
            raise FormatError(f"{path}: layer {layer} has ids outside 0..{count - 1}, or a token's not ascending")
        ids.append(np.split(asked.astype(np.int32), begins[1:-1]) if len(begins) > 1 else [])
    trace = Trace(tuple(counts.tolist()), ids, prompt)
    if {len(tokens) for tokens in ids} != {trace.tokens} or not 0 <= prompt <= trace.tokens:
        raise FormatError(
            f"{path}: layers of {sorted({len(t) for t in ids})[:8]} tokens, {prompt} of them prompt, do not fit"
        )
    return trace


def read_route_csv(path: str | Path) -> Trace:
    """A public route trace: the experts of a mixture of experts that each token was routed to (one conversation turn).

    A layer that a token never reached (the last one, for all of a prompt but its last token) has no ids there.
    Raises UsageError when the file is not there, FormatError, naming the line, when it is no route trace.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not text") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    found = next((match for line in lines if line.startswith("#") and (match := ROUTE_HEADER.search(line))), None)
    if found is None:
        raise FormatError(f"{path} has no line '# ... n_layer=L n_expert=E': not a route trace")
    layers, experts = int(found[1]), int(found[2])
    if not (0 < layers <= MOST and 0 < experts <= MOST):
        raise FormatError(f"{path} claims {layers} layers of {experts} experts")
    asked: dict[tuple[int, int], set[int]] = defaultdict(set)
    in_prompt: dict[int, bool] = {}
    for number, values in _rows(path, lines):
        turn, phase, step, layer, _, expert = values
        if turn != 0 or phase not in (0, 1) or not 0 <= layer < layers or not 0 <= expert < experts:
            raise FormatError(f"{path}, line {number}: turn {turn}, phase {phase}, layer {layer}, expert {expert}")
        if step not in in_prompt and step != len(in_prompt):
            raise FormatError(f"{path}, line {number}: step {step} follows {len(in_prompt)} steps")
        asked[layer, step].add(expert)
        if in_prompt.setdefault(step, phase == 0) != (phase == 0):
            raise FormatError(f"{path}, line {number}: step {step} is in both phases")
    prompt, tokens = sum(in_prompt.values()), len(in_prompt)
    if [in_prompt[step] for step in range(tokens)] != [step < prompt for step in range(tokens)]:
        raise FormatError(f"{path}: prompt steps follow decoding steps")
    ids = [[np.array(sorted(asked[layer, t]), np.int32) for t in range(tokens)] for layer in range(layers)]
    return Trace((experts,) * layers, ids, prompt)


def _rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
    """(line number, the first six columns) of every row below the column names."""
    named = False
    for number, line in enumerate(lines, 1):
        if line.startswith("#") or not line.strip():
            continue
        fields = line.split(",")[: len(ROUTE_COLUMNS)]
        if not named:
            if fields != ROUTE_COLUMNS:
                raise FormatError(f"{path}, line {number}: columns {fields}, expected {ROUTE_COLUMNS} and more")
            named = True
            continue
        try:
            values = [int(field) for field in fields]
        except ValueError:
            values = []
        if len(values) < len(ROUTE_COLUMNS):
            raise FormatError(f"{path}, line {number} is not a row of numbers: {line[:80]!r}")
        yield number, values


def read_trace(path: str | Path) -> Trace:
    """A trace from a file, by its suffix: .csv is a route trace, all else our own format."""
    return read_route_csv(path) if Path(path).suffix == ".csv" else Trace.load(path)


class Recorder:
    """Called with (layer, ids) for every layer of every token, in any order; `trace` puts them together."""

    def __init__(self, counts: Sequence[int]):
        self.counts = tuple(counts)
        self.restart()

    def restart(self) -> None:
        """Begin another trace."""
        self._ids: list[list[np.ndarray]] = [[] for _ in self.counts]

    def __call__(self, layer: int, ids: np.ndarray) -> None:
        self._ids[layer].append(np.array(ids, np.int32))

    def trace(self, prompt: int) -> Trace:
        """What was recorded, the first `prompt` tokens being the prompt; a token that was cut short is left out."""
        tokens = min(map(len, self._ids))
        return Trace(self.counts, [layer[:tokens] for layer in self._ids], min(prompt, tokens))
