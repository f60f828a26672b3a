"""Measure decoding and prompts on OpenELM-3B's geometry, bf16, against llama.cpp and against the disk and the kernels.

    python scripts/measure_decode_3b.py --tools ../shared/tools --work DIR --csv FILE [--rounds 5] [--only WORD]

Linux, root, cgroup v1 (for `capped`), fio, llama-cpp-python and gguf installed; 25 GB of disk, 16 GB of memory.
Random weights: mechanism and speed, not quality. The contestants alternate; medians and their ratios are printed,
every run is in the CSV. `predictor` replays a trace: 10 % of the neurons named per token, 2.4 % new.
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

from measure_convert_3b import Table, capped, run

from mlx_flash.measure.card import attach_random_predictors, make_card
from mlx_flash.measure.replay import synthetic_trace
from mlx_flash.measure.trace import Trace
from mlx_flash.storage.checkpoint import Checkpoint

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
        if not self.flash.exists():
            make_card("openelm-3b", self.work, relu=True)
            checkpoint = Checkpoint.open(self.flash)
            trace = synthetic_trace([layout.count for layout in checkpoint.layouts], 128)
            trace.save(self.trace)
            attach_random_predictors(checkpoint, trace)
        if not self.gguf.exists():
            run(sys.executable, self.tools / "make_openelm_gguf.py", self.gguf, "BF16")

    def prepare_4_bit(self) -> None:
        if not self.flash_4_bit.exists():
            self.flash_4_bit.parent.mkdir(exist_ok=True)
            make_card("openelm-3b", self.flash_4_bit.parent, relu=True, bits=4)
            attach_random_predictors(Checkpoint.open(self.flash_4_bit), Trace.load(self.trace))
        if not self.gguf_4_bit.exists():
            run(sys.executable, self.tools / "make_openelm_gguf.py", self.gguf_4_bit, "Q4_0")

    def flash_run(self, cap: bool, *options: str) -> dict[str, float]:
        return self.decode(self.flash, CAP_MIB if cap else NO_CAP_MIB, *options)

    def decode(self, model: Path, cap_mib: int, *options: str) -> dict[str, float]:
        """Always under `capped`, which takes some of the processors' time to look at the memory."""
        command = [sys.executable, Path(__file__).with_name("decode_once.py"), "--model", model, *options]
        output, _, peak = capped(self.tools, cap_mib, *command)
        found = dict(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))
        return found | {"peak_over_budget_bytes": peak - found["budget_bytes"]}

    def predictor(self, cap: bool) -> dict[str, float]:
        memory = BUDGET if cap else EVERYTHING
        return self.flash_run(cap, "--select", "predictor", "--memory", memory, "--trace", str(self.trace))

    def everything(self, cap: bool) -> dict[str, float]:
        short = ("--warm", "2", "--tokens", "6")
        return self.flash_run(cap, "--select", "all", "--memory", BUDGET if cap else EVERYTHING, *short)

    def prompt(self, cap: bool) -> dict[str, float]:
        short = ("--warm", "0", "--tokens", "0", "--prompt", str(PROMPT), "--context", "640")
        if cap:
            return self.flash_run(True, "--select", "all", "--memory", BUDGET, *short)
        # Twice in one process: the first prompt also fills the slots.
        return self.flash_run(False, "--select", "all", "--memory", EVERYTHING, *short, "--again")

    def predictor_4_bit(self, cap: bool) -> dict[str, float]:
        self.prepare_4_bit()
        options = ("--select", "predictor", "--memory", BUDGET_4_BIT if cap else EVERYTHING, "--trace", str(self.trace))
        return self.decode(self.flash_4_bit, CAP_4_BIT_MIB if cap else NO_CAP_MIB, *options)

    def llama_4_bit(self) -> dict[str, float]:
        self.prepare_4_bit()
        return self.llama(False, self.gguf_4_bit)

    def llama(self, cap: bool, gguf: Path | None = None) -> dict[str, float]:
        command = [sys.executable, self.tools / "decode_llama_cpp.py", gguf or self.gguf, "6" if cap else "16"]
        output = capped(self.tools, CAP_MIB, *command)[0] if cap else run(*command)
        found = re.search(r"median_s ([\d.]+)", output)
        assert found is not None, output
        return {"s_per_token": float(found[1])}

    def fio(self, scattered: bool) -> dict[str, float]:
        files = ":".join(str(path) for path in sorted((self.flash / "flash").glob("layer-*.safetensors")))
        block = BUNDLE_BYTES if scattered else 1 << 20
        command = ["fio", "--name=reads", f"--filename={files}", "--readonly", "--ioengine=libaio", "--direct=1"]
        command += [f"--rw={'randread' if scattered else 'read'}", f"--bs={block}", "--norandommap"]
        command += [f"--iodepth={DEPTH if scattered else 8}", "--runtime=3", "--time_based", "--output-format=json"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
        return {"bytes_per_s": read["io_bytes"] / read["runtime"] * 1000}

    def contestants(self) -> dict[str, Callable[[], dict[str, float]]]:
        return {
            "predictor, cap": lambda: self.predictor(True),
            "predictor, in memory": lambda: self.predictor(False),
            "all, cap": lambda: self.everything(True),
            "all, in memory": lambda: self.everything(False),
            "llama.cpp, cap": lambda: self.llama(True),
            "llama.cpp, in memory": lambda: self.llama(False),
            "4-bit predictor, cap": lambda: self.predictor_4_bit(True),
            "4-bit predictor, in memory": lambda: self.predictor_4_bit(False),
            "4-bit llama.cpp, in memory": lambda: self.llama_4_bit(),
            "fio scattered": lambda: self.fio(True),
            "fio in order": lambda: self.fio(False),
            "prompt, cap": lambda: self.prompt(True),
            "prompt, in memory": lambda: self.prompt(False),
        }


def report(table: Table) -> None:
    """The ratios that are asked for, as far as their parts were measured."""

    def ratio(text: str, of: Callable[[], float], asked: str) -> None:
        try:
            print(f"{text}: {of():.2f} ({asked})")
        except KeyError as missing:
            print(f"{text}: not measured, {missing} is missing")

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder with capped, make_openelm_gguf.py, ...")
    parser.add_argument("--work", type=Path, required=True, help="temporary folder, 25 GB; deleted at the end")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
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
