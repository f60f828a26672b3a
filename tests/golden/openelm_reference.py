"""OpenELM in plain PyTorch, as Apple's modeling_openelm.py computes it: transformers has no code of its own for it.

Written from the paper (arXiv 2404.14619) and the published config's keys; knows nothing of this project's decoders.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

Config = dict[str, Any]
EPS = 1e-6  # not in the config


def divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least 90 % of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def tensor_shapes(config: Config) -> dict[str, list[int]]:
    dim, head = config["model_dim"], config["head_dim"]
    shapes = {"transformer.token_embeddings.weight": [config["vocab_size"], dim], "transformer.norm.weight": [dim]}
    if not config["share_input_output_layers"]:
        shapes["lm_head.weight"] = [config["vocab_size"], dim]
    for i in range(config["num_transformer_layers"]):
        layer, heads, kv = f"transformer.layers.{i}.", config["num_query_heads"][i], config["num_kv_heads"][i]
        width = divisible(config["ffn_multipliers"][i] * dim, config["ffn_dim_divisor"])
        shapes |= {
            f"{layer}attn.qkv_proj.weight": [(heads + 2 * kv) * head, dim],
            f"{layer}attn.out_proj.weight": [dim, heads * head],
            f"{layer}attn_norm.weight": [dim],
            f"{layer}ffn.proj_1.weight": [2 * width, dim],
            f"{layer}ffn.proj_2.weight": [dim, width],
            f"{layer}ffn_norm.weight": [dim],
        }
        if config["normalize_qk_projections"]:
            shapes |= {f"{layer}attn.{name}_norm.weight": [head] for name in "qk"}
    return dict(sorted(shapes.items()))


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor, base: float, factor: float = 1.0) -> torch.Tensor:  # (heads, T, head_dim)
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32) / factor, frequencies)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Model:
    """A folder's model; called as transformers' models are."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def __call__(self, ids: torch.Tensor, use_cache: bool = False) -> Any:
        x = F.embedding(ids[0], self.weights["transformer.token_embeddings.weight"])
        for i in range(self.config["num_transformer_layers"]):
            x = x + self.attention(i, rms_norm(x, self.of(i, "attn_norm")))
            gate, up = (rms_norm(x, self.of(i, "ffn_norm")) @ self.of(i, "ffn.proj_1").T).chunk(2, -1)
            activation = {"swish": F.silu, "relu": F.relu}[self.config["activation_fn_name"]]
            x = x + (activation(gate) * up) @ self.of(i, "ffn.proj_2").T
        tied = self.config["share_input_output_layers"]
        head = self.weights["transformer.token_embeddings.weight" if tied else "lm_head.weight"]
        return SimpleNamespace(logits=(rms_norm(x, self.weights["transformer.norm.weight"]) @ head.T)[None])

    def of(self, layer: int, name: str) -> torch.Tensor:
        return self.weights[f"transformer.layers.{layer}.{name}.weight"]

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:  # (T, d) -> (T, d)
        heads, kv, size = self.config["num_query_heads"][i], self.config["num_kv_heads"][i], self.config["head_dim"]
        qkv = (x @ self.of(i, "attn.qkv_proj").T).view(len(x), heads + 2 * kv, size).transpose(0, 1)
        q, k, v = qkv.split([heads, kv, kv])
        if self.config["normalize_qk_projections"]:
            q, k = rms_norm(q, self.of(i, "attn.q_norm")), rms_norm(k, self.of(i, "attn.k_norm"))
        q, k = rotate(q, self.config["rope_freq_constant"]), rotate(k, self.config["rope_freq_constant"])
        k, v = k.repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
        scores = q @ k.transpose(-1, -2) * size**-0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return mixed.transpose(0, 1).reshape(len(x), -1) @ self.of(i, "attn.out_proj").T
