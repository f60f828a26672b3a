"""The numpy decoder (models/numpy/decoder.py) again in PyTorch, so that it can be trained; built from a `ModelSpec`.

Shapes: B texts of T tokens, d the width, H query heads that share K key/value heads of size D, I neurons of a layer.
Weights are a dict under the checkpoint's names. Knows no files, no text and no losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.rotary import attention_factor, inverse_frequencies

Weights = Mapping[str, torch.Tensor]


@dataclass
class Seen:
    """Intermediate values of one call, per layer: `gates` (B, T, I) before the activation, `ups` (B, T, I), `hidden`
    (B, T, d) after the layer."""

    gates: list[torch.Tensor] = field(default_factory=list)
    ups: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


class TorchCache:
    """Keys and values of B texts: per layer (B, K, context, D)."""

    def __init__(self, spec: ModelSpec, batch: int, context: int, like: torch.Tensor):
        shapes = [(batch, layer.kv_heads, context, spec.head_dim) for layer in spec.layers]
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for shape in shapes]
        self.length = 0


class TorchDecoder:
    """`decoder(ids)` gives the logits (B, T, vocab) of ids (B, T).

    cutoffs: None for SiLU; else a layer's activation is x where x > its cutoff and 0 elsewhere (0: ReLU).
    """

    def __init__(self, spec: ModelSpec, weights: Weights, cutoffs: Sequence[float] | None, context: int):
        self.spec, self.weights, self.cutoffs = spec, weights, cutoffs
        assert spec.gated and spec.rope is not None
        self.embed = weights[spec.name("embed") + ".weight"]
        self.head = self.embed if spec.tied else weights[spec.name("head") + ".weight"]
        angles = np.arange(context)[:, None] * inverse_frequencies(spec.rope, spec.head_dim, context)
        turns = np.stack([np.cos(angles), np.sin(angles)]) * attention_factor(spec.rope, context)
        turns = turns.astype(np.float32)
        self.turns = torch.from_numpy(turns).to(self.embed.device)  # (2, context, D/2)

    def __call__(self, ids: torch.Tensor, cache: TorchCache | None = None, seen: Seen | None = None) -> torch.Tensor:
        start = cache.length if cache else 0
        x = F.embedding(ids, self.embed)
        for index in range(len(self.spec.layers)):
            x = x + self.attend(index, self.norm("attn_norm", x, index), cache, start)
            x = x + self.ffn(index, self.norm("ffn_norm", x, index), seen)
            if seen is not None:
                seen.hidden.append(x)
        if cache:
            cache.length = start + ids.shape[1]
        return F.linear(self.norm("norm", x, 0), self.head)

    def linear(self, role: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        name = self.spec.name(role, layer)
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, role: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.spec.eps)
        return wide.to(x.dtype) * self.weights[self.spec.name(role, layer) + ".weight"]

    def attend(self, index: int, x: torch.Tensor, cache: TorchCache | None, start: int) -> torch.Tensor:
        shape, size = self.spec.layers[index], self.spec.head_dim
        if "qkv" in self.spec.table.names:
            q, k, v = self.linear("qkv", x, index).split([n * size for n in (shape.heads, *[shape.kv_heads] * 2)], -1)
        else:
            q, k, v = (self.linear(role, x, index) for role in ("q", "k", "v"))
        q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))  # (B, T, H or K, D)
        if self.spec.qk_norm:
            q, k = self.norm("q_norm", q, index), self.norm("k_norm", k, index)
        q, k, v = (part.transpose(1, 2) for part in (self.rope(q, start), self.rope(k, start), v))  # (B, H or K, T, D)
        if cache:
            keys, values = cache.layers[index]
            end = start + x.shape[1]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        many, window = shape.heads // shape.kv_heads, shape.window or start + x.shape[1]
        if x.shape[1] == 1:  # the heads that share keys take the place of the tokens: nothing is copied
            k, v = k[:, :, -window:], v[:, :, -window:]
            y = F.scaled_dot_product_attention(q.reshape(len(x), -1, many, size), k, v)
            return self.linear("o", y.reshape(len(x), 1, -1), index)
        if many > 1:
            k, v = k.repeat_interleave(many, 1), v.repeat_interleave(many, 1)
        mask = None
        if start or window < x.shape[1]:  # `is_causal` counts from the first key, as if nothing came before
            mask = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool, device=x.device)
            mask = mask.tril(start).triu(start + 1 - window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, H, T, D)
        return self.linear("o", y.transpose(1, 2).flatten(2), index)

    def rope(self, x: torch.Tensor, start: int) -> torch.Tensor:  # (B, T, H, D)
        cos, sin = self.turns[:, start : start + x.shape[1], None, :].to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def ffn(self, index: int, x: torch.Tensor, seen: Seen | None) -> torch.Tensor:
        if "gate+up" in self.spec.table.names:
            gate, up = self.linear("gate+up", x, index).chunk(2, -1)
        else:
            gate, up = self.linear("gate", x, index), self.linear("up", x, index)
        if seen is not None:
            seen.gates.append(gate)
            seen.ups.append(up)
        return self.linear("down", self.activate(index, gate) * up, index)

    def activate(self, index: int, gate: torch.Tensor) -> torch.Tensor:
        if self.cutoffs is None:
            return F.silu(gate)
        return torch.where(gate > self.cutoffs[index], gate, 0.0)


@torch.no_grad()
def sample_texts(
    decoder: TorchDecoder, count: int, length: int, bos: int, ends: Sequence[int], generator: torch.Generator
) -> torch.Tensor:
    """(count, length) ids that the model writes after `bos` at temperature 1; after an end token a new text begins."""
    ids = torch.full((count, length), bos, device=decoder.embed.device)
    cache = TorchCache(decoder.spec, count, length, decoder.embed)
    stops = torch.tensor([end for end in ends if end != bos], device=ids.device)
    for at in range(1, length):
        logits = decoder(ids[:, at - 1 : at], cache)[:, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        ids[:, at] = torch.where(torch.isin(ids[:, at - 1], stops), bos, drawn)
    return ids
