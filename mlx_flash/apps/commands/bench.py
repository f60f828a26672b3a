"""`mlx_flash bench`: probes the machine, or measures load, prompt and decoding of a checkpoint or of a random card.

Owns the options, and the checks before the work begins. tools/bench measures.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_flash.apps.options import add_run_options, check_address_space, run_config
from mlx_flash.config import FlashConfig, parse_selection
from mlx_flash.errors import UsageError
from mlx_flash.tools.bench.options import WITH_PREDICTORS, BenchOptions

DESCRIPTION = "Measure this machine, or a model."
PICTURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    plain = BenchOptions()
    parser.add_argument("--probe", action="store_true", help="measure the machine, keep the figures for later plans")
    parser.add_argument("--dir", metavar="DIR", help="with --probe: a folder on the models' disk; default the cache")
    parser.add_argument("--card", help="measure a random-weight model of this card, such as openelm-3b")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of a card; default bfloat16")
    parser.add_argument("--work", metavar="DIR", help="where a card's checkpoint is written; default the cache")
    parser.add_argument("--keep", action="store_true", help="keep a card's checkpoint")
    for name, text in (
        ("tokens", "tokens that are timed, and as many more with clocks inside"),
        ("warm", "tokens decoded before"),
        ("prompt", "tokens of the prompt"),
        ("rounds", "replies that are measured"),
    ):
        value = getattr(plain, name)
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text}; default {value}")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="with predictor: which neurons are asked for, .npz; or `synthetic`: 10 %% a token, 2.4 %% new",
    )
    for name, text in (("recall", "of what a trace names, the share guessed"), ("precision", "share of guesses right")):
        value = getattr(plain, name)
        parser.add_argument(
            f"--{name}", type=float, default=value, metavar="R", help=f"look-ahead: {text}; default {value:g}"
        )
    parser.add_argument("--csv", metavar="FILE", help="write the figures there")
    parser.add_argument("--picture", metavar="FILE", help="draw where the time goes; needs matplotlib")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_address_space(args.backend)
    config = run_config(args)
    for name in ("csv", "picture"):
        check_writable(getattr(args, name), f"--{name}")
    if args.probe:
        return probe_machine(args)
    options = BenchOptions(**{field.name: getattr(args, field.name) for field in fields(BenchOptions)})
    check_together(args, config)
    return measure_model(args, config, options)


def check_together(args: argparse.Namespace, config: FlashConfig) -> None:
    """Raise UsageError for options that do not go together."""
    if args.card and args.model:
        raise UsageError(f"--card {args.card} and --model {args.model}: give one of them")
    for name in ("dtype", "work", "keep"):
        if getattr(args, name) and not args.card:
            raise UsageError(f"--{name} goes with --card")
    if args.dir:
        raise UsageError("--dir goes with --probe")
    if args.trace and parse_selection(config.select).name not in WITH_PREDICTORS:
        raise UsageError(f"--trace replaces what --select predictor names; --select {config.select} takes none")
    if args.picture and Path(args.picture).suffix.lower() not in PICTURES:
        raise UsageError(f"--picture {args.picture}: its name must end in {', '.join(PICTURES)}")


def check_writable(path: str | None, flag: str) -> None:
    """Raise UsageError for a file that cannot be written, before the work whose result goes there."""
    if path is None:
        return
    there = os.path.lexists(path)
    try:
        open(path, "ab").close()
        if not there:
            os.unlink(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag}: cannot write {path!r}: {reason}") from error


def probe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the machine and the disk of `--dir`, and keep the figures."""
    from mlx_flash.runtime.machine import cache_folder, save_machine
    from mlx_flash.runtime.notices import announce
    from mlx_flash.tools.bench.bench_report import write_rows
    from mlx_flash.tools.bench.machine_probe import machine_rows, print_machine, probe
    from mlx_flash.tools.bench.random_checkpoint import make_folder
    from mlx_flash.tools.bench.read_probe import fio_rates, probe_file

    for name in ("model", "card", "trace", "picture", "dtype", "work", "keep"):
        if getattr(args, name):
            raise UsageError(f"--probe measures the machine, --{name} goes with a model: run one after the other")
    folder = Path(args.dir) if args.dir else make_folder(cache_folder())
    with probe_file(folder, progress=not args.json) as file:
        machine = probe(folder, progress=not args.json, announce=announce, file=file)
        beside = fio_rates(file, announce=announce)
    kept = save_machine(machine)
    if args.csv:
        write_rows(args.csv, machine_rows(machine, beside))
    if not args.json:
        print_machine(machine, beside)
        print(f"\nkept in {kept}: plans for models on this disk use it from now on (mlx_flash inspect)")
    pairs = [{"ours": asdict(ours), "fio": asdict(fio)} for ours, fio in beside or ()]
    return {"path": str(kept), "machine": asdict(machine), "beside_fio": pairs if beside is not None else None}


def measure_model(args: argparse.Namespace, config: FlashConfig, options: BenchOptions) -> dict[str, Any]:
    """Measure a checkpoint, or a card in a temporary folder."""
    from mlx_flash.runtime.machine import cache_folder
    from mlx_flash.runtime.planning.planner import plan_checkpoint
    from mlx_flash.tools.bench.bench_report import (
        can_draw,
        describe,
        print_report,
        report_rows,
        save_picture,
        write_rows,
    )
    from mlx_flash.tools.bench.measuring import run_bench
    from mlx_flash.tools.bench.random_checkpoint import card_checkpoint, read_card
    from mlx_flash.tools.bench.trace_replay import Replay

    draws = bool(args.picture) and can_draw()
    with ExitStack() as stack:
        path, work = args.model, Path(args.work) if args.work else cache_folder()
        if args.card:
            options = options.with_trace(parse_selection(config.select))
            making = card_checkpoint(
                args.card, args.dtype or "bfloat16", config, options, work, keep=args.keep, progress=not args.json
            )
            path = stack.enter_context(making)
        plan = plan_checkpoint(path, config, loads=True)
        options.check_context(plan.spec, config)
        trace = options.make_trace(tuple(layout.count for layout in plan.checkpoint.layouts))
        replay = Replay(trace, options.recall, options.precision) if trace else None
        measured = run_bench(plan, options, replay, progress=not args.json)
        name, place = plan.name, plan.checkpoint.path
        if args.card:
            name, place = f"{read_card(args.card)[0].name} {plan.dtype}", work  # the checkpoint itself may be removed
        report = describe(measured, name, bool(args.card), options, place)
    if args.csv:
        write_rows(args.csv, report_rows(report))
    if draws:
        save_picture(args.picture, measured, report, options.tokens)
    if not args.json:
        print_report(report)
        if args.card and args.keep:
            print(f"kept {path}")
    return report
