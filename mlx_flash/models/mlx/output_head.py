"""The output head of mlx-lm's models: tied to the embedding or not, as the checkpoint has it. Needs mlx.

Some of mlx-lm's architectures never share the embedding, others always do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_flash.models.specs.head_tensors import embedding_of, fields_of, head_of


class UntiedEmbedding(nn.Module):
    """An embedding with a head of its own, for an architecture that takes the embedding as its head."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = embedding.weight
        vocab, dim = embedding.weight.shape
        self.head = nn.Linear(dim, vocab, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight[ids]

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def fit_head(model: nn.Module, weights: Mapping[str, mx.array], tied: bool) -> dict[str, mx.array]:
    """The weights as the model takes them, the model changed where it has no place for a head. tied: the checkpoint's
    head is its embedding."""
    parameters: Any = tree_flatten(model.parameters())
    names = [name for name, _ in parameters]
    place, given, embedding = head_of(names), head_of(weights), embedding_of(names)
    found = dict(weights)
    if embedding is None:
        return found
    if tied and place is not None and place not in found:
        for name in fields_of(embedding, found):
            found[place.removesuffix("weight") + name.rpartition(".")[2]] = found[name]
    if not tied and place is None and given is not None and fields_of(given, found) == [given]:
        path = embedding.removesuffix(".weight")
        module = dict(model.named_modules()).get(path)
        if type(module) is nn.Embedding and fields_of(embedding, found) == [embedding]:
            model.update_modules(tree_unflatten([(path, UntiedEmbedding(module))]))
            found[f"{path}.head.weight"] = found.pop(given)
    return found
