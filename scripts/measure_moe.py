"""Measure decoding of a mixture of experts of about 5 GB, bf16, under a memory cap, against llama.cpp and the disk.

    python scripts/measure_moe.py --tools ../shared/tools --work DIR --csv FILE [--rounds 3] [--only WORD] [--trace CSV]

Linux, root, cgroup v1 (for `capped`), fio, llama-cpp-python and gguf installed; 11 GB of disk. Qwen3-MoE's architecture
with 12 layers of 64 experts, 8 per token, in dimensions of ours; both run the same random weights. A random router
chooses about uniformly, which no cache can serve: nearly every expert is read anew. With --trace a real router's
choices replace it in one contestant: every fourth layer of the trace, its experts folded onto 64.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contestants, Table, arguments, contest, decode_flash, decode_llama, fio

from mlx_flash.models.specs.source import read_tensors
from mlx_flash.tools.random_model import make_random

CAP_MIB, NO_CAP_MIB = 1024, 12288
DEPTH = 32  # of fio's reads: the rate grows no more beyond it
BUDGET, EVERYTHING = "0.70GB", "6GB"
CONFIG: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 12, "intermediate_size": 6144},
    **{"moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000, "hidden_act": "silu"},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    **{"max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERT_BYTES = 3 * 2 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
NAMES = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"},
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{f"mlp.switch_mlp.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
}


def write_gguf(folder: Path, path: Path) -> None:
    """The same weights for llama.cpp."""
    import gguf

    writer, c = gguf.GGUFWriter(path, "qwen3moe"), CONFIG
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_count(c["num_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in read_tensors(folder).items():
        module = name.removesuffix(".weight")
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            known[module] = f"blk.{layer[1]}.{NAMES[layer[2]]}"
        shape = tuple(tensor.info.shape)
        values = np.memmap(tensor.path, np.uint16, "r", tensor.info.offset, shape)
        if len(shape) == 1 or "ffn_gate_inp" in known[module]:
            writer.add_tensor(f"{known[module]}.weight", (values.astype(np.uint32) << 16).view(np.float32))
        else:
            data = values.view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(f"{known[module]}.weight", data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Machine:
    """The files that the contestants work on, and one method per contestant, each returning its quantities."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tools = args, args.tools
        self.model, self.gguf = args.work / "qwen3-moe-5gb", args.work / "qwen3-moe-5gb.gguf"

    def prepare(self) -> None:
        if not self.model.exists():
            card = self.args.work / "config.json"
            card.write_text(json.dumps(CONFIG))
            make_random(card, self.model)
        if not self.gguf.exists():
            write_gguf(self.model, self.gguf)

    def flash(self, cap: bool, *options: str | Path) -> dict[str, float]:
        memory, limit = (BUDGET, CAP_MIB) if cap else (EVERYTHING, NO_CAP_MIB)
        settings = ("--select", "router", "--memory", memory, "--context", "512")
        return decode_flash(self.tools, self.model, limit, *settings, *options)

    def contestants(self) -> Contestants:
        short = ("--warm", "3", "--tokens", "12")
        found: Contestants = {
            "experts, cap": lambda: self.flash(True, *short),
            "llama.cpp, cap": lambda: decode_llama(self.tools, self.gguf, CAP_MIB, 6),
            "fio": lambda: fio(sorted(self.model.glob("*.safetensors")), EXPERT_BYTES, DEPTH, True),
            "experts, in memory": lambda: self.flash(False, "--warm", "40", "--tokens", "12"),
            "llama.cpp, in memory": lambda: decode_llama(self.tools, self.gguf, None),
        }
        if self.args.trace:
            trace = ("--routes", self.args.trace, "--warm", "60", "--tokens", "40")
            found["experts, a trace's choices, cap"] = lambda: self.flash(True, *trace)
        return found


def report(table: Table) -> None:
    """The ratios that are asked for, as far as their parts were measured."""

    ratio = table.ratio

    def seconds(what: str) -> float:
        return table.median(what, "s_per_token")

    ours, local = "experts, cap", "experts, a trace's choices, cap"
    ratio("llama.cpp mmap / ours, same cap", lambda: seconds("llama.cpp, cap") / seconds(ours), ">= 5, aim 8")
    for what in (ours, local):
        ratio(
            f"read rate / fio's at an expert's size, {what}",
            lambda what=what: (
                table.median(what, "bytes_per_token") / seconds(what) / table.median("fio", "bytes_per_s")
            ),
            "aim >= 0.85",
        )
        ratio(
            f"anonymous peak - budget, GB, {what}",
            lambda what=what: table.median(what, "peak_over_budget_bytes") / 1e9,
            "<= 0.35",
        )
    ratio("llama.cpp mmap / ours with a trace's choices", lambda: seconds("llama.cpp, cap") / seconds(local), "-")
    ratio(
        "llama.cpp in memory / ours in memory",
        lambda: seconds("llama.cpp, in memory") / seconds("experts, in memory"),
        "-",
    )


def main() -> None:
    parser = arguments(__doc__, "11 GB", 3)
    parser.add_argument("--trace", type=Path, help="a route trace whose choices one contestant follows")
    contest(parser.parse_args(), Machine, report)


if __name__ == "__main__":
    main()
