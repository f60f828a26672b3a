"""`mlx_flash simulate`: compares residency policies on traces that are recorded now, or were before."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from mlx_flash.apps.options import add_run_options, check_address_space, run_config
from mlx_flash.errors import UsageError

DESCRIPTION = "Compare policies for what stays in memory, on recorded traces."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--data", nargs="+", metavar="TEXT", help="UTF-8 text files to record the model on")
    parser.add_argument("--tokens", type=int, default=2560, metavar="N",
                        help="record about N decoded tokens; default 2560")  # fmt: skip
    parser.add_argument("--trace", nargs="+", metavar="FILE",
                        help="recorded traces in place of --data: .npz, or a .csv of routed experts")  # fmt: skip
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.5], metavar="F",
                        help="slots as shares of the bundles; default 0.25 0.5")  # fmt: skip
    parser.add_argument("--csv", metavar="FILE", help="write the table there, layer by layer")
    parser.add_argument("--record", metavar="DIR", help="keep the recorded traces there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_address_space(args.backend)
    from mlx_flash.tools.simulation import check_simulation, print_table, simulate, write_csv
    from mlx_flash.tools.trace import read_trace
    from mlx_flash.tools.trace_recording import knowledge, record_traces

    check_simulation(args.fractions, args.tokens)
    if bool(args.data) == bool(args.trace):
        raise UsageError("give either --data TEXT, to record the model on, or --trace FILE, recorded before")
    for path in filter(None, (args.record, args.csv and os.path.dirname(args.csv))):
        os.makedirs(path, exist_ok=True)  # before the work whose result goes there
    known: dict[str, Any] = {}
    if args.trace:
        traces = [read_trace(path) for path in args.trace]
    else:
        config = run_config(args)
        traces, calibration = record_traces(args.model, args.data, config, args.tokens, progress=not args.json)
        known = knowledge(calibration, args.select)
    if args.record:
        for index, trace in enumerate(traces):
            trace.save(os.path.join(args.record, f"trace-{index:03d}.npz"))
    rows = simulate(traces, args.fractions, **known)
    if args.csv:
        write_csv(rows, args.csv)
    if not args.json:
        print_table(rows)
    return {"traces": len(traces), "rows": [asdict(row) for row in rows]}
