"""What one turn of a conversation leaves for the next: a KV cache, and the tokens that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PromptCache:
    """The cache of the last reply and the ids in it, whose keys and values need not be computed again.

    `ids` are right at every moment, so that a reply may be abandoned or interrupted; the cache may hold more.
    """

    cache: Any = None
    ids: list[int] = field(default_factory=list)

    def common(self, prompt_ids: Sequence[int]) -> int:
        """With how many of the ids held a prompt begins, its last one aside: that one runs for its logits."""
        most = min(len(self.ids), len(prompt_ids) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt_ids[i]), max(most, 0))
