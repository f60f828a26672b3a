"""Options that several commands take: one for each field of `FlashConfig`, and those of sampling."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mlx_flash.config import DIRECT, LOOK_AHEAD, FlashConfig
from mlx_flash.engine.system.address_space import check_room
from mlx_flash.models.text.sampling import Sampling


def run_config(args: argparse.Namespace) -> FlashConfig:
    return FlashConfig(
        memory=args.memory,
        max_context=args.max_context,
        backend=args.backend,
        select=args.select,
        reselect=args.reselect,
        look_ahead=args.look_ahead,
        merge_gap=args.merge_gap,
        reads_in_flight=args.reads_in_flight,
        direct=args.direct,
        staging_blocks=args.staging_blocks,
        slots=args.slots,
    )


def auto_or(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: `auto`, or a value that `kind` reads."""

    def read(text: str) -> Any:
        return text if text == "auto" else kind(text)

    read.__name__ = getattr(kind, "__name__", "value")  # argparse says "invalid int value"
    return read


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="flash checkpoint, Hugging Face folder or repo id; default: the default model")
    parser.add_argument("--memory", default="auto", metavar="SIZE", help="memory budget, e.g. 2GB; default auto")
    parser.add_argument("--max-context", type=int, metavar="C", help="tokens the KV cache holds")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto, mlx or numpy")
    parser.add_argument("--select", default="auto", metavar="HOW",
                        help="which neurons are computed: auto (exact, the default), all, gate, router; these lose "
                        "quality: predictor, prompt:F, prompt:auto, threshold:S, static:F")  # fmt: skip
    parser.add_argument(
        "--reselect", type=int, metavar="R", help="with prompt: choose neurons again every R decoded tokens"
    )
    parser.add_argument("--look-ahead", default="auto", choices=LOOK_AHEAD,
                        help="prefetch for the next layer by guesses; auto: with predictor, while it pays")  # fmt: skip
    # None of these changes the output.
    parser.add_argument(
        "--merge-gap", default="auto", metavar="SIZE", help="join reads across gaps up to this size, e.g. 16KiB"
    )
    parser.add_argument("--reads-in-flight", type=auto_or(int), default="auto", metavar="N", help="most reads at once")
    parser.add_argument("--direct", default="auto", choices=DIRECT, help="whether reads bypass the page cache")
    parser.add_argument("--staging-blocks", type=auto_or(int), default="auto", metavar="N",
                        help="blocks of 256 bundles that are read ahead")  # fmt: skip
    parser.add_argument("--slots", type=auto_or(float), default="auto", metavar="SHARE",
                        help="share of the bundles that stay in memory, 0 to 1; default: as many as fit")  # fmt: skip


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N",
                        help=f"most tokens of a reply; default {max_tokens}")  # fmt: skip
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token")
    parser.add_argument(
        "--top-p", type=float, default=0.0, metavar="P", help="sample from the likeliest P mass; 0 (default) = off"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0 (default) = off"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="use the prompt without the model's chat template"
    )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `stream_generate`."""
    return {"temp": args.temp, "top_p": args.top_p, "top_k": args.top_k, "seed": args.seed}


def check_sampling(args: argparse.Namespace) -> None:
    """Raise UsageError for sampling options out of range, before anything is loaded."""
    Sampling(**sampling_of(args))


def check_address_space(backend: str) -> None:
    """Raise BudgetError where `ulimit -v` leaves no room for a backend's libraries, which would abort the process. Call
    it before they are imported."""
    check_room("mlx" if backend == "mlx" else "numpy")
