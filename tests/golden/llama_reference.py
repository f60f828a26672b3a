"""Relatives of Llama in plain PyTorch, for which transformers has no code of its own: MiniCPM, MiMo, InternLM2.

Written from the models' published configs and remote code; knows nothing of this project's decoders.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from .openelm_reference import rotate

Config = dict[str, Any]
LLAMA = {
    **{"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "o": "self_attn.o_proj"},
    **{"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    **{"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}
INTERNLM2 = {
    **{"embed": "model.tok_embeddings", "norm": "model.norm", "head": "output"},
    **{"attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "o": "attention.wo", "qkv": "attention.wqkv"},
    **{"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
}
NAMES = {"minicpm": LLAMA, "mimo": LLAMA, "internlm2": INTERNLM2}


def sizes(config: Config) -> tuple[int, int, int, int]:
    """Width, heads, heads of keys, items of a head."""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    return dim, heads, config["num_key_value_heads"], dim // heads


def tensor_shapes(config: Config) -> dict[str, list[int]]:
    (dim, heads, kv, size), names = sizes(config), NAMES[config["model_type"]]
    width, vocab = config["intermediate_size"], config["vocab_size"]
    rows = {"q": heads * size, "k": kv * size, "v": kv * size, "qkv": (heads + 2 * kv) * size, "o": dim}
    rows |= {"gate": width, "up": width, "down": dim}
    columns = {"o": heads * size, "down": width}
    biased = "qkv" if config["model_type"] == "mimo" else "qkv o" if config.get("bias") else ""
    shapes = {f"{names['embed']}.weight": [vocab, dim], f"{names['norm']}.weight": [dim]}
    if not config.get("tie_word_embeddings"):
        shapes[f"{names['head']}.weight"] = [vocab, dim]
    for i in range(config["num_hidden_layers"]):
        for role, name in names.items():
            whole = f"model.layers.{i}.{name}"
            if role.endswith("_norm"):
                shapes[f"{whole}.weight"] = [dim]
            elif role in rows:
                shapes[f"{whole}.weight"] = [rows[role], columns.get(role, dim)]
                if role in biased:
                    shapes[f"{whole}.bias"] = [rows[role]]
    return dict(sorted(shapes.items()))


class Model:
    """A folder's model; called as transformers' models are."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.names, self.weights = NAMES[self.config["model_type"]], load_file(folder / "model.safetensors")
        layers = self.config["num_hidden_layers"]
        self.residual = self.config.get("scale_depth", layers**0.5) / layers**0.5

    def linear(self, role: str, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        name = self.names[role] if layer is None else f"model.layers.{layer}.{self.names[role]}"
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, role: str, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        name = self.names[role] if layer is None else f"model.layers.{layer}.{self.names[role]}"
        return (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
            * self.weights[f"{name}.weight"]
        )

    def __call__(self, ids: torch.Tensor, use_cache: bool = False) -> Any:
        config = self.config
        x = F.embedding(ids[0], self.weights[f"{self.names['embed']}.weight"]) * config.get("scale_emb", 1)
        for i in range(config["num_hidden_layers"]):
            x = x + self.attention(i, self.norm("attn_norm", x, i)) * self.residual
            inner = self.norm("ffn_norm", x, i)
            gated = F.silu(self.linear("gate", inner, i)) * self.linear("up", inner, i)
            x = x + self.linear("down", gated, i) * self.residual
        x = self.norm("norm", x)
        if "dim_model_base" in config:
            x = x / (config["hidden_size"] / config["dim_model_base"])
        return SimpleNamespace(logits=self.linear("embed" if config.get("tie_word_embeddings") else "head", x)[None])

    def attention(self, i: int, x: torch.Tensor) -> torch.Tensor:  # (T, d) -> (T, d)
        _, heads, kv, size = sizes(self.config)
        if "qkv" in self.names:  # by heads of keys: the queries that share one, then its key and its value
            groups = self.linear("qkv", x, i).view(len(x), kv, heads // kv + 2, size)
            q, k, v = groups[:, :, :-2].reshape(len(x), heads, size), groups[:, :, -2], groups[:, :, -1]
        else:
            q, k, v = (self.linear(role, x, i).view(len(x), -1, size) for role in "qkv")
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        scaling = self.config.get("rope_scaling") or {"type": "default"}
        factor = {"default": 1.0, "linear": scaling.get("factor")}[scaling["type"]]
        q, k = (rotate(each, self.config["rope_theta"], factor) for each in (q, k))
        k, v = k.repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
        scores = q @ k.transpose(-1, -2) * size**-0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.linear("o", mixed.transpose(0, 1).reshape(len(x), -1), i)
