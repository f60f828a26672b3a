"""The ablation of "LLM in a flash" (Table 2) on this machine: what each technique saves of the reading of weights.

    python scripts/ablation_table2.py --dir FOLDER --csv table2.csv --png table2.png

    naive         every weight is read for every token, in large sequential reads
    hybrid        half of the weights is resident, the other half is read like that
    + predictor   dense part and predictors are resident; of the FFN what the predictor names is read, nothing is kept
    + windowing   the neurons named for the last 4 tokens are resident; what is new is read
    + bundling    a neuron's parts lie together: one read instead of two (OPT) or three (OpenELM)

Mechanism, not quality: OpenELM-3B and OPT-6.7B have their geometry, random 16-bit weights and a generator's activations
(`ablation_parts.synthetic_layer`, seeded) with the paper's statistics: 3 % of the neurons fire, the predictor names
9 %, the window of 4 tokens holds 24 %, 2.4 % are new per token. The default model has its own activations, on a text.

I/O ms: time in which reads of one token are under way, around the page cache (direct I/O); of the last three rows
layer by layer, all reads of a layer at once and nothing computed meanwhile. Median over the tokens; rows take turns
(naive and hybrid one token per round). Planning (which slots) and the predictors, computed at the paper's ranks and
then overridden by the generator, have columns of their own. GB: bytes asked of the disk. Naive and hybrid are held
against fio's sequential rate on the same files, taken between them in every round.

A token of the last rows waits for the disk once per layer, and on a busy machine after each wait for a processor too.
On Linux `chrt -f 10 python scripts/ablation_table2.py ...` (root) takes that away, for fio and all rows alike.

Needs 6.1 GB of disk for OpenELM-3B and 13.4 GB for OPT-6.7B, one after the other, under --dir; deleted at the end. The
slots of the last two rows take 2.2 GB and 4.2 GB of memory; dense part and hybrid's half are counted, not loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from ablation_parts import (
    WINDOW,
    Geometry,
    NamedRow,
    Predictors,
    StreamRow,
    Token,
    known_geometry,
    needs_disk,
    synthetic_trace,
    trace_statistics,
    write_geometry,
    write_random,
)
from ablation_report import RANDOM_DEPTH, Row, Table, machine, print_table, save_csv, save_picture, verdicts

import mlx_flash
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.engine.storage.reader import LayerFile
from mlx_flash.errors import FlashError
from mlx_flash.tools.text_windows import (
    CONTEXT_TOKENS,
    SCORED_TOKENS,
    cut_windows,
    encode_text,
    read_text,
    spread_evenly,
)
from mlx_flash.tools.trace_recording import record_ids

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = ROOT.parent / "shared" / "data" / "stories" / "held"
FIO_SECONDS = (4, 2)  # sequential, random
SMALL_TOKENS = 40  # per round, of the default model: it reads little


def fio_rate(files: Sequence[LayerFile], random: bool = False) -> float | None:
    """fio's rate on these files in bytes per second, sequential or at random places in bundles; None without fio."""
    if shutil.which("fio") is None:
        return None
    names = ":".join(str(file.path).replace(":", r"\:") for file in files)
    engine = "libaio" if sys.platform == "linux" else "posixaio"
    command = ["fio", "--name=rate", f"--ioengine={engine}", "--direct=1", "--readonly", f"--filename={names}"]
    if random:
        size = files[0].layout.stride
        command += ["--rw=randread", f"--bs={size}", f"--iodepth={RANDOM_DEPTH}", "--norandommap", "--time_based"]
    else:
        command += ["--rw=read", "--bs=1M", "--iodepth=8", "--file_service_type=sequential"]
    command += [f"--runtime={FIO_SECONDS[random]}", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"fio failed, so there is nothing to hold our rate against: {done.stderr.strip()[-300:]}")
        return None
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def make_rows(
    geometry: Geometry,
    files: Sequence[LayerFile],
    trace: Sequence[Token],
    slots: Sequence[int],
    tokens: int,
    streamed_tokens: int,
) -> list[Row]:
    """The five rows; the windows of the last two are filled."""
    backend = NumpyBackend()
    most = max(len(ids) for token in trace for ids in token)
    hybrid = StreamRow(geometry, files, backend, geometry.total_bytes // 2)
    always = geometry.dense_bytes + geometry.predictor_bytes
    rows = [
        Row("naive", 0, StreamRow(geometry, files, backend), streamed_tokens),
        Row("hybrid", hybrid.resident_bytes, hybrid, streamed_tokens),
    ]
    for name, capacities, bundled in (
        ("+ predictor", None, False),
        ("+ windowing", slots, False),
        ("+ bundling", slots, True),
    ):
        source = NamedRow(geometry, files, backend, capacities, bundled, most)
        rows.append(Row(name, always + source.resident_bytes, source, tokens))
        if capacities:
            for ids in trace[:WINDOW]:
                source.token(ids)
        rows[-1].next_token = WINDOW
    return rows


def measure(table: Table, files: Sequence[LayerFile], trace: Sequence[Token], rounds: int, use_fio: bool) -> None:
    """Run the rows in turns, every other round in reverse; fio has its turn between naive and hybrid."""
    predictors = Predictors(table.geometry, NumpyBackend(), 0)
    if predictors.layers:
        predictors.seconds()  # the kernels are compiled
    rate = None
    turns: list[Row | None] = [table.rows[0], None, *table.rows[1:]]
    for number in range(rounds):
        streamed: list[Row] = []
        for row in turns[:: -1 if number % 2 else 1]:
            if row is None:
                rate = fio_rate(files) if use_fio else None
                table.fio_rates += [rate] if rate else []
                continue
            if use_fio and row is turns[-1]:
                at_random = fio_rate(files[:-1], random=True)
                table.fio_random_rates += [at_random] if at_random else []
            readings = row.run(trace)
            if isinstance(row.source, StreamRow):
                streamed.append(row)
            elif predictors.layers:
                table.predictor_s += [predictors.seconds() for _ in readings]
            ms = 1e3 * median(reading.io_s for reading in readings)
            print(f"  round {number + 1}: {row.name:<12} {ms:9.1f} ms", file=sys.stderr, flush=True)
        for row in streamed:
            last = row.readings[-row.tokens_per_round :]
            row.of_fio += [median(reading.bytes / reading.io_s for reading in last) / rate] if rate else []


def run_table(
    geometry: Geometry,
    files: Sequence[LayerFile],
    trace: Sequence[Token],
    about: str,
    rounds: int,
    tokens: int,
    streamed_tokens: int = 1,
    use_fio: bool = True,
) -> Table:
    """Measure one geometry whose files exist, with what was named token by token. tokens, streamed_tokens: per round,
    of the rows that read what is named and of those that read all."""
    counts = [layout.count for layout in geometry.layouts]
    found = trace_statistics(trace, counts)
    about += (
        f"; achieved: {found.named:.1%} named per token, {found.held:.1%} held by the window of {WINDOW} tokens, "
        f"{found.new:.1%} new"
    )
    rows = make_rows(geometry, files, trace, found.slots, tokens, streamed_tokens)
    table = Table(geometry, about, rows)
    try:
        measure(table, files, trace, rounds, use_fio)
    finally:
        for row in rows:
            row.source.close()
    return table


def synthetic_table(name: str, args: argparse.Namespace) -> Table:
    """OpenELM-3B or OPT-6.7B: files are written, measured and deleted."""
    geometry = known_geometry(name, ROOT / "models")
    counts = [layout.count for layout in geometry.layouts]
    trace, fired = synthetic_trace(counts, WINDOW + args.rounds * args.tokens, args.seed)
    with tempfile.TemporaryDirectory(prefix="ablation-", dir=args.dir) as folder:
        print(f"{name}: writing {geometry.total_bytes / 1e9:.1f} GB of random weights", file=sys.stderr, flush=True)
        files = write_geometry(geometry, Path(folder), args.seed)
        about = f"random weights, generated activations, seed {args.seed}: {fired:.1%} fire"
        return run_table(geometry, files, trace, about, args.rounds, args.tokens)


def record(model: Any, tokenizer: Any, texts: Sequence[Path], tokens: int) -> list[Token]:
    """What the model's selector asks for while `tokens` tokens of the texts, or a few more, pass one by one after
    prompts of 128."""
    encoded = [encode_text(tokenizer, read_text(path)) for path in texts]
    scored = min(SCORED_TOKENS, model.flash.plan.context - CONTEXT_TOKENS - len(encoded[0][0]))
    found = [window for before, ids in encoded for window in cut_windows(before, ids, CONTEXT_TOKENS, scored)]
    trace: list[Token] = []

    def note(layer: int, ids: np.ndarray) -> None:
        if layer == 0:
            trace.append([])
        trace[-1].append(np.array(ids))

    record_ids(model.flash, note)
    for window in spread_evenly(found, tokens):
        for _ in model.flash.forced(model, window.prompt, window.scored):
            pass
    return trace


def default_table(args: argparse.Namespace) -> Table:
    """The default model on a text: the neurons that its predictors name or, where it has none, that fire."""
    texts = args.text or sorted(HELD_OUT.glob("*.txt"))
    if not texts:
        raise FlashError(f"no text for the default model: {HELD_OUT} is not here; give --text FILE, or leave it out")
    with tempfile.TemporaryDirectory(prefix="ablation-", dir=args.dir) as folder:
        flash = mlx_flash.convert(args.model, Path(folder) / "model")
        config = mlx_flash.FlashConfig(backend="numpy", look_ahead="off")
        model, tokenizer = mlx_flash.load(flash, config, select="gate")
        plan = model.flash.plan
        ranks, named = [0] * len(plan.checkpoint.layouts), "neurons that fire (no predictors are calibrated)"
        if plan.calibration is not None and plan.calibration.has_predictors:
            model.flash.close()
            model, tokenizer = mlx_flash.load(flash, config, select="predictor")
            ranks, named = [len(layer.a) for layer in plan.calibration.layers], "neurons that its predictors name"
        try:
            trace = record(model, tokenizer, texts, WINDOW + args.rounds * SMALL_TOKENS)
        finally:
            model.flash.close()
        dense = sum(info.nbytes for _, info in plan.checkpoint.resident_tensors().values())
        geometry = Geometry(Path(args.model).name, tuple(plan.checkpoint.layouts), dense, tuple(ranks))
        # Of the dense part, whose file is no layer's, a stand-in of its size is read.
        stand_in = geometry.files(Path(folder))[-1]
        write_random(stand_in, np.random.default_rng(args.seed))
        files = [*plan.checkpoint.layer_files, stand_in]
        about = f"its weights and activations on {', '.join(path.name for path in texts)}; {named}"
        return run_table(geometry, files, trace, about, args.rounds, SMALL_TOKENS, SMALL_TOKENS, use_fio=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the weights are written")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path)
    names = ["openelm-3b", "opt-6.7b", "default"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all three")
    parser.add_argument("--rounds", type=int, default=5, help="naive and hybrid run one token per round")
    parser.add_argument("--tokens", type=int, default=5, help="tokens per round of the other rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "flash-stories-6m", help="the default model")
    parser.add_argument("--text", type=Path, nargs="+", help="what it reads; default: ../shared/data/stories/held")
    parser.add_argument("--disk", help="the disk's name, for the CSV; default: what the system calls it")
    args = parser.parse_args()
    if args.rounds < 1 or args.tokens < 1:
        parser.error("--rounds and --tokens must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files are deleted then, too
    begin, tables = time.perf_counter(), []
    try:
        args.dir.mkdir(parents=True, exist_ok=True)
        needs_disk(args.dir)
        for name in args.only:
            tables.append(default_table(args) if name == "default" else synthetic_table(name, args))
            print_table(tables[-1])
            if name != "default":  # whose 12 MB are too few for the targets to mean anything
                print("\n".join(verdicts(tables[-1])))
    except FlashError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{args.dir}: {error}; give a folder on a disk with room and direct I/O: --dir FOLDER")
    about = machine(args.dir, args.disk) | {"seed": args.seed}
    if args.csv:
        save_csv(args.csv, tables, about)
    if args.png:
        save_picture(args.png, tables, about)
    print(
        f"\n{about['machine']}: {about['cpu']}, disk {about['disk']}, load average {about['load_average']}, "
        f"{about['scheduling']} scheduling; {time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
