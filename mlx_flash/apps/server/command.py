"""The `server` command: options in, a server that runs until it is stopped. Needs mlx-lm only when it runs."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_flash.apps.options import run_config
from mlx_flash.config import FlashConfig, format_bytes
from mlx_flash.errors import BackendError, UsageError
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime.loading import RunPlan, any_plan
from mlx_flash.runtime.mixture import ExpertPlan
from mlx_flash.runtime.model_path import DEFAULT_MODEL
from mlx_flash.runtime.run import announce

LOG_LEVELS = ("debug", "info", "warning", "error")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="P", help="default 8080; 0 takes a free one")
    parser.add_argument("--replies", type=int, default=2, metavar="N",
                        help="replies made at once, each with a KV cache of its own; default 2")  # fmt: skip
    parser.add_argument("--kept-prompts", type=int, default=1, metavar="N",
                        help="KV caches kept of replies that ended, so that a chat goes on; default 1")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of a reply; requests may say less")
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="where a request says none; default 0")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="where a request says none; default 1: off"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="where a request says none; default 0: all")
    parser.add_argument("--allowed-origins", nargs="+", default=[], metavar="URL",
                        help="web pages that may ask from a browser; * for all, default none")  # fmt: skip
    parser.add_argument("--log-level", default="warning", choices=LOG_LEVELS)


def server_plan(model: str | None, config: FlashConfig, replies: int, kept: int) -> tuple[RunPlan | ExpertPlan, int]:
    """The plan of a server, and how many replies it makes at once: what is not exact selects for one at a time."""
    if config.backend not in ("auto", "mlx"):
        raise BackendError(f"mlx_flash server runs on the mlx backend only, not on {config.backend}")
    for name, value, least in (("--replies", replies, 1), ("--kept-prompts", kept, 0)):
        if not least <= value <= 1024:
            raise UsageError(f"{name} is {value}; it must be from {least} to 1024")
    plan = any_plan(model, replace(config, backend="mlx", sequences=replies + kept))
    if plan.exact:
        return plan, replies
    return any_plan(model, replace(config, backend="mlx", sequences=1)), 1


def server_command(args: argparse.Namespace) -> dict[str, Any]:
    Sampling(args.temp, args.top_p, args.top_k)  # which checks them
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port is {args.port}; it must be from 0 to 65535")
    plan, replies = server_plan(args.model, run_config(args), args.replies, args.kept_prompts)
    from .http_server import Server  # the plan's backend says what is missing where mlx-lm is

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
