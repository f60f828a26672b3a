"""The names of a checkpoint's embedding and output head, in any family's spelling. Knows names only."""

from __future__ import annotations

import re
from collections.abc import Collection

HEAD = re.compile(r"(?:(?:\w+\.)*(?:lm_head|embed_out)|output)\.weight")
EMBEDDING = re.compile(
    r"(?:\w+\.)*(?:embed_tokens|word_embeddings|token_embeddings|tok_embeddings|embed_in|wte|backbone\.embeddings)\.weight"
)
FIELDS = ("weight", "scales", "biases")  # of a matrix that is quantised


def head_of(names: Collection[str]) -> str | None:
    """The name of the output head's matrix, such as `lm_head.weight`; None if there is none."""
    return _only(HEAD, names)


def embedding_of(names: Collection[str]) -> str | None:
    """The name of the embedding's matrix; None if it is not recognised."""
    return _only(EMBEDDING, names)


def _only(pattern: re.Pattern[str], names: Collection[str]) -> str | None:
    """The one name that fits. Of several (a second model within, such as one that predicts further tokens) none is
    surely the one that is meant, but the shortest if it is alone."""
    found = sorted((name for name in names if pattern.fullmatch(name)), key=lambda name: name.count("."))
    if len(found) > 1 and found[0].count(".") == found[1].count("."):
        return None
    return found[0] if found else None


def fields_of(name: str, names: Collection[str]) -> list[str]:
    """The tensors of a matrix `x.weight` that are there: itself, and its scales and biases where it is quantised."""
    module = name.removesuffix("weight")
    return [module + field for field in FIELDS if module + field in names]
