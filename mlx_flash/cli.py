"""The `mlx_flash` command: parses arguments, runs a command, prints text or one JSON object, turns errors into one line
and an exit status.

Exit status: 0 ok, 1 failure while running, 2 wrong usage, bad input or budget, 130 interrupted. The commands are in
apps/commands, a file each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

from mlx_flash import __version__
from mlx_flash.engine.system.address_space import explain
from mlx_flash.runtime.notices import announce

from .errors import FlashError, UsageError

COMMANDS = (  # in the order of --help; "make-random" is apps/commands/make_random.py
    "generate",
    "chat",
    "server",
    "perplexity",
    "calibrate",
    "simulate",
    "relufy",
    "bench",
    "inspect",
    "verify",
    "convert",
    "make-random",
)


class Command(Protocol):
    """What a module of apps/commands has."""

    DESCRIPTION: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Run, print text unless `args.json`, and return the JSON object; `args.status` is the exit status."""
        ...


class Parser(argparse.ArgumentParser):
    """Raises UsageError for wrong usage, so that `--json` can report it like any other error.

    No abbreviations: argparse would accept `--js`, and `main` would miss it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def find_command(name: str) -> Command:
    module: Any = importlib.import_module(f"mlx_flash.apps.commands.{name.replace('-', '_')}")
    return cast(Command, module)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_flash", description="Run language models larger than memory: dense part resident, FFN read from SSD."
    )
    parser.add_argument("--version", action="version", version=f"mlx_flash {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = find_command(name)
        added = commands.add_parser(name, help=command.DESCRIPTION, description=command.DESCRIPTION)
        added.set_defaults(run=command.run)
        added.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(added)
    return parser


def fail(as_json: bool, error: BaseException, status: int) -> int:
    kind, message = type(error).__name__, str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else "")
    try:
        if as_json:
            print(json.dumps({"error": {"type": kind, "message": message}}), flush=True)
        else:
            announce(f"{kind}: {message}")
    except OSError:  # the reader is gone, or stdout is a file on a full disk
        silence()
    return status


def silence() -> None:
    """Send Python's last flush of stdout and stderr to nowhere: otherwise it would end in a traceback."""
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
        # A bug shows its traceback, but with --json the output is still one object.
        if not isinstance(error, Exception if as_json else FlashError | OSError):
            raise
        return fail(as_json, error, getattr(error, "exit_status", 1))


if __name__ == "__main__":
    sys.exit(main())
