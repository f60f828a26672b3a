"""`mlx_flash chat`: loads a model and talks with it at the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.apps.options import (
    add_run_options,
    add_sampling_options,
    check_address_space,
    check_sampling,
    run_config,
    sampling_of,
)
from mlx_flash.config import format_bytes
from mlx_flash.errors import UsageError
from mlx_flash.runtime.notices import announce

DESCRIPTION = "Talk with a model at the terminal."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt; needs a chat template")
    add_sampling_options(parser, max_tokens=512)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, talk, and return the conversation."""
    check_address_space(args.backend)
    from mlx_flash.apps.chat import HELP, Chat, Say, talk
    from mlx_flash.runtime.loading import load

    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
    check_sampling(args)
    model, tokenizer = load(args.model, run_config(args))
    plan = model.flash.plan
    try:
        chat = Chat(model, tokenizer, args.system, not args.ignore_chat_template, args.max_tokens, sampling_of(args))
        kind = "a chat" if chat.template else "no chat template: what you write is continued"
        announce(
            f"{plan.name} ({kind}), select {plan.selector}, backend {plan.backend_name}, context "
            f"{plan.context} tokens, {format_bytes(plan.memory.total_bytes)} of memory planned\n{HELP}"
        )
        write: Say = (lambda text: None) if args.json else (lambda text: print(text, end="", flush=True))
        args.status = 130 if talk(chat, announce, write) else 0
    finally:
        model.flash.close()
    turns = [{"prompt": t.prompt, "text": t.reply, "finish_reason": t.finish_reason} for t in chat.turns]
    return {"turns": turns, "forgotten": chat.forgotten}
