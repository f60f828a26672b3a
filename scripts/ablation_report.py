"""The report of `ablation_table2.py`: a table, a CSV, a picture. Measures nothing itself."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from ablation_parts import Geometry, Reading, Token, mount_of

import mlx_flash

PAPER_MS = {"naive": 2196, "hybrid": 1090, "+ predictor": 738, "+ windowing": 164, "+ bundling": 87}
TARGET = 25.0  # naive / bundling, I/O time; the paper: 2196 / 87 = 25.2
SEQUENTIAL_TARGET = 0.9
RANDOM_DEPTH = 256  # reads in flight, as many as ours


@dataclass
class Row:
    """One line of the table. readings: of every timed token; of_fio: rate against fio's in the same round."""

    name: str
    resident_bytes: int
    source: Any
    tokens_per_round: int = 1
    readings: list[Reading] = field(default_factory=list)
    of_fio: list[float] = field(default_factory=list)
    next_token: int = 0

    def run(self, trace: Sequence[Token]) -> list[Reading]:
        """The next tokens."""
        found = []
        for _ in range(self.tokens_per_round):
            found.append(self.source.token(trace[self.next_token % len(trace)]))
            self.next_token += 1
        self.readings += found
        return found

    def median(self, name: str) -> float:
        return median(getattr(reading, name) for reading in self.readings)


@dataclass
class Table:
    """A geometry's rows, and what was measured beside them."""

    geometry: Geometry
    about: str
    rows: list[Row]
    fio_rates: list[float] = field(default_factory=list)
    fio_random_rates: list[float] = field(default_factory=list)
    predictor_s: list[float] = field(default_factory=list)

    def figures(self) -> list[dict[str, Any]]:
        """One dict per row, as printed and saved."""
        naive_s = self.rows[0].median("io_s")
        found = []
        for row in self.rows:
            io_s, nbytes = row.median("io_s"), row.median("bytes")
            predicted = row.name.startswith("+") and bool(self.predictor_s)
            found.append(
                {
                    "model": self.geometry.name,
                    "row": row.name,
                    "resident_gb": row.resident_bytes / 1e9,
                    "gb_per_token": nbytes / 1e9,
                    "gb_per_s": nbytes / io_s / 1e9,
                    "io_ms": 1e3 * io_s,
                    "ratio_to_naive": naive_s / io_s,
                    "paper_ratio": PAPER_MS["naive"] / PAPER_MS[row.name],
                    "reads_per_token": row.median("reads"),
                    "plan_ms": 1e3 * row.median("plan_s"),
                    "predictor_ms": 1e3 * median(self.predictor_s) if predicted else None,
                    "of_fio_sequential": median(row.of_fio) if row.of_fio else None,
                    "tokens": len(row.readings),
                    "io_ms_fastest": 1e3 * min(reading.io_s for reading in row.readings),
                    "io_ms_slowest": 1e3 * max(reading.io_s for reading in row.readings),
                }
            )
        return found


def print_table(table: Table) -> None:
    """The table; sizes in MB for a small model."""
    geometry = table.geometry
    unit, size = ("GB", 1.0) if geometry.total_bytes >= 1e9 else ("MB", 1e3)
    whole, ffn = (size * nbytes / 1e9 for nbytes in (geometry.total_bytes, geometry.ffn_bytes))
    print(f"\n{geometry.name}: {whole:.4g} {unit}, of which FFN {ffn:.4g} {unit}")
    print(f"mechanism, not quality; direct I/O; {table.about}")
    head = ["technique   ", f"resident {unit}", f"{unit}/token", "GB/s", "I/O ms", "naive / this", "paper's", " reads"]
    print(" | ".join([*head, "plan ms", "predictor ms", "of fio's rate", "tokens"]))
    for row in table.figures():
        predictor, fio = row["predictor_ms"], row["of_fio_sequential"]
        cells = [
            f"{row['row']:<12}",
            f"{size * row['resident_gb']:11.4g}",
            f"{size * row['gb_per_token']:8.4g}",
            f"{row['gb_per_s']:4.2f}",
            f"{row['io_ms']:6.1f}",
            f"{row['ratio_to_naive']:12.1f}",
            f"{row['paper_ratio']:7.1f}",
            f"{row['reads_per_token']:6.0f}",
            f"{row['plan_ms']:7.1f}",
            f"{predictor:12.1f}" if predictor is not None else " " * 12,
            f"{fio:13.2f}" if fio is not None else " " * 13,
            f"{row['tokens']:6d}",
        ]
        print(" | ".join(cells))
    if table.fio_rates:
        rates = ", ".join(f"{rate / 1e9:.2f}" for rate in table.fio_rates)
        print(f"fio, sequential, 1 MiB, 8 in flight: {rates} GB/s")
        rates = ", ".join(f"{rate / 1e9:.2f}" for rate in table.fio_random_rates)
        print(
            f"fio, random, {geometry.layouts[0].stride / 1024:g} KiB, {RANDOM_DEPTH} in flight, no layers to wait for: "
            f"{rates} GB/s"
        )
    else:
        print("fio did not run: the sequential rate is held against nothing")


def verdicts(table: Table) -> list[str]:
    """Whether the targets are met, a line each."""
    found = table.figures()
    ratio = found[-1]["ratio_to_naive"]
    lines = [f"naive / bundling, I/O time: {ratio:.1f} (at least {TARGET:.0f}{'' if ratio >= TARGET else ': MISSED'})"]
    for row in found:
        rate = row["of_fio_sequential"]
        if rate is not None:
            missed = "" if rate >= SEQUENTIAL_TARGET else ": MISSED"
            lines.append(f"{row['row']}: {rate:.2f} of fio's sequential rate (at least {SEQUENTIAL_TARGET}{missed})")
    return lines


def machine(folder: Path, disk: str | None) -> dict[str, Any]:
    """What the CSV says of where and when."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    elif sys.platform == "darwin":
        cpu = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    if disk is None:
        disk = Path(mount_of(folder)[0]).name
        number = os.stat(folder).st_dev
        block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        for model in (block / "device" / "model", block.resolve().parent / "device" / "model"):
            disk = model.read_text().strip() if model.exists() else disk
    real_time = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return {
        "machine": platform.node(),
        "cpu": f"{cpu} x {os.cpu_count()}",
        "disk": disk,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "load_average": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "scheduling": "real-time" if real_time else "ordinary",
        "versions": f"{platform.platform()}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"mlx_flash {mlx_flash.__version__}",
    }


def save_csv(path: Path, tables: Sequence[Table], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = None
        for table in tables:
            rates = {"sequential": table.fio_rates, "random": table.fio_random_rates}
            fio = {f"fio_{name}_gb_per_s": median(found) / 1e9 if found else None for name, found in rates.items()}
            for row in table.figures():
                line = about | row | fio | {"activations": table.about}
                cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()}
                if writer is None:
                    writer = csv.DictWriter(file, list(cells))
                    writer.writeheader()
                writer.writerow(cells)


def save_picture(path: Path, tables: Sequence[Table], about: dict[str, Any]) -> None:
    """A panel of bars for each geometry; says so and does nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(4.2 * len(tables), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        rows = table.figures()[::-1]
        bars = axes.barh([row["row"] for row in rows], [row["io_ms"] for row in rows], color="#4477aa")
        labels = [(row["io_ms"], row["ratio_to_naive"]) for row in rows]
        axes.bar_label(bars, [f"{ms:.{1 if ms < 100 else 0}f} ms, {ratio:.1f}x" for ms, ratio in labels], padding=3)
        axes.set_xscale("log")
        axes.set_xlim(min(labels)[0] / 4, max(labels)[0] * 40)
        axes.set_title(table.geometry.name)
        axes.set_xlabel("I/O ms per token")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Mechanism, not quality: {about['cpu']}, {about['disk']}", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
