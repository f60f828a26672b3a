"""`mlx_flash server`: answers over HTTP until it is stopped. Needs mlx-lm only when it runs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from mlx_flash.apps.options import add_run_options, check_address_space, run_config
from mlx_flash.config import format_bytes
from mlx_flash.errors import UsageError
from mlx_flash.runtime.model_path import DEFAULT_MODEL
from mlx_flash.runtime.notices import announce

DESCRIPTION = "Answer over HTTP, as OpenAI's API."
LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="P", help="default 8080; 0 takes a free one")
    parser.add_argument("--replies", type=int, default=2, metavar="N",
                        help="replies generated at once, each with a KV cache of its own; default 2")  # fmt: skip
    parser.add_argument("--kept-prompts", type=int, default=1, metavar="N",
                        help="finished replies whose KV cache is kept, so that a chat goes on; default 1")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N",
                        help="most tokens of a reply, where a request sets none; default 512")  # fmt: skip
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="where a request has none; default 0")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="where a request has none; default 1: off"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="where a request has none; default 0: all")
    parser.add_argument("--allowed-origins", nargs="+", default=[], metavar="URL",
                        help="web pages that may send requests from a browser; * for all; default none")  # fmt: skip
    parser.add_argument("--log-level", default="warning", choices=LOG_LEVELS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_address_space("mlx")
    from mlx_flash.apps.server.server_plan import plan_server
    from mlx_flash.models.text.sampling import Sampling

    Sampling(args.temp, args.top_p, args.top_k)  # which checks them
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port is {args.port}; it must be from 0 to 65535")
    plan, replies = plan_server(args.model, run_config(args), args.replies, args.kept_prompts)
    from mlx_flash.apps.server.http_server import (
        Server,
    )  # needs mlx-lm; planning has raised an error where it is missing

    given = args.model or DEFAULT_MODEL
    names = (Path(given).resolve().name, given) if Path(given).exists() else (given,)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    defaults = {name: getattr(args, name) for name in ("max_tokens", "temp", "top_p", "top_k")}
    server = Server(plan, names, args.host, args.port, replies, args.allowed_origins, **defaults)
    server.start()
    announce(
        f"{plan.name} at {server.url} (OpenAI's API), {replies} replies at once, context {plan.context} tokens, "
        f"select {plan.selector}, {format_bytes(plan.memory.total_bytes)} of memory planned; Ctrl-C stops it"
    )
    server.serve()
    return {"model": names[0], "url": server.url}
