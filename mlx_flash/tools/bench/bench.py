"""`mlx_flash bench`: probes the machine, or measures load, prompt and decoding of a checkpoint or of a random card.

Owns the options and what is refused before the work begins. How it is measured is in measuring.py, what is said of it
in report.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_flash.config import FlashConfig, Selection, parse_selection
from mlx_flash.engine.storage.bundle import ITEM_BYTES
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.writer import check_free_space, lock_folder, remove_stale
from mlx_flash.errors import UsageError
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.families import ModelSpec
from mlx_flash.models.specs.folder import read_json
from mlx_flash.runtime.loading import plan_run
from mlx_flash.runtime.machine import cache_folder
from mlx_flash.runtime.model_path import models_folder
from mlx_flash.runtime.run import announce

from .options import BenchOptions
from .trace_replay import Replay

NAME = "mlx_flash-bench"
WITH_PREDICTORS = ("predictor",)  # what a trace can stand for
SPARSE_CARDS = ("predictor", "gate")  # what only ReLU has
PICTURES = (".png", ".pdf", ".svg")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mlx_flash bench` beside those of every run."""
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
        help="with predictor: what is asked for, .npz; or `synthetic`: 10 %% a token, 2.4 %% new",
    )
    for name, text in (("recall", "of what a trace names, the share guessed"), ("precision", "share of guesses right")):
        value = getattr(plain, name)
        parser.add_argument(
            f"--{name}", type=float, default=value, metavar="R", help=f"look-ahead: {text}; default {value:g}"
        )
    parser.add_argument("--csv", metavar="FILE", help="write the figures there")
    parser.add_argument("--picture", metavar="FILE", help="draw where the time goes; needs matplotlib")


def bench_command(args: argparse.Namespace, config: FlashConfig) -> dict[str, Any]:
    """`mlx_flash bench`."""
    for name in ("csv", "picture"):
        check_writable(getattr(args, name), f"--{name}")
    if args.probe:
        return probe_command(args)
    options = BenchOptions(**{field.name: getattr(args, field.name) for field in fields(BenchOptions)})
    check_options(args, config)
    return measure_command(args, config, options)


def check_options(args: argparse.Namespace, config: FlashConfig) -> None:
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


def probe_command(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the machine and the disk of `--dir`, and keep the figures."""
    from mlx_flash.runtime.machine import save_machine

    from .machine_probe import machine_rows, print_machine, probe
    from .read_probe import fio_rates, probe_file
    from .report import write_rows

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


def measure_command(args: argparse.Namespace, config: FlashConfig, options: BenchOptions) -> dict[str, Any]:
    """Measure a checkpoint, or a card in a temporary folder."""
    from .measuring import run_bench
    from .report import can_draw, describe, print_report, report_rows, save_picture, write_rows

    draws = bool(args.picture) and can_draw()
    with ExitStack() as stack:
        if args.card:
            options, path = stack.enter_context(card_checkpoint(args, config, options))
        else:
            path = args.model
        plan = plan_run(path, config)
        options.check_context(plan.spec, config)
        trace = options.make_trace(tuple(layout.count for layout in plan.checkpoint.layouts))
        replay = Replay(trace, options.recall, options.precision) if trace else None
        measured = run_bench(plan, options, replay, progress=not args.json)
        name, place = plan.name, plan.checkpoint.path
        if args.card:
            name, place = f"{read_card(args.card)[0].name} {plan.dtype}", work_folder(args)
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


def work_folder(args: argparse.Namespace) -> Path:
    """Where a card's checkpoint is written: by default where converted copies lie, on a disk that is no memory."""
    return Path(args.work) if args.work else cache_folder()


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write in {folder}: {error.strerror or error}") from error
    return folder


def read_card(card: str) -> tuple[Path, ModelSpec]:
    """A card's folder, by its name under models/ or by its path, and what its config says. Raises UsageError."""
    folder = Path(card).absolute() if Path(card).is_dir() else models_folder() / card
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in models_folder().glob("*/config.json"))
        raise UsageError(f"no model card {card!r}; known: {', '.join(known)}, or give a folder with a config.json")
    return folder, read_spec(read_json(folder / "config.json"))


@contextmanager
def card_checkpoint(
    args: argparse.Namespace, config: FlashConfig, options: BenchOptions
) -> Iterator[tuple[BenchOptions, Path]]:
    """A random-weight checkpoint of a card, gone afterwards however it ends, unless it is to be kept; and the options,
    with the trace that `predictor` needs on random weights. Raises UsageError, SpaceError."""
    from .card import attach_random_predictors, make_card

    selection, dtype = parse_selection(config.select), args.dtype or "bfloat16"
    options = with_trace(options, selection)
    card, spec = read_card(args.card)
    options.check_context(spec, config)
    trace = options.make_trace(tuple(layer.intermediate for layer in spec.layers))
    work = make_folder(work_folder(args))
    relu = selection.name in SPARSE_CARDS
    kept = work / f"{card.name}-{dtype}{'-relu' if relu else ''}-random"
    if args.keep and os.path.lexists(kept):
        raise UsageError(f"{kept} exists, made before: give it with --model, or remove it")
    shapes = (spec.resident_shapes() | spec.ffn_shapes()).values()
    check_free_space(work, 2 * sum(_items(shape) for shape in shapes) * ITEM_BYTES[dtype])
    made, lock = _temporary(work)
    try:
        announce(f"writing {args.card} with random weights into {work}")
        path = make_card(str(card), made, dtype, relu, progress=not args.json)
        if trace is not None:
            attach_random_predictors(Checkpoint.open(path), trace)
        if args.keep:
            os.rename(path, kept)
            path = kept
        yield options, path
    finally:
        _remove(made, lock)


def with_trace(options: BenchOptions, selection: Selection) -> BenchOptions:
    """Random predictors name nothing of use: a trace says what is asked for."""
    if selection.name not in WITH_PREDICTORS or options.trace is not None:
        return options
    return BenchOptions(**{**asdict(options), "trace": "synthetic"})


def _items(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= int(size)  # Python's integers do not wrap around
    return product


def _temporary(work: Path) -> tuple[Path, int]:
    """A new hidden folder and its lock; what killed runs left is removed."""
    made = work / f".{NAME}.partial-{os.getpid()}"
    try:
        remove_stale(work, NAME)
        made.mkdir()
        return made, lock_folder(made)
    except OSError as error:
        raise UsageError(f"cannot write in {work} ({error.strerror or error}); name a folder with --work") from error


def _remove(folder: Path, lock: int) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    if lock >= 0:
        os.close(lock)
