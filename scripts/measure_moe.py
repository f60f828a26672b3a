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
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure_convert_3b import Table, capped, run

from mlx_flash.random_model import make_random
from mlx_flash.source import read_tensors

CAP_MIB, NO_CAP_MIB = 1024, 12288
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
        """Both under `capped`, which takes some of the processors' time to look at the memory."""
        command = [sys.executable, Path(__file__).with_name("decode_once.py"), "--model", self.model]
        memory = BUDGET if cap else EVERYTHING
        command += ["--select", "router", "--memory", memory, "--context", "512", *options]
        output, _, peak = capped(self.tools, CAP_MIB if cap else NO_CAP_MIB, *command)
        found = dict(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))
        return found | {"peak_over_budget_bytes": peak - found["budget_bytes"]}

    def llama(self, cap: bool) -> dict[str, float]:
        command = [sys.executable, self.tools / "decode_llama_cpp.py", self.gguf, "6" if cap else "16"]
        output = capped(self.tools, CAP_MIB, *command)[0] if cap else run(*command)
        found = re.search(r"median_s ([\d.]+)", output)
        assert found is not None, output
        return {"s_per_token": float(found[1])}

    def fio(self) -> dict[str, float]:
        """Reads of an expert's size, anywhere."""
        command = ["fio", "--name=reads", f"--filename={self.gguf}", "--readonly", "--ioengine=libaio", "--direct=1"]
        command += ["--rw=randread", f"--bs={EXPERT_BYTES}", "--norandommap", "--iodepth=8", "--runtime=3"]
        command += ["--time_based", "--output-format=json"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
        return {"bytes_per_s": read["io_bytes"] / read["runtime"] * 1000}

    def contestants(self) -> dict[str, Callable[[], dict[str, float]]]:
        short = ("--warm", "3", "--tokens", "12")
        found: dict[str, Callable[[], dict[str, float]]] = {
            "experts, cap": lambda: self.flash(True, *short),
            "llama.cpp, cap": lambda: self.llama(True),
            "fio": self.fio,
            "experts, in memory": lambda: self.flash(False, "--warm", "40", "--tokens", "12"),
            "llama.cpp, in memory": lambda: self.llama(False),
        }
        if self.args.trace:
            trace = ("--routes", self.args.trace, "--warm", "60", "--tokens", "40")
            found["experts, a trace's choices, cap"] = lambda: self.flash(True, *trace)
        return found


def report(table: Table) -> None:
    """The ratios that are asked for, as far as their parts were measured."""

    def ratio(text: str, of: Callable[[], float], asked: str) -> None:
        try:
            print(f"{text}: {of():.2f} ({asked})")
        except KeyError as missing:
            print(f"{text}: not measured, {missing} is missing")

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder with capped, decode_llama_cpp.py")
    parser.add_argument("--work", type=Path, required=True, help="temporary folder, 11 GB; deleted at the end")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", type=Path, help="a route trace whose choices one contestant follows")
    parser.add_argument("--only", nargs="+", help="contestants whose names begin with one of these")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a further run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    machine, table = Machine(args), Table(args.csv)
    try:
        machine.prepare()
        names = [n for n in machine.contestants() if not args.only or n.startswith(tuple(args.only))]
        for number in range(args.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                table.add(name, number, **machine.contestants()[name]())
        report(table)
    finally:
        if not args.keep:
            shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
