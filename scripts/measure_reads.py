"""Measure reads of bundles, around the page cache: AioReader, PreadReader and fio on one file, in turn.

    python scripts/measure_reads.py --file FILE --csv CSV [--gb 3] [--rounds 6] [--seconds 2]

Linux, fio installed. FILE is made if it is missing, and kept. Every size: bundles at random places, `--request` of them
at once with two requests under way, as when a layer's reads begin before the last one's are used; then a scan in reads
of 1 MiB. fio does the same with libaio at the depth of AioReader. Medians and ratios are printed, every run is in the
CSV. What is asked of AioReader: at least 0.9 of fio's rate, and at most 8 microseconds of CPU time a read.
"""

from __future__ import annotations

import argparse
import csv
import json
import mmap
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlx_flash.storage.aio import DEPTH
from mlx_flash.storage.layout import DATA_START, Layout, Part
from mlx_flash.storage.reader import AioReader, LayerFile, Merging, PreadReader, Target

RANDOM_BYTES = (1536, 5120, 6144, 16384, 18432, 36864)
SCAN_BYTES, SCAN_BUNDLE = 1 << 20, 16384
UNDER_WAY = 2

# name -> (seconds, reads, bytes, CPU seconds) of reading bundles of so many bytes, at random or in a scan
Result = tuple[float, int, int, float]
Contestant = Callable[[int, bool], Result]


def make_file(path: Path, nbytes: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(nbytes >> 20):
            file.write(rng.bytes(1 << 20))
    subprocess.run(["sync"], check=True)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def requests(count: int, size: int, scan: bool) -> Iterator[np.ndarray]:
    """For ever: `size` ids of `count`, random or one after the other."""
    rng, at = np.random.default_rng(), 0
    while True:
        if not scan:
            yield np.sort(rng.choice(count, size, replace=False))
            continue
        if at + size > count:
            at = 0
        yield np.arange(at, at + size)
        at += size


def slab(nbytes: int) -> np.ndarray:
    """Memory as the numpy backend's slabs have it, touched once."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:] = 0
    return array


def run_reader(kind: type[PreadReader], path: Path, size: int, seconds: float, bundle_bytes: int, scan: bool) -> Result:
    """Requests of `size` bundles, one after the other."""
    layout = Layout((Part("all", "uint8", bundle_bytes),), (path.stat().st_size - DATA_START) // bundle_bytes)
    rows, nbytes, reads = np.arange(size), 0, 0
    memory = [slab(size * bundle_bytes) for _ in range(UNDER_WAY)]
    targets = [[Target(0, each.reshape(size, bundle_bytes))] for each in memory]
    merging = Merging() if scan else Merging(share=0)
    # Choosing random ids is not the reader's work.
    asked = [ids for ids, _ in zip(requests(layout.count, size, scan), range(64), strict=False)]
    with kind([LayerFile(path, layout)], merging=merging) as reader:
        reader.submit(0, asked[0], rows, targets[0]).wait()
        cpu, begin, k = cpu_seconds(), time.perf_counter(), 0
        under_way = []
        while under_way or time.perf_counter() - begin < seconds:
            if len(under_way) == UNDER_WAY or time.perf_counter() - begin >= seconds:
                report = under_way.pop(0).wait()
                nbytes, reads = nbytes + report.bytes, reads + report.reads
                continue
            under_way.append(reader.submit(0, asked[k % 64], rows, targets[k % UNDER_WAY]))
            k += 1
        return time.perf_counter() - begin, reads, nbytes, cpu_seconds() - cpu


def run_fio(path: Path, seconds: float, bundle_bytes: int, scan: bool) -> Result:
    command = ["fio", "--name=reads", f"--filename={path}", "--readonly", "--ioengine=libaio", "--direct=1"]
    command += [f"--rw={'read' if scan else 'randread'}", f"--bs={SCAN_BYTES if scan else bundle_bytes}"]
    command += [f"--iodepth={DEPTH}", f"--runtime={seconds}", "--time_based", "--norandommap", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fio failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    took = job["read"]["runtime"] / 1000
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return took, job["read"]["total_ios"], job["read"]["io_bytes"], cpu


def measure(contestants: dict[str, Contestant], rounds: int, writer: csv.DictWriter[str]) -> None:
    print(f"{'reads':>12} {'by':>12} {'GB/s':>7} {'k reads/s':>10} {'CPU us a read':>14} {'of fio':>7}")
    for bundle_bytes, scan in [*((n, False) for n in RANDOM_BYTES), (SCAN_BUNDLE, True)]:
        what = f"scan {SCAN_BYTES >> 20} MiB" if scan else f"{bundle_bytes / 1024:g} KiB"
        rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
        for number in range(rounds):
            turn = number % len(contestants)  # a disk that was spared is faster for a while
            for name in [*contestants][turn:] + [*contestants][:turn]:
                took, reads, nbytes, cpu = contestants[name](bundle_bytes, scan)
                rates[name].append((nbytes / took / 1e9, reads / took / 1e3, cpu / reads * 1e6))
                row = dict(machine=platform.node(), what=what, by=name, round=number, seconds=f"{took:.4f}")
                writer.writerow(row | dict(reads=reads, bytes=nbytes, cpu_s=f"{cpu:.4f}"))
        medians = {
            name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in rates.items()
        }
        for name, (gb, reads_k, cpu_us) in medians.items():
            ratio = gb / medians["fio"][0]
            print(f"{what:>12} {name:>12} {gb:7.2f} {reads_k:10.1f} {cpu_us:14.1f} {ratio:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--request", type=int, default=512, help="bundles asked for at once")
    options = parser.parse_args()
    path, size, seconds = options.file, options.request, options.seconds
    if not path.exists():
        make_file(path, int(options.gb * 1e9))
    contestants: dict[str, Contestant] = {
        "AioReader": lambda n, scan: run_reader(AioReader, path, size, seconds, n, scan),
        "PreadReader": lambda n, scan: run_reader(PreadReader, path, size, seconds, n, scan),
        "fio": lambda n, scan: run_fio(path, seconds, n, scan),
    }
    with options.csv.open("w", newline="") as file:
        names = ["machine", "what", "by", "round", "seconds", "reads", "bytes", "cpu_s"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        measure(contestants, options.rounds, writer)


if __name__ == "__main__":
    main()
