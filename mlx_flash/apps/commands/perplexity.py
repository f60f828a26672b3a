"""`mlx_flash perplexity`: measures how well a model predicts a text."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.apps.options import add_run_options, check_address_space, run_config
from mlx_flash.config import format_bytes

DESCRIPTION = "Measure how well a model predicts a text, with its selector at work."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--data", required=True, nargs="+", metavar="TEXT", help="UTF-8 text files")
    parser.add_argument("--tokens", type=int, metavar="N", help="score about N tokens, evenly spread; default all")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_address_space(args.backend)
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
