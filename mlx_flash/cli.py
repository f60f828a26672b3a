"""The `mlx_flash` command: arguments in, text or one JSON object out, errors as one line and an exit status.

0 ok, 1 failure while running, 2 wrong usage, bad input or budget, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from mlx_flash import __version__
from mlx_flash.apps.options import add_run_options, add_sampling_options, run_config, sampling_of
from mlx_flash.engine.system.address_space import check_room, explain

from .config import format_bytes
from .errors import FlashError, UsageError

Command = Callable[[argparse.Namespace], dict[str, Any]]


def say(text: str) -> None:
    """A line for the reader, beside the output: stderr."""
    print(text, file=sys.stderr, flush=True)


def read_stdin() -> str:
    """All of stdin, which is UTF-8 whatever the locale says. Raises UsageError."""
    if sys.stdin is None:  # closed
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text (byte {error.start})") from None


def generate_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.models.text.sampling import Sampling
    from mlx_flash.models.text.tokenizer import encode_prompt
    from mlx_flash.runtime.generation import make_reply, stream_generate
    from mlx_flash.runtime.loading import load

    # Typed \n and \t mean newline and tab, as in mlx-lm's command.
    prompt = read_stdin() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt:
        raise UsageError("the prompt is empty")
    if args.max_tokens < 1:
        raise UsageError(f"max_tokens is {args.max_tokens}; it must be at least 1")
    Sampling(**sampling_of(args))  # checked before anything is loaded
    model, tokenizer = load(args.model, run_config(args))
    plan, responses, finish = model.flash.plan, [], "interrupted"
    say(f"{plan.name}: select {plan.selector}, backend {plan.backend_name}, "
        f"{format_bytes(plan.memory.total_bytes)} of memory planned")  # fmt: skip
    ids = encode_prompt(tokenizer, prompt, use_chat_template=not args.ignore_chat_template)
    try:
        for response in stream_generate(model, tokenizer, ids, max_tokens=args.max_tokens, **sampling_of(args)):
            responses.append(response)
            finish = response.finish_reason or finish
            if not args.json:
                print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        if not responses:
            raise
        args.status = 130  # what was written so far is kept
    finally:
        if responses and not args.json:
            print(flush=True)
            say(summary(make_reply(model, tokenizer, responses, finish), plan))
        model.flash.close()
    return asdict(make_reply(model, tokenizer, responses, finish))


def summary(reply: Any, plan: Any) -> str:
    """The figures of a run, for a person."""
    ffn = sum(layout.count * layout.stride for layout in plan.checkpoint.layouts)
    share = reply.bytes_read_per_token / ffn if ffn else 0.0
    from mlx_flash.tools.inspection import loss_text

    exact = "exact" if reply.exact else loss_text(plan.measured_loss)
    return "\n".join(
        [
            "-" * 10,
            f"prompt {reply.prompt_tokens_per_s:.1f} tokens/s, decode {reply.decode_tokens_per_s:.1f} tokens/s, "
            f"{len(reply.tokens)} tokens ({reply.finish_reason})",
            f"read {format_bytes(reply.bytes_read_per_token)} per token ({share:.0%} of the FFN), "
            f"hit rate {reply.hit_rate:.0%}",
            f"resident {format_bytes(reply.resident_bytes)}, peak of the process {format_bytes(reply.peak_bytes)}",
            f"selector {reply.selector} ({exact})",
        ]
    )


def inspect_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.tools.inspection import inspect_model, print_inspection

    report = inspect_model(args.model, run_config(args))
    if not args.json:
        print_inspection(report)
    return report


def perplexity_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.tools.perplexity import measure_perplexity

    found = measure_perplexity(args.model, args.data, run_config(args), tokens=args.tokens, progress=not args.json)
    if not args.json:
        share = found["bytes_read_per_token"] / found["ffn_bytes"]
        exact, resident = "exact" if found["exact"] else "not exact", format_bytes(found["ffn_resident_bytes"])
        print(f"{found['selector']} ({exact}): {found['nats_per_token']:.4f} nats per token "
              f"(perplexity {found['perplexity']:.3f}), {found['bits_per_byte']:.4f} bits per byte, "
              f"{found['tokens']} tokens scored\n"
              f"read {format_bytes(found['bytes_read_per_token'])} per token ({share:.1%} of the FFN), "
              f"hit rate {found['hit_rate']:.0%}, {resident} of FFN resident")  # fmt: skip
    return found


def simulate_command(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

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


def calibrate_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.tools.calibration.calibrator import calibrate
    from mlx_flash.tools.calibration.report import print_calibration

    found = calibrate(
        args.model,
        args.data,
        tokens=args.tokens,
        recall=args.recall,
        loss_windows=args.windows,
        memory=args.memory,
        backend=args.backend,
        seed=args.seed,
        progress=not args.json,
    )
    if not args.json:
        print_calibration(found)
    return found


def verify_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.engine.storage.checkpoint import verify
    from mlx_flash.runtime.model_path import model_name, resolve_model

    path = resolve_model(args.model, announce=say)
    checked = verify(path)
    if not args.json:
        name = model_name(args.model)
        where = str(path) if name == str(path) else f"{name} ({path})"
        print(f"{where}: {format_bytes(checked)} checked, every file is as it was written")
    return {"path": str(path), "bytes": checked, "ok": True}


def convert_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.models.conversion.converter import convert

    out = convert(
        args.hf_path,
        args.flash_path,
        revision=args.revision,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        quantize=args.quantize,
        q_bits=args.q_bits,
        q_group_size=args.q_group_size,
        dense_bits=args.dense_bits,
        requantize=args.requantize,
        progress=not args.json,
    )
    if not args.json:
        print(f"wrote {out}")
    return {"path": str(out)}


def make_random_command(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.tools.random_model import make_random

    out = make_random(args.card, args.out, dtype=args.dtype, seed=args.seed, progress=not args.json)
    if not args.json:
        print(f"wrote {out}")
    return {"path": str(out)}


class Parser(argparse.ArgumentParser):
    """Wrong usage becomes a UsageError, so that `--json` can report it like any other.

    No abbreviations: `--js` would be found by argparse and missed by `main`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_tuning_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    """What makes a checkpoint sparser and cheaper to read."""
    from mlx_flash.tools.relufication.relufication import add_relufy_arguments, relufy_command

    command = add("calibrate", calibrate_command, "Learn from a text what `predictor`, `threshold` and `static` need.")
    command.add_argument("--model", help="flash checkpoint; the cached copy of a Hugging Face folder or repo id")
    command.add_argument("--data", required=True, nargs="+", metavar="TEXT", help="UTF-8 text files")
    command.add_argument("--tokens", type=int, default=20_000, metavar="N", help="learn from N tokens; default 20000")
    command.add_argument("--recall", type=float, default=0.97, metavar="R",
                         help="share of the firing neurons that predictors must name; default 0.97")  # fmt: skip
    command.add_argument("--windows", type=int, default=4, metavar="W",
                         help="windows of 128 + 256 tokens to measure losses on; default 4, 0 for none")  # fmt: skip
    command.add_argument("--memory", default="auto", metavar="SIZE", help="budget of the passes through the model")
    command.add_argument("--backend", default="auto", metavar="NAME", help="auto, mlx or numpy")
    command.add_argument("--seed", type=int, default=0)

    command = add("simulate", simulate_command, "Compare what stays in memory: policies on recorded traces.")
    add_run_options(command)
    command.add_argument("--data", nargs="+", metavar="TEXT", help="UTF-8 text files to record the model on")
    command.add_argument("--tokens", type=int, default=2560, metavar="N", help="record about N decoded; default 2560")
    command.add_argument("--trace", nargs="+", metavar="FILE", help="traces instead: .npz, or a .csv of routed experts")
    command.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.5], metavar="F",
                         help="slots as shares of the bundles; default 0.25 0.5")  # fmt: skip
    command.add_argument("--csv", metavar="FILE", help="write the table there, layer by layer")
    command.add_argument("--record", metavar="DIR", help="keep the recorded traces there")

    command = add("relufy", relufy_command, "Replace SiLU by ReLU, and recover by distillation (needs PyTorch).")
    add_relufy_arguments(command)


def add_checkpoint_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    from mlx_flash.models.conversion.quantising import add_quantising_arguments

    command = add("verify", verify_command, "Check every byte of a flash checkpoint against its hashes.")
    command.add_argument("--model", help="flash checkpoint; the default model's copy without")

    command = add("convert", convert_command, "Write a flash checkpoint from a Hugging Face one.")
    command.add_argument("--hf-path", required=True, metavar="PATH_OR_REPO")
    command.add_argument("--flash-path", required=True, metavar="OUT")
    command.add_argument("--revision", help="branch, tag or commit of the repo")
    command.add_argument("--tokenizer", metavar="PATH_OR_REPO", help="where to take the tokenizer from")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    add_quantising_arguments(command)

    command = add("make-random", make_random_command, "Write a random-weight Hugging Face checkpoint of a card.")
    command.add_argument("--card", required=True, help="a name under models/, such as openelm-3b, or a config's folder")
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    command.add_argument("--out", required=True, metavar="DIR")
    command.add_argument("--seed", type=int, default=0)


def make_parser() -> argparse.ArgumentParser:
    from mlx_flash.apps.chat import add_chat_arguments, chat_command
    from mlx_flash.apps.server.command import add_server_arguments, server_command
    from mlx_flash.tools.bench.bench import add_bench_arguments, bench_command

    parser = Parser(
        prog="mlx_flash", description="Run language models larger than memory: dense part resident, FFN read from SSD."
    )
    parser.add_argument("--version", action="version", version=f"mlx_flash {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    command = add("generate", generate_command, "Write a text that continues the prompt.")
    add_run_options(command)
    command.add_argument("--prompt", required=True, help="the text to continue; - reads stdin")
    add_sampling_options(command, max_tokens=256)

    command = add("chat", lambda args: chat_command(args, say), "Talk with a model at the terminal.")
    add_run_options(command)
    add_chat_arguments(command)

    command = add("server", server_command, "Answer over HTTP, as OpenAI's API.")
    add_run_options(command)
    add_server_arguments(command)

    command = add("perplexity", perplexity_command, "Measure how well a model predicts a text, selector at work.")
    add_run_options(command)
    command.add_argument("--data", required=True, nargs="+", metavar="TEXT", help="UTF-8 text files")
    command.add_argument("--tokens", type=int, metavar="N", help="score about N tokens, evenly spread; default all")

    add_tuning_commands(add)

    command = add("bench", lambda args: bench_command(args, run_config(args)), "Measure this machine, or a model.")
    add_run_options(command)
    add_bench_arguments(command)

    command = add("inspect", inspect_command, "Show what would be resident and read, before anything is loaded.")
    add_run_options(command)

    add_checkpoint_commands(add)
    return parser


def fail(as_json: bool, error: BaseException, status: int) -> int:
    kind, message = type(error).__name__, str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else "")
    try:
        if as_json:
            print(json.dumps({"error": {"type": kind, "message": message}}), flush=True)
        else:
            say(f"{kind}: {message}")
    except OSError:  # nobody listens, or the disk that stdout is on is full
        silence()
    return status


def silence() -> None:
    """Let Python's last flush of stdout and stderr go nowhere: it would end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in arguments, "--debug" in arguments
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on texts and tokenizers, of the whole run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character
    try:
        args = make_parser().parse_args(arguments)
        args.status = 0
        backend = "mlx" if args.command == "server" else getattr(args, "backend", None)
        if backend == "mlx" or (backend is not None and args.command != "inspect"):  # those that load
            check_room("mlx" if backend == "mlx" else "numpy")
        result = args.run(args)
        if args.json:
            print(json.dumps(result), flush=True)
        return int(args.status)
    except KeyboardInterrupt as error:
        return fail(as_json, error, 130) if as_json else 130
    except BrokenPipeError:
        silence()  # the reader of stdout went away (`| head`): nothing more can be said
        return 1
    except BaseException as error:
        if debug or isinstance(error, SystemExit):
            raise
        if not isinstance(error, FlashError) and (text := explain(error)) is not None:
            return fail(as_json, MemoryError(text), 1)
        # A bug shows its traceback, but whoever reads JSON still gets an object.
        if not isinstance(error, Exception if as_json else FlashError | OSError):
            raise
        return fail(as_json, error, getattr(error, "exit_status", 1))


if __name__ == "__main__":
    sys.exit(main())
