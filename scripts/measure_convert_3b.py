"""Measure `convert` on OpenELM-3B's geometry against copying the file, under a memory cap.

    python scripts/measure_convert_3b.py --tools ../shared/tools --work DIR --csv FILE [--rounds 3]

Linux, root, cgroup v1 (for `capped`), 19 GB of disk. The contestants alternate; medians and their ratio are printed,
every run is in the CSV. Asked: under a cap of 1536 MiB at most twice the time of a cold `cp` + `sync`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from contest import Table, capped, run

CAP_MIB = 1536


def drop_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def measure_convert(args: argparse.Namespace, table: Table, source: Path, flash: Path) -> None:
    copy = args.work / "copy"
    for number in range(args.rounds):
        drop_cache()
        begin = time.perf_counter()
        run("cp", "-r", source, copy)
        run("sync")
        table.add("cp + sync", number, seconds=time.perf_counter() - begin)
        shutil.rmtree(copy)
        shutil.rmtree(flash, ignore_errors=True)
        command = [sys.executable, "-m", "mlx_flash.cli", "convert", "--hf-path", source, "--flash-path", flash]
        _, seconds, peak = capped(args.tools, CAP_MIB, *command, "--json")
        table.add("convert", number, seconds=seconds, anonymous_peak_bytes=peak)
    ratio = table.median("convert", "seconds") / table.median("cp + sync", "seconds")
    print(f"convert / (cp + sync): {ratio:.2f} (at most 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder with capped, make_openelm_gguf.py, ...")
    parser.add_argument("--work", type=Path, required=True, help="temporary folder, 19 GB; deleted at the end")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, flash = args.work / "openelm-3b", args.work / "openelm-3b-flash"
    table = Table(args.csv)
    try:
        run(sys.executable, "-m", "mlx_flash.cli", "make-random", "--card", "openelm-3b", "--out", source, "--json")
        measure_convert(args, table, source, flash)
    finally:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
