"""`mlx_flash generate`: writes a text that continues the prompt."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
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

DESCRIPTION = "Write a text that continues the prompt."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue; - reads stdin")
    add_sampling_options(parser, max_tokens=256)


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_address_space(args.backend)
    from mlx_flash.models.text.tokenizer import encode_prompt
    from mlx_flash.runtime.generation import make_reply, stream_generate
    from mlx_flash.runtime.loading import load

    # Typed \n and \t mean newline and tab, as in mlx-lm's command.
    prompt = read_stdin() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt:
        raise UsageError("the prompt is empty")
    if args.max_tokens < 1:
        raise UsageError(f"max_tokens is {args.max_tokens}; it must be at least 1")
    check_sampling(args)
    model, tokenizer = load(args.model, run_config(args))
    plan, responses, finish = model.flash.plan, [], "interrupted"
    announce(f"{plan.name}: select {plan.selector}, backend {plan.backend_name}, "
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
        args.status = 130  # the text written so far is kept
    finally:
        if responses and not args.json:
            print(flush=True)
            announce(summary(make_reply(model, tokenizer, responses, finish), plan))
        model.flash.close()
    return asdict(make_reply(model, tokenizer, responses, finish))


def read_stdin() -> str:
    """All of stdin, decoded as UTF-8 whatever the locale says. Raises UsageError."""
    if sys.stdin is None:  # closed
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text (byte {error.start})") from None


def summary(reply: Any, plan: Any) -> str:
    """The figures of a run, for a person."""
    from mlx_flash.tools.inspection import loss_text

    ffn = sum(layout.count * layout.stride for layout in plan.checkpoint.layouts)
    share = reply.bytes_read_per_token / ffn if ffn else 0.0
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
