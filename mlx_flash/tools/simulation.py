"""Misses of residency policies on recorded traces, beside the fewest that any policy could have.

Runs the engine's own policies (engine/residency) on ids; knows neither weights nor models.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_flash.engine.residency.miss_curves import split_by_gain
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.window import DEFAULT, LFU, LRU, Policy
from mlx_flash.errors import UsageError
from mlx_flash.tools.calibration.neuron_statistics import miss_curve

from .trace import Trace

FRACTIONS = (0.25, 0.5)
OPTIMUM = "belady"
POLICIES: Mapping[str, Policy] = {
    "lru": LRU,
    "lfu": LFU,
    "window-4": replace(DEFAULT, window=4),
    "pinned+lru": replace(LRU, pinned=0.5),
    "default": DEFAULT,
}


@dataclass(frozen=True)
class Row:
    """What one policy missed while decoding, with slots for `fraction` of the bundles. layer None: all layers."""

    policy: str
    fraction: float
    layer: int | None
    slots: int
    tokens: int
    asked: int
    misses: int

    @property
    def miss_rate(self) -> float:
        """Share of the bundles asked for that were not in a slot."""
        return self.misses / self.asked if self.asked else 0.0

    @property
    def misses_per_token(self) -> float:
        return self.misses / self.tokens if self.tokens else 0.0


def check_simulation(fractions: Sequence[float], tokens: int = 1) -> None:
    """Raise UsageError for shares outside 0 to 1, and for less than one token."""
    if not all(0 <= fraction <= 1 for fraction in fractions):  # not NaN either
        raise UsageError(f"--fractions {list(fractions)}: give shares of the bundles, from 0 to 1")
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}; it must be at least 1")


def policy_misses(
    tokens: Sequence[np.ndarray], count: int, slots: int, policy: Policy, rates: np.ndarray | None = None
) -> np.ndarray:
    """(T,) int64: how many ids of each token have no slot in one layer, beginning with all slots empty."""
    residency = Residency(count, slots, policy, rates)
    misses = np.zeros(len(tokens), np.int64)
    for token, ids in enumerate(tokens):
        plan = residency.plan(ids)
        residency.evict(plan)
        residency.commit(plan)
        misses[token] = len(ids) - len(plan.hits)
    return misses


CANDIDATES = (DEFAULT, LRU, replace(DEFAULT, window=4))
BETTER = 0.98  # another policy is chosen where it misses at most this share of what the default misses


def best_policy(layers: Sequence[tuple[Sequence[np.ndarray], int, np.ndarray]]) -> Policy:
    """The policy with the fewest misses on these layers' (tokens, count, rates (count,)), with slots for a quarter of
    each layer, counted once the slots are filled; the default policy unless another one is clearly better."""
    totals = np.zeros(len(CANDIDATES))
    for tokens, count, rates in layers:
        for k, policy in enumerate(CANDIDATES):
            misses = policy_misses(tokens, count, max(1, count // 4), policy, rates)
            totals[k] += misses[len(tokens) // 4 :].sum()
    best = int(np.argmin(totals))
    return CANDIDATES[best] if totals[best] <= BETTER * totals[0] else DEFAULT


def least_misses(tokens: Sequence[np.ndarray], count: int, slots: int) -> np.ndarray:
    """`policy_misses` of Belady's optimum, which knows the future: after each token the ids that are needed soonest
    stay. No policy has fewer misses in all: unlike the engine's it may also drop ids, or leave them without a slot,
    within their call."""
    never = len(tokens)
    next_use, following = np.full(count, never), []
    for token in range(len(tokens) - 1, -1, -1):
        following.append(next_use[tokens[token]])
        next_use[tokens[token]] = token
    resident, misses = np.zeros(count, bool), np.zeros(len(tokens), np.int64)
    for token, ids in enumerate(tokens):
        misses[token] = len(ids) - np.count_nonzero(resident[ids])
        resident[ids], next_use[ids] = True, following.pop()
        held = np.flatnonzero(resident)
        if len(held) > slots:
            resident[held[np.argsort(next_use[held], kind="stable")[slots:]]] = False
    return misses


def reuse_curve(tokens: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(K, 2): slots that windows of past tokens take, and the misses per token with them, as in a calibration."""
    last, histogram = np.full(count, -1), np.zeros(len(tokens) + 1, np.int64)
    for token, ids in enumerate(tokens):
        again = ids[last[ids] >= 0]
        histogram += np.bincount(token - last[again], minlength=len(histogram))
        last[ids] = token
    return miss_curve(histogram)


def simulate(
    traces: Trace | Sequence[Trace],
    fractions: Sequence[float] = FRACTIONS,
    rates: Sequence[np.ndarray] | None = None,
    curves: Sequence[np.ndarray] | None = None,
    policies: Mapping[str, Policy] = POLICIES,
) -> list[Row]:
    """Every policy, and the optimum, on traces of one model; a row per policy, fraction and layer, then one for all
    layers.

    Each trace begins with empty slots, which its prompt fills; only the tokens after the prompt are counted. rates[l]
    (count,) and curves[l] (K, 2) come from calibration on another text. Without rates the pinned bundles are the ones
    that the prompt uses most; with curves `default` is simulated once more, its slots split over the layers by marginal
    gain.
    """
    traces = [traces] if isinstance(traces, Trace) else list(traces)
    counts = traces[0].counts
    if any(trace.counts != counts for trace in traces):
        raise UsageError("the traces are of different models; simulate each on its own")
    check_simulation(fractions)
    rows = []
    for fraction in fractions:
        slots = tuple(int(fraction * count) for count in counts)
        for name, policy in policies.items():
            rows += _rows(name, fraction, slots, traces, policy, rates)
        if curves is not None:
            by_gain = split_by_gain(sum(slots), counts, 1, curves)
            rows += _rows("default, by gain", fraction, by_gain, traces, DEFAULT, rates)
            rows += _rows(f"{OPTIMUM}, by gain", fraction, by_gain, traces, None, None)
        rows += _rows(OPTIMUM, fraction, slots, traces, None, None)
    return rows


def _rows(
    name: str,
    fraction: float,
    slots: Sequence[int],
    traces: Sequence[Trace],
    policy: Policy | None,
    rates: Sequence[np.ndarray] | None,
) -> list[Row]:
    """A row for each layer and one for all; policy None means the optimum."""
    counts, decoded = traces[0].counts, sum(trace.tokens - trace.prompt for trace in traces)
    asked, missed = [0] * len(counts), [0] * len(counts)
    for trace in traces:
        known = rates
        if known is None and policy is not None and policy.pinned:
            known = trace.rates(0, trace.prompt)
        for layer, tokens in enumerate(trace.ids):
            if policy is None:
                misses = least_misses(tokens, counts[layer], slots[layer])
            else:
                rate = None if known is None else known[layer]
                misses = policy_misses(tokens, counts[layer], slots[layer], policy, rate)
            asked[layer] += sum(map(len, tokens[trace.prompt :]))
            missed[layer] += int(misses[trace.prompt :].sum())
    rows = [Row(name, fraction, i, slots[i], decoded, asked[i], missed[i]) for i in range(len(counts))]
    return [*rows, Row(name, fraction, None, sum(slots), decoded, sum(asked), sum(missed))]


def print_table(rows: Sequence[Row]) -> None:
    """Print all layers together on stdout: misses per token, their share of the ids asked for, and the distance to the
    optimum with the same slots."""
    whole = [row for row in rows if row.layer is None]
    best = {row.fraction: row.misses for row in whole if row.policy == OPTIMUM}
    print("slots   policy             misses/token  of all asked  times optimum")
    for row in whole:
        least = best.get(row.fraction)
        times = f"{row.misses / least:13.2f}" if least else f"{'-':>13}"
        print(f"{row.fraction:5.0%}   {row.policy:<18} {row.misses_per_token:12.2f} {row.miss_rate:13.2%} {times}")


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write a line per row; layer is `all` in rows for all layers."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "fraction", "layer", "slots", "tokens", "asked", "misses", "miss_rate"])
        for row in rows:
            layer = "all" if row.layer is None else row.layer
            values = [row.policy, row.fraction, layer, row.slots, row.tokens, row.asked, row.misses]
            writer.writerow([*values, f"{row.miss_rate:.6f}"])
