"""Shared code of the programs that measure against llama.cpp and fio: alternating contestants, a table, a memory cap.

Linux, root, cgroup v1 (for `capped`).
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

Contestants = dict[str, Callable[[], dict[str, float]]]


class Machine(Protocol):
    """The files that contestants work on, and what each of them measures."""

    def prepare(self) -> None: ...

    def contestants(self) -> Contestants: ...


class Table:
    """Rows of (machine, what, round, quantity, value), written as they come."""

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

    def ratio(self, text: str, of: Callable[[], float], asked: str) -> None:
        """Print a ratio that is asked for, if its parts were measured."""
        try:
            print(f"{text}: {of():.2f} ({asked})")
        except KeyError as missing:
            print(f"{text}: not measured, {missing} is missing")


def run(*command: str | Path) -> str:
    """Standard output and error of a command; exits with its message if it fails."""
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


def decode_flash(tools: Path, model: Path, cap_mib: int, *options: str | Path) -> dict[str, float]:
    """What `decode_once.py` says of a model. Always under `capped`, which takes some of the processors' time to look at
    the memory."""
    command = [sys.executable, Path(__file__).with_name("decode_once.py"), "--model", model, *options]
    output, _, peak = capped(tools, cap_mib, *command)
    found = dict(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))
    return found | {"peak_over_budget_bytes": peak - found["budget_bytes"]}


def decode_llama(tools: Path, gguf: Path, cap_mib: int | None, tokens: int = 16) -> dict[str, float]:
    """llama.cpp's median seconds per token, under `capped` or, for None, with the machine to itself."""
    command = [sys.executable, tools / "decode_llama_cpp.py", gguf, str(tokens)]
    output = run(*command) if cap_mib is None else capped(tools, cap_mib, *command)[0]
    found = re.search(r"median_s ([\d.]+)", output)
    assert found is not None, output
    return {"s_per_token": float(found[1])}


def fio(files: Sequence[Path], nbytes: int, depth: int, scattered: bool) -> dict[str, float]:
    """The rate at which fio reads blocks of so many bytes from these files, directly, so many in flight."""
    command = ["fio", "--name=reads", f"--filename={':'.join(map(str, files))}", "--readonly", "--ioengine=libaio"]
    command += ["--direct=1", f"--rw={'randread' if scattered else 'read'}", f"--bs={nbytes}", "--norandommap"]
    command += [f"--iodepth={depth}", "--runtime=3", "--time_based", "--output-format=json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    return {"bytes_per_s": read["io_bytes"] / read["runtime"] * 1000}


def arguments(text: str | None, disk: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a program whose contestants alternate."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder with capped, decode_llama_cpp.py, ...")
    parser.add_argument("--work", type=Path, required=True, help=f"temporary folder, {disk}; deleted at the end")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", nargs="+", help="contestants whose names begin with one of these")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a further run")
    return parser


def contest(
    args: argparse.Namespace, make: Callable[[argparse.Namespace], Machine], report: Callable[[Table], None]
) -> None:
    """Let the contestants run in turn, each round beginning with another; then report."""
    args.work.mkdir(parents=True, exist_ok=True)
    machine, table = make(args), Table(args.csv)
    try:
        machine.prepare()
        found = machine.contestants()
        names = [name for name in found if not args.only or name.startswith(tuple(args.only))]
        for number in range(args.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                table.add(name, number, **found[name]())
        report(table)
    finally:
        if not args.keep:
            shutil.rmtree(args.work)
