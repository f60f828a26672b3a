"""Settings of a run: one frozen dataclass, validated once. Each field is one command-line flag."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import BudgetError, UsageError

SELECTORS = ("auto", "all", "gate", "router", "predictor", "prompt", "threshold", "static")
WITH_FRACTION = {"prompt": "kept", "threshold": "dropped", "static": "kept"}
LOOK_AHEAD = ("auto", "on", "off")
DIRECT = ("auto", "on", "off")
MOST_READS_IN_FLIGHT = 4096
MOST_STAGING_BLOCKS = 1024
LONGEST_GAP = 1 << 20  # bytes: the longest read
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes in a size such as `2.5GB`, `512MiB` or a plain number; GB = 10^9, GiB = 2^30. Raises BudgetError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str):
        raise BudgetError(f"cannot read the size {text!r}; write for example 2GB, 1.5GiB or 800MB")
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise BudgetError(f"cannot read the size {text!r}; write for example 2GB, 1.5GiB or 800MB")
    value = float(match[1]) * UNITS[match[2].upper()]
    if value >= 1 << 63:
        raise BudgetError(f"the size {text[:40]!r} is more than any machine has; write for example 2GB")
    return int(value)


def format_bytes(count: float) -> str:
    """`1.49 GB`, `83.9 kB`: three digits and a decimal unit."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


@dataclass(frozen=True)
class Selection:
    """A selector and its share of the neurons: kept (`prompt`, `static`) or dropped (`threshold`). None for
    `prompt:auto`, and for selectors without a share."""

    name: str
    fraction: float | None = None

    def __str__(self) -> str:
        if self.name not in WITH_FRACTION:
            return self.name
        return f"{self.name}:{'auto' if self.fraction is None else format(self.fraction, 'g')}"


def parse_selection(text: str) -> Selection:
    """`all`, `gate`, `predictor`, `prompt:0.5`, `prompt:auto`, `threshold:0.5`, ... Raises UsageError."""
    name, colon, value = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in SELECTORS:
        raise UsageError(f"unknown selector {text!r}; known: {', '.join(SELECTORS)}")
    if name not in WITH_FRACTION:
        if colon:
            raise UsageError(f"selector {name} takes no fraction, {text!r} gives one")
        return Selection(name)
    if name == "prompt" and value == "auto":
        return Selection(name)
    try:
        fraction = float(value)
    except ValueError:
        fraction = 0.0
    highest = "below 1" if name == "threshold" else "at most 1"
    if not 0 < fraction <= 1 or (name == "threshold" and fraction == 1):
        raise UsageError(
            f"{text!r}: give the share of neurons {WITH_FRACTION[name]}, above 0 and {highest}, such as {name}:0.5"
        )
    return Selection(name, fraction)


@dataclass(frozen=True)
class FlashConfig:
    """How a model is loaded and run.

    memory: budget in bytes, a size such as "2GB", or "auto"
    max_context: tokens the KV cache holds; None = the smaller of 2048 and the model's
    backend: "auto" (mlx where MLX has a GPU, else numpy), "mlx" or "numpy"
    select: "auto" (exact: router for a mixture of experts, else gate where it fits and pays, else all), "router",
        "all", "gate", or one that loses quality: "predictor", "prompt:F" and "static:F" (share of neurons kept),
        "prompt:auto" (as many as fit), "threshold:S" (dropped)
    reselect: with `prompt`, after this many decoded tokens one is computed with all neurons, and the neurons are
        selected anew
    look_ahead: "auto" (the next layer's reads begin early where that pays), "on" or "off"; needs predictors or routers
    prefill_chunk: prompt tokens per pass over the layers
    sequences: KV caches of max_context tokens that the budget holds

    The rest says how bundles are read. None of it changes the output. "auto" is chosen for the machine, once
    `mlx_flash bench --probe` has measured it:
    merge_gap: bundles at most this many bytes apart are read at once; bytes, or a size such as "16KiB"
    reads_in_flight: reads that the disk works on at the same time
    direct: "on" (around the page cache, where the system can) or "off"
    staging_blocks: blocks of 256 bundles that are read ahead, including the one being computed
    slots: share of every layer's bundles that stay in memory, 0 to 1; "auto": as many as the budget holds
    """

    memory: int | str = "auto"
    max_context: int | None = None
    backend: str = "auto"
    select: str = "auto"
    reselect: int | None = None
    look_ahead: str = "auto"
    prefill_chunk: int = 256
    sequences: int = 1
    merge_gap: int | str = "auto"
    reads_in_flight: int | str = "auto"
    direct: str = "auto"
    staging_blocks: int | str = "auto"
    slots: float | str = "auto"

    def __post_init__(self) -> None:
        if self.memory != "auto":
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        name = parse_selection(self.select).name
        if self.reselect is not None and name != "prompt":
            raise UsageError(f"reselect goes with --select prompt:F, not with {self.select}")
        for name, known in (("look_ahead", LOOK_AHEAD), ("direct", DIRECT)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("max_context", "prefill_chunk", "reselect", "sequences"):
            value = getattr(self, name)
            if value is None and name in ("max_context", "reselect"):
                continue
            if type(value) is not int or value < 1:  # `type`, because True is an int too
                raise UsageError(f"{name} is {value!r}; it must be at least 1")
        self._check_reading()

    def _check_reading(self) -> None:
        """Raise UsageError for a setting of the reads that is out of range."""
        if self.merge_gap != "auto":
            object.__setattr__(self, "merge_gap", parse_bytes(self.merge_gap))
        whole = {
            "merge_gap": (0, LONGEST_GAP),
            "reads_in_flight": (1, MOST_READS_IN_FLIGHT),
            "staging_blocks": (1, MOST_STAGING_BLOCKS),
        }
        for name, (least, most) in whole.items():
            value = getattr(self, name)
            if value != "auto" and (type(value) is not int or not least <= value <= most):
                raise UsageError(f"{name} is {value!r}; it must be auto, or a whole number from {least} to {most}")
        if self.slots != "auto" and (type(self.slots) not in (int, float) or not 0 <= self.slots <= 1):  # type: ignore[operator]
            raise UsageError(f"slots is {self.slots!r}; it must be auto, or a share of the bundles from 0 to 1")
