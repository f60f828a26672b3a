"""Measures this machine for `mlx_flash bench --probe`, and prints the figures.

Owns how the probe's time is divided. read_probe.py measures reads, kernel_probe.py measures kernels; plans use the
figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from mlx_flash.engine.system.cores import available_cores
from mlx_flash.runtime.machine import KERNELS, Machine, ReadRate, device_of, host_name

from .kernel_probe import kernel_rates, layer_seconds
from .read_probe import (
    FILE_BYTES,
    ROUNDS,
    Reading,
    can_drop,
    goes_around,
    kinds,
    measure_reads,
    probe_file,
    reader_name,
    silent,
)

SECONDS = 22.0
READS, KERNEL, LAYER = 0.55, 0.3, 0.15  # shares of the time


def probe(
    folder: str | os.PathLike[str],
    seconds: float = SECONDS,
    progress: bool = False,
    *,
    announce: Callable[[str], None] = silent,
    file: Path | None = None,
) -> Machine:
    """Measure the machine, and the device that `folder` lies on, in about `seconds` and a few more.

    file: a file of `probe_file` to read; None: make one. announce: is called with what could not be measured.
    Raises UsageError for a folder that cannot be written, SpaceError, ReadError.
    """
    if file is None:
        with probe_file(folder, FILE_BYTES, progress) as made:
            return probe(folder, seconds, progress, announce=announce, file=made)
    name = reader_name(file)
    asked = kinds(name, goes_around(file), can_drop(file), announce)
    with tqdm(total=ROUNDS + 2, desc="probing", unit="step", disable=not progress) as bar:
        with Reading(file, name) as reading:
            reads = measure_reads(asked, {name: reading}, READS * seconds, bar.update)[name]
        with TemporaryDirectory(dir=file.parent) as model:
            layers = layer_seconds(Path(model), LAYER * seconds, ROUNDS)
        bar.update()
        kernels = kernel_rates(KERNEL * seconds, ROUNDS, announce)
        bar.update()
    return Machine(
        device=device_of(folder),
        host=host_name(),
        cores=available_cores(),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        reads=reads,
        memory_bytes_per_s=kernels["memory"],
        kernels={key: kernels[key] for key in KERNELS},
        matmul_flops=kernels["matmul"],
        layer_s=layers,
        reader=name,
    )


def print_machine(machine: Machine, beside: Sequence[tuple[ReadRate, ReadRate]] | None = None) -> None:
    """Print a table on stdout; beside: the pairs of `fio_rates`."""
    print(f"{machine.device}, {machine.cores} cores in use, probed {machine.when}")
    print(f"\nreads by {machine.reader}")
    print(f"{'':>28} {'in flight':>9} {'GB/s':>7} {'k reads/s':>10} {'CPU us a read':>14}")
    for read in machine.reads:
        print(_read_line(read))
    if not any(not read.direct for read in machine.reads):
        print("through the page cache: not measured, as it could not be emptied")
    if beside:
        print(f"\n{machine.reader} beside fio (libaio, direct), in turn")
        print(
            f"{'':>28} {'in flight':>9} {'GB/s':>7} {'k reads/s':>10} {'CPU us a read':>14} {'of fio':>7} {'fio us':>7}"
        )
        for ours, fio in beside:
            print(f"{_read_line(ours)} {ours.bytes_per_s / fio.bytes_per_s:7.2f} {fio.cpu_s * 1e6:7.1f}")
    print(f"\n{'memory':<28} {machine.memory_bytes_per_s / 1e9:8.1f} GB/s read")
    for name, rate in machine.kernels.items():
        print(f"{name:<28} {rate / 1e9:8.1f} GB/s of weights, {rate / machine.memory_bytes_per_s:.2f} of memory's")
    print(f"{'prompt, matrix products':<28} {machine.matmul_flops / 1e9:8.0f} Gflop/s")
    for name, seconds in machine.layer_s.items():
        print(f"{'a layer beside, ' + name:<28} {seconds * 1e6:8.0f} us a token")


def _read_line(read: ReadRate) -> str:
    size = f"{read.nbytes / 1024:g} KiB" if read.nbytes < 1 << 20 else f"{read.nbytes / (1 << 20):g} MiB"
    what = f"{'scattered' if read.scattered else 'in order'} {size}{'' if read.direct else ', buffered'}"
    rates = f"{read.bytes_per_s / 1e9:7.2f} {read.bytes_per_s / read.nbytes / 1e3:10.1f} {read.cpu_s * 1e6:14.1f}"
    return f"{what:<28} {read.depth:9} {rates}"


def machine_rows(machine: Machine, beside: Sequence[tuple[ReadRate, ReadRate]] | None = None) -> list[dict[str, Any]]:
    """Rows for a CSV, one per figure, all with the same columns."""
    rows: list[dict[str, Any]] = []
    columns = ("nbytes", "depth", "scattered", "direct", "cpu_s")

    def add(what: str, by: str, value: float, unit: str, read: ReadRate | None = None) -> None:
        kept = {name: "" if read is None else getattr(read, name) for name in columns}
        rows.append(dict(device=machine.device, when=machine.when, what=what, by=by, value=value, unit=unit) | kept)

    for read in machine.reads:
        add("reads", machine.reader, read.bytes_per_s, "B/s", read)
    for ours, fio in beside or ():
        add("reads beside fio", machine.reader, ours.bytes_per_s, "B/s", ours)
        add("reads beside fio", "fio", fio.bytes_per_s, "B/s", fio)
    add("memory", "read", machine.memory_bytes_per_s, "B/s")
    for name, rate in machine.kernels.items():
        add("kernel", name, rate, "B/s")
    add("kernel", "matmul", machine.matmul_flops, "flop/s")
    for name, seconds in machine.layer_s.items():
        add("layer beside weights", name, seconds, "s")
    return rows
