"""Measure decoding and prompts on OpenELM-3B's geometry, bf16, against llama.cpp and against the disk and the kernels.

    python scripts/measure_decode_3b.py --tools ../shared/tools --work DIR --csv FILE [--rounds 5] [--only WORD]

Linux, root, cgroup v1 (for `capped`), fio, llama-cpp-python and gguf installed; 25 GB of disk, 16 GB of memory.
Random weights: mechanism and speed, not quality. The contestants alternate; medians and their ratios are printed,
every run is in the CSV. All run under `capped`, whose looking at the memory takes some of the processors' time; "alone"
is llama.cpp without it. `predictor` replays a trace: 10 % of the neurons named per token, 2.4 % new.
"""

from __future__ import annotations

import argparse
import sys

from contest import Contestants, Table, arguments, contest, decode_flash, decode_llama, fio, run

from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.tools.bench.random_checkpoint import attach_random_predictors, make_card
from mlx_flash.tools.bench.trace_replay import synthetic_trace
from mlx_flash.tools.trace import Trace

CAP_MIB, NO_CAP_MIB = 3072, 20480
BUDGET = "2.84GB"  # and 0.35 GB for the interpreter and its libraries
CAP_4_BIT_MIB, BUDGET_4_BIT = 1280, "0.98GB"
EVERYTHING = "16GB"
DEPTH, BUNDLE_BYTES, PROMPT = 256, 18432, 512


class Machine:
    """The files that the contestants work on, and one method per contestant, each returning its quantities."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tools, self.work = args, args.tools, args.work
        self.flash, self.gguf = self.work / "flash", self.work / "openelm-3b.gguf"
        self.trace = self.work / "trace.npz"
        self.flash_4_bit, self.gguf_4_bit = self.work / "4-bit" / "flash", self.work / "openelm-3b-q4.gguf"

    def prepare(self) -> None:
        self.prepare_flash()
        if not self.gguf.exists():
            run(sys.executable, self.tools / "make_openelm_gguf.py", self.gguf, "BF16")

    def prepare_flash(self) -> None:
        """The flash checkpoint, its trace and predictors."""
        if not self.flash.exists():
            make_card("openelm-3b", self.work, relu=True)
            checkpoint = Checkpoint.open(self.flash)
            trace = synthetic_trace([layout.count for layout in checkpoint.layouts], 128)
            trace.save(self.trace)
            attach_random_predictors(checkpoint, trace)

    def prepare_4_bit(self) -> None:
        if not self.flash_4_bit.exists():
            self.flash_4_bit.parent.mkdir(exist_ok=True)
            make_card("openelm-3b", self.flash_4_bit.parent, relu=True, bits=4)
            attach_random_predictors(Checkpoint.open(self.flash_4_bit), Trace.load(self.trace))
        if not self.gguf_4_bit.exists():
            run(sys.executable, self.tools / "make_openelm_gguf.py", self.gguf_4_bit, "Q4_0")

    def flash_run(self, cap: bool, *options: str) -> dict[str, float]:
        return decode_flash(self.tools, self.flash, CAP_MIB if cap else NO_CAP_MIB, *options)

    def predictor(self, cap: bool) -> dict[str, float]:
        memory = BUDGET if cap else EVERYTHING
        return self.flash_run(cap, "--select", "predictor", "--memory", memory, "--trace", str(self.trace))

    def predictor_4_bit(self, cap: bool) -> dict[str, float]:
        self.prepare_4_bit()
        options = ("--select", "predictor", "--memory", BUDGET_4_BIT if cap else EVERYTHING, "--trace", str(self.trace))
        return decode_flash(self.tools, self.flash_4_bit, CAP_4_BIT_MIB if cap else NO_CAP_MIB, *options)

    def llama_4_bit(self, cap_mib: int | None) -> dict[str, float]:
        self.prepare_4_bit()
        return decode_llama(self.tools, self.gguf_4_bit, cap_mib)

    def everything(self, cap: bool) -> dict[str, float]:
        short = ("--warm", "2", "--tokens", "6")
        return self.flash_run(cap, "--select", "all", "--memory", BUDGET if cap else EVERYTHING, *short)

    def prompt(self, cap: bool) -> dict[str, float]:
        short = ("--warm", "0", "--tokens", "0", "--prompt", str(PROMPT), "--context", "640")
        if cap:
            return self.flash_run(True, "--select", "all", "--memory", BUDGET, *short)
        # Twice in one process: the first prompt also fills the slots.
        return self.flash_run(False, "--select", "all", "--memory", EVERYTHING, *short, "--again")

    def fio(self, scattered: bool) -> dict[str, float]:
        files = sorted((self.flash / "flash").glob("layer-*.safetensors"))
        return fio(files, BUNDLE_BYTES if scattered else 1 << 20, DEPTH if scattered else 8, scattered)

    def contestants(self) -> Contestants:
        return {
            "predictor, cap": lambda: self.predictor(True),
            "predictor, in memory": lambda: self.predictor(False),
            "all, cap": lambda: self.everything(True),
            "all, in memory": lambda: self.everything(False),
            "llama.cpp, cap": lambda: decode_llama(self.tools, self.gguf, CAP_MIB, 6),  # each takes seconds
            "llama.cpp, in memory": lambda: decode_llama(self.tools, self.gguf, NO_CAP_MIB),
            "llama.cpp alone, in memory": lambda: decode_llama(self.tools, self.gguf, None),
            "4-bit predictor, cap": lambda: self.predictor_4_bit(True),
            "4-bit predictor, in memory": lambda: self.predictor_4_bit(False),
            "4-bit llama.cpp, in memory": lambda: self.llama_4_bit(NO_CAP_MIB),
            "4-bit llama.cpp alone, in memory": lambda: self.llama_4_bit(None),
            "fio scattered": lambda: self.fio(True),
            "fio in order": lambda: self.fio(False),
            "prompt, cap": lambda: self.prompt(True),
            "prompt, in memory": lambda: self.prompt(False),
        }


def report(table: Table) -> None:
    """The ratios that are asked for, as far as their parts were measured."""

    ratio = table.ratio

    def seconds(what: str) -> float:
        return table.median(what, "s_per_token")

    def limit() -> float:
        reads = table.median("predictor, cap", "bytes_per_token") / table.median("fio scattered", "bytes_per_s")
        return max(reads, seconds("predictor, in memory"))

    def prompt_limit() -> float:
        reads = table.median("prompt, cap", "prefill_bytes") / table.median("fio in order", "bytes_per_s")
        return max(reads, table.median("prompt, in memory", "prefill_s"))

    ours, exact = "predictor, cap", "all, cap"
    ratio("llama.cpp mmap / predictor, same cap", lambda: seconds("llama.cpp, cap") / seconds(ours), ">= 12, aim 25")
    ratio("predictor / max(reads at fio's rate, kernels in memory)", lambda: seconds(ours) / limit(), "<= 1.3")
    ratio("llama.cpp in memory / predictor", lambda: seconds("llama.cpp, in memory") / seconds(ours), ">= 1.5, aim 2")
    ratio(
        "llama.cpp Q4_0 in memory / 4-bit predictor, cap of 1280 MiB",
        lambda: seconds("4-bit llama.cpp, in memory") / seconds("4-bit predictor, cap"),
        ">= 1",
    )
    ratio("llama.cpp mmap / all, same cap", lambda: seconds("llama.cpp, cap") / seconds(exact), ">= 1.6")
    ratio(
        "read rate under `all` / fio's in order",
        lambda: table.median(exact, "bytes_per_token") / seconds(exact) / table.median("fio in order", "bytes_per_s"),
        ">= 0.9",
    )
    ratio(
        "llama.cpp in memory / all in memory",
        lambda: seconds("llama.cpp, in memory") / seconds("all, in memory"),
        ">= 1",
    )
    ratio(
        "limit / prompt of 512 tokens, cap",
        lambda: prompt_limit() / table.median("prompt, cap", "prefill_s"),
        ">= 0.75",
    )
    for what in (ours, exact, "prompt, cap"):
        ratio(
            f"anonymous peak - budget, GB, {what}",
            lambda what=what: table.median(what, "peak_over_budget_bytes") / 1e9,
            "<= 0.35",
        )


def main() -> None:
    contest(arguments(__doc__, "25 GB", 5).parse_args(), Machine, report)


if __name__ == "__main__":
    main()
