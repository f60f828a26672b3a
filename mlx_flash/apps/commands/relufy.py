"""`mlx_flash relufy`: gives a checkpoint with SiLU exact zeros. Needs PyTorch only when it runs."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from mlx_flash.tools.relufication.options import ACTIVATIONS, DEVICES, PRECISIONS, RelufyConfig

DESCRIPTION = "Replace SiLU by ReLU, and recover by distillation (needs PyTorch)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of RelufyConfig, and those that name files."""
    plain = RelufyConfig()
    parser.add_argument("--hf-path", required=True, metavar="PATH_OR_REPO", help="the original, with SiLU")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, in Hugging Face's format")
    parser.add_argument("--revision", help="branch, tag or commit of the repo")
    parser.add_argument("--data", metavar="TEXT", help="a text file to learn from; default: text the original writes")
    parser.add_argument("--activation", default=plain.activation, choices=ACTIVATIONS)
    parser.add_argument("--target-sparsity", type=float, metavar="S", help="share of exact zeros, such as 0.9")
    parser.add_argument(
        "--pressure", action=argparse.BooleanOptionalAction, help="a loss that leads to it; default: for relu only"
    )
    for name, text in (
        ("tokens", "tokens of text to learn from"),
        ("steps", "training steps"),
        ("batch", "texts in a step"),
        ("seed", "of all random numbers"),
    ):
        value = getattr(plain, name)
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text}; default {value}")
    parser.add_argument("--context", type=int, metavar="C", help="tokens of a text; default the model's, at most 512")
    parser.add_argument("--lr", type=float, help="highest learning rate; default 0.2 / width")
    parser.add_argument("--hidden-weight", type=float, default=plain.hidden_weight, metavar="W",
                        help="weight of the distance between hidden states in the loss; default 0")  # fmt: skip
    parser.add_argument("--precision", default=plain.precision, choices=PRECISIONS)
    parser.add_argument("--device", default=plain.device, choices=DEVICES)
    parser.add_argument(
        "--no-resume", action="store_true", help="start from the beginning, even after an unfinished run"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.tools.relufication.relufication import relufy

    config = RelufyConfig(**{field.name: getattr(args, field.name) for field in fields(RelufyConfig)})
    options = {"data": args.data, "revision": args.revision, "resume": not args.no_resume, "progress": not args.json}
    report = relufy(args.hf_path, args.out, config, **options)
    if not args.json:
        for name in ("original", "replaced", "recovered"):
            score = report[name]
            print(
                f"{name:9s} {score['nats_per_token']:.4f} nats per token (perplexity {score['perplexity']:.3f}), "
                f"{score['zeros']:.1%} zeros, {score['kl']:.4f} nats from the original"
            )
        print(f"wrote {report['path']}; run it: mlx_flash generate --model {report['path']} --prompt ...")
    return report
