"""Measure streaming on OpenELM-3B's geometry against copying a file and against llama.cpp, under a memory cap.

    python scripts/measure_openelm_3b.py --tools ../shared/tools --work DIR --csv FILE [--rounds 3] [--tokens 8]

Linux, root, cgroup v1 (for `capped`), 25 GB of disk, llama-cpp-python and gguf installed. Random weights: this shows
mechanism and speed, not quality. The contestants alternate; medians and their ratios are printed, every run is in
the CSV. What is asked of it:

    convert under a cap of 1536 MiB: at most twice the time of a cold `cp` + `sync`
    generate --memory 2.6GB --select all under 3072 MiB: anonymous peak <= budget + 0.35 GB, >= 0.95 of the slots
    used, bytes read per token <= 1.05 x (FFN - resident FFN), at least 1.4 x as fast per token as llama.cpp
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUDGET = "2.6GB"
CAP_CONVERT_MIB, CAP_DECODE_MIB = 1536, 3072
PROMPT = "Once upon a time"


class Table:
    """Rows of (what, round, quantity, value, unit), written as they come."""

    def __init__(self, path: Path):
        self.values: dict[tuple[str, str], list[float]] = {}
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["machine", "what", "round", "quantity", "value"])

    def add(self, what: str, round_number: int, **quantities: float) -> None:
        for name, value in quantities.items():
            self.values.setdefault((what, name), []).append(value)
            self.writer.writerow([platform.node(), what, round_number, name, f"{value:.6g}"])
        self.file.flush()
        print(f"  {what}: " + ", ".join(f"{k} {v:.4g}" for k, v in quantities.items()), flush=True)

    def median(self, what: str, name: str) -> float:
        return statistics.median(self.values[what, name])


def run(*command: str | Path) -> str:
    """Standard output and error of a command; its failure is ours."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def capped(tools: Path, limit: int, *command: str | Path) -> tuple[str, float, float]:
    """(output, seconds, anonymous peak in bytes) of a command under a memory limit in MiB, page cache dropped."""
    begin = time.perf_counter()
    output = run(tools / "capped", str(limit), *command)
    peak = re.search(r"anonymous peak (\d+) MiB", output)
    return output, time.perf_counter() - begin, int(peak[1]) * 2**20 if peak else float("nan")


def read_reply(output: str) -> dict[str, Any]:
    """The JSON object among the lines of a run; its tokens as a tuple."""
    reply = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return reply | {"tokens": tuple(reply["tokens"])}


def drop_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def measure_convert(args: argparse.Namespace, table: Table, source: Path, flash: Path) -> None:
    copy = args.work / "copy"
    for number in range(args.convert_rounds):
        drop_cache()
        begin = time.perf_counter()
        run("cp", "-r", source, copy)
        run("sync")
        table.add("cp + sync", number, seconds=time.perf_counter() - begin)
        shutil.rmtree(copy)
        shutil.rmtree(flash, ignore_errors=True)
        command = [sys.executable, "-m", "mlx_flash.cli", "convert", "--hf-path", source, "--flash-path", flash]
        _, seconds, peak = capped(args.tools, CAP_CONVERT_MIB, *command, "--json")
        table.add("convert", number, seconds=seconds, anonymous_peak_bytes=peak)
    ratio = table.median("convert", "seconds") / table.median("cp + sync", "seconds")
    print(f"convert / (cp + sync): {ratio:.2f} (at most 2)")


def measure_decode(args: argparse.Namespace, table: Table, flash: Path, gguf: Path) -> None:
    generate = [sys.executable, "-m", "mlx_flash.cli", "generate", "--model", flash, "--prompt", PROMPT, "--memory"]
    generate += [BUDGET, "--select", "all", "--backend", "numpy", "--max-tokens", str(args.tokens), "--json"]
    inspect = [sys.executable, "-m", "mlx_flash.cli", "inspect", "--model", flash, "--memory", BUDGET]
    plan = json.loads(run(*inspect, "--select", "all", "--backend", "numpy", "--json"))
    resident = sum(plan["capacities"]) * plan["bundle_bytes"]
    allowed = plan["ffn_bytes"] - resident
    spare = plan["budget_bytes"] - sum(plan["parts"].values())
    used = resident / (resident + spare)
    everything = [str(plan["everything_resident_bytes"]) if a == BUDGET else a for a in generate]
    tokens = {read_reply(run(*command))["tokens"] for command in (generate, everything)}
    print(f"tokens at the budget and with everything resident: {'equal' if len(tokens) == 1 else 'DIFFERENT'}")
    for number in range(args.rounds):
        output, _, peak = capped(args.tools, CAP_DECODE_MIB, *generate)
        reply = read_reply(output)
        table.add("mlx_flash", number, s_per_token=1 / reply["decode_tokens_per_s"],
                  bytes_read_per_token=reply["bytes_read_per_token"], anonymous_peak_bytes=peak)  # fmt: skip
        decode = [sys.executable, args.tools / "decode_llama_cpp.py", gguf, str(args.tokens)]
        output, _, _ = capped(args.tools, CAP_DECODE_MIB, *decode)
        found = re.search(r"median_s ([\d.]+)", output)
        assert found is not None, output
        table.add("llama.cpp", number, s_per_token=float(found[1]))
    ours, theirs = (table.median(who, "s_per_token") for who in ("mlx_flash", "llama.cpp"))
    read = table.median("mlx_flash", "bytes_read_per_token")
    over = table.median("mlx_flash", "anonymous_peak_bytes") - plan["budget_bytes"]
    print(f"llama.cpp / mlx_flash, seconds per token: {theirs / ours:.2f} (at least 1.4)")
    print(f"bytes read per token / (FFN - resident FFN): {read / allowed:.3f} (at most 1.05)")
    print(f"slots used of those the budget has room for: {used:.3f} (at least 0.95)")
    print(f"anonymous peak - budget: {over / 1e9:.3f} GB (at most 0.35)")
    print(f"read rate while decoding: {read / ours / 1e9:.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder with capped, make_openelm_gguf.py, ...")
    parser.add_argument("--work", type=Path, required=True, help="temporary folder, 25 GB; deleted at the end")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--convert-rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a further run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, flash, gguf = (args.work / name for name in ("openelm-3b", "openelm-3b-flash", "openelm-3b.gguf"))
    table = Table(args.csv)
    try:
        if not source.exists():
            run(sys.executable, "-m", "mlx_flash.cli", "make-random", "--card", "openelm-3b", "--out", source, "--json")
        if args.convert_rounds:
            measure_convert(args, table, source, flash)
        if args.rounds:
            if not gguf.exists():
                run(sys.executable, args.tools / "make_openelm_gguf.py", gguf, "BF16")
            measure_decode(args, table, flash, gguf)
    finally:
        if not args.keep:
            shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
