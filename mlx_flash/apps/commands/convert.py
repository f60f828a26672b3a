"""`mlx_flash convert`: writes a flash checkpoint from a Hugging Face one."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = "Write a flash checkpoint from a Hugging Face one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-path", required=True, metavar="PATH_OR_REPO")
    parser.add_argument("--flash-path", required=True, metavar="OUT")
    parser.add_argument("--revision", help="branch, tag or commit of the repo")
    parser.add_argument("--tokenizer", metavar="PATH_OR_REPO", help="where to take the tokenizer from")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    parser.add_argument("-q", "--quantize", action="store_true", help="store 4 or 8 bits per weight, as mlx-lm does")
    parser.add_argument("--q-bits", type=int, default=4, metavar="N", help="4 (default) or 8; with -q")
    parser.add_argument("--q-group-size", type=int, default=64, metavar="N",
                        help="weights that share a scale: 32, 64 (default) or 128")  # fmt: skip
    parser.add_argument("--dense-bits", type=int, metavar="N",
                        help="4, 8, or 16: the part outside the FFNs; default as --q-bits")  # fmt: skip
    parser.add_argument("--requantize", action="store_true",
                        help="with -q: quantise weights that are quantised already too; loses a little")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
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
