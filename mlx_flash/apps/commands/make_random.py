"""`mlx_flash make-random`: writes a Hugging Face checkpoint with random weights in the shapes of a model card."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = "Write a Hugging Face checkpoint of a model card, with random weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", required=True, help="a name under models/, such as openelm-3b, or a config's folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.tools.random_model import make_random

    out = make_random(args.card, args.out, dtype=args.dtype, seed=args.seed, progress=not args.json)
    if not args.json:
        print(f"wrote {out}")
    return {"path": str(out)}
