"""The prompt cache: the KV cache that one turn of a conversation leaves for the next one, and the tokens it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PromptCache:
    """The cache of the last reply, and the ids whose keys and values it holds.

    `ids` are right at every moment, so that a reply may be abandoned or interrupted; the cache may hold more.
    """

    cache: Any = None
    ids: list[int] = field(default_factory=list)

    def prefix_length(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens at the beginning of a prompt are in the cache. The prompt's last token never counts: it runs
        for its logits."""
        most = min(len(self.ids), len(prompt_ids) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt_ids[i]), max(most, 0))
