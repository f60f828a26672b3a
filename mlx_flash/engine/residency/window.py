"""Which bundles give up their slots first: those used least, where uses fade with every token.

The sliding window of "LLM in a flash", section 3.1, is a setting here. Knows ids, counts and rates; neither slots nor
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

RESCALE = 1e100  # far from the largest fp64: about 11,000 tokens at a decay of 0.98
PROTECTED = 3  # above every rank
_NO_BASE = np.empty(0)
INFINITE = 1e300  # what is more, or no number, is not below it


@dataclass(frozen=True)
class Policy:
    """Which bundle is evicted first: the one with the least worth. A use is worth 1 and fades with every token.

    decay: what a use is worth one token later. 1 never forgets (LFU); 0 sees the last use only (LRU).
    prior: how many uses a calibrated firing rate of 1 counts for; these do not fade.
    window: bundles used in the last `window` tokens are evicted after all others ("LLM in a flash", section 3.1).
    pinned: share of a layer's slots whose bundles, the hottest by calibration, are evicted last of all.

    The defaults had the fewest misses on recorded traces (`mlx_flash simulate`). A window or pins had more: fading uses
    and calibrated rates favour the same bundles, less rigidly.
    """

    decay: float = 0.98
    prior: float = 40.0
    window: int = 0
    pinned: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.decay <= 1 and 0 <= self.pinned <= 1 and self.prior >= 0 and self.window >= 0):
            raise ValueError(f"decay and pinned lie in [0, 1], prior and window are not negative: {self}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Policy:
        """The policy of plain values, as `plain` gives them; missing ones are defaults. Raises ValueError for other
        names, and for values that are no numbers, not finite, out of range, or no whole number of tokens."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or not set(values) <= set(names):
            raise ValueError(f"a policy consists of {', '.join(names)}, not of {values}")
        numbers = [v for v in values.values() if isinstance(v, (int, float)) and abs(v) < INFINITE]
        if len(numbers) < len(values) or any(isinstance(v, bool) for v in numbers):
            raise ValueError(f"a policy's values are finite numbers, not {dict(values)}")
        if values.get("window", 0) % 1:
            raise ValueError(f"a policy's window is a whole number of tokens, not {values['window']}")
        given: dict[str, Any] = {name: int(v) if name == "window" else float(v) for name, v in values.items()}
        return cls(**given)

    def plain(self) -> dict[str, float | int]:
        """Its values by name, for JSON."""
        return asdict(self)


DEFAULT = Policy()
LRU = Policy(decay=0.0, prior=0.0)
LFU = Policy(decay=1.0, prior=0.0)


class History:
    """The uses of one layer's bundles, with and without slots, and the worth that follows from them.

    rates (count,) are calibrated shares of tokens that use a bundle; `pins` of the hottest are pinned.
    """

    def __init__(self, policy: Policy, count: int, pins: int = 0, rates: np.ndarray | None = None):
        self.policy, self.clock = policy, 0  # tokens seen
        # A use adds `gain`, which grows instead of the scores of everything shrinking with every token.
        self.gain = 1.0
        # One more: a slot that holds nothing has the id -1, and is worth less than any.
        self.score, self.last_used = np.zeros(count + 1), np.full(count + 1, -1, np.int64)
        self.score[-1] = -np.inf
        self.base = None if rates is None or not policy.prior else policy.prior * rates.astype(np.float64)
        self.pins: np.ndarray | None = None
        if rates is not None and pins:
            self.pins = np.zeros(count + 1, bool)
            self.pins[np.argsort(-rates, kind="stable")[:pins]] = True

    def use(self, ids: np.ndarray) -> None:
        """A token used these ids (distinct)."""
        ids = ids.astype(np.intp, copy=False)  # once, not for every indexing
        self.score[ids] += self.gain
        self.last_used[ids] = self.clock
        self.pass_tokens(1)

    def pass_tokens(self, tokens: int) -> None:
        """All uses so far become `tokens` older."""
        self.clock += tokens
        fade = self.policy.decay**tokens if self.policy.decay else 1.0  # LRU looks at `last_used` alone
        if fade * RESCALE > self.gain:
            self.gain /= fade
        else:
            self.score[:-1] *= fade / self.gain
            self.gain = 1.0

    def use_many(self, ids: np.ndarray, used: np.ndarray) -> None:
        """After `pass_tokens(T)`: count the uses of these T tokens; used (T, n) bool: which of `ids` each used."""
        ages = np.arange(len(used), 0, -1)  # the last token is as old as one that `use` just counted
        self.score[ids] += self.gain * (self.policy.decay ** ages.astype(np.float64) @ used)
        last = self.clock - np.where(used, ages[:, None], self.clock + 1).min(0, initial=self.clock + 1)
        self.last_used[ids] = np.maximum(self.last_used[ids], last)

    @property
    def by_worth_alone(self) -> bool:
        """Whether the order of eviction follows from `worths` alone: there is no window, and no pins."""
        return not self.policy.window and self.pins is None

    @property
    def worths(self) -> tuple[np.ndarray, np.ndarray, float]:
        """(score, base, gain), where an id i is worth score[i] + gain * base[i]; base may be empty, which is 0."""
        if not self.policy.decay:
            return self.last_used, _NO_BASE, 0.0
        return self.score, _NO_BASE if self.base is None else self.base, self.gain

    def worth(self, ids: np.ndarray) -> np.ndarray:
        """The worth of ids (n,), fp64; comparable until the next use."""
        if not self.policy.decay:
            return self.last_used[ids].astype(np.float64)
        worth = self.score.take(ids)
        if self.base is not None:
            prior = self.base.take(ids)
            prior *= self.gain
            worth += prior
        return worth

    def rank(self, ids: np.ndarray) -> np.ndarray | None:
        """(n,) classes that are compared before worth: 0 ordinary, 1 in the window, 2 pinned. None where all are
        ordinary."""
        if not self.policy.window and self.pins is None:
            return None
        last = self.last_used[ids]
        rank = ((last >= 0) & (self.clock - last <= self.policy.window)).astype(np.int8)
        if self.pins is not None:
            rank[self.pins[ids]] = 2
        return rank

    def order(self, ids: np.ndarray) -> np.ndarray:
        """Positions in `ids` in the order of eviction; of equals the first comes first."""
        rank = self.rank(ids)
        worth = self.worth(ids)
        return np.argsort(worth, kind="stable") if rank is None else np.lexsort((worth, rank))

    def beats(self, ids: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(n,) bool: whether ids[k] is evicted strictly later than others[k]."""
        more = self.worth(ids) > self.worth(others)
        rank, rank_of_others = self.rank(ids), self.rank(others)
        if rank is None or rank_of_others is None:
            return more
        return (rank > rank_of_others) | (rank == rank_of_others) & more

    def first_to_go(self, ids: np.ndarray, count: int, protected: np.ndarray | None = None) -> np.ndarray:
        """Positions in `ids` of the `count` to evict first, ascending; of equals the first ones. Those at the positions
        `protected` are never evicted: fewer than `count` when too few are left."""
        spared = 0 if protected is None else len(protected)
        count = min(count, len(ids) - spared)
        if count <= 0:
            return np.empty(0, np.int64)
        worth, rank = self.worth(ids), self.rank(ids)
        if rank is None:
            if protected is not None:
                worth[protected] = np.inf
            return least(worth, count)
        if protected is not None:
            rank[protected] = PROTECTED
        chosen = np.zeros(len(ids), bool)
        for level in range(PROTECTED):
            group = np.flatnonzero(rank == level)
            chosen[group[least(worth[group], count)]] = True
            count = max(0, count - len(group))
        return np.flatnonzero(chosen)


def least(values: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` smallest values, ascending; of equals the first."""
    if not 0 < count < len(values):
        return np.arange(len(values) if count else 0)
    parted = values.copy()
    parted.partition(count - 1)  # cheaper than sorting, and exact about equals
    limit = parted[count - 1]
    chosen = (values <= limit).nonzero()[0]
    if len(chosen) > count:
        equal = (values[chosen] == limit).nonzero()[0]
        chosen = np.delete(chosen, equal[count - len(chosen) :])
    return chosen
