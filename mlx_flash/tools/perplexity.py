"""How well a model predicts a text while a selector works exactly as in decoding."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.config import FlashConfig
from mlx_flash.errors import UsageError
from mlx_flash.runtime.generation import peak_bytes
from mlx_flash.runtime.loading import load
from mlx_flash.stats import Stats

from .text_windows import CONTEXT_TOKENS, SCORED_TOKENS, Window, cut_windows, encode_text, read_text, spread_evenly


def windows_of_files(
    tokenizer: Any, data: Sequence[str | Path], context: int, tokens: int | None
) -> tuple[list[Window], int]:
    """The windows of some files, each file on its own, with about `tokens` scored tokens evenly spread; and how many
    bytes of text the scored tokens are. Raises UsageError for a text that is too short."""
    check_tokens(tokens)
    found: list[Window] = []
    for path in data:
        before, ids = encode_text(tokenizer, read_text(path))
        if len(ids) <= CONTEXT_TOKENS:
            raise UsageError(f"{path} has {len(ids)} tokens; at least {CONTEXT_TOKENS + 1} are needed, all but the "
                             f"first {CONTEXT_TOKENS} are scored")  # fmt: skip
        if len(before) + CONTEXT_TOKENS >= context:
            raise UsageError(f"a context of {context} tokens is too short; at least {CONTEXT_TOKENS + 2} are needed")
        found += cut_windows(before, ids, CONTEXT_TOKENS, min(SCORED_TOKENS, context - CONTEXT_TOKENS - len(before)))
    chosen = spread_evenly(found, tokens)
    return chosen, sum(len(tokenizer.decode(window.scored).encode()) for window in chosen)


def check_tokens(tokens: int | None) -> None:
    """Raise UsageError unless `tokens` is None or positive."""
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens is {tokens}; it must be at least 1")


def score(model: Any, window: Window) -> float:
    """Nats of a window's scored tokens: the first one right after the prompt, the others decoded one by one."""
    nats = 0.0
    logits_after = model.flash.forced(model, window.prompt, window.scored[:-1])
    for made, (token, logits) in enumerate(zip(window.scored, logits_after, strict=True)):
        if not made:
            model.flash.stats.reset()  # the prompt's reads do not count
        wide = logits.astype(np.float64)
        top = wide.max()
        nats += top + math.log(np.exp(wide - top).sum()) - wide[token]
    return nats


def measure_perplexity(
    model: str | Path | None,
    data: Sequence[str | Path],
    config: FlashConfig | None = None,
    *,
    tokens: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Nats per token and bits per byte of a model on text files, and how much was read.

    A window is a prompt of 128 tokens, where every selector is exact, and 256 tokens that are scored one by one, where
    the selector works exactly as in decoding. tokens: score about this many, evenly spread. Raises UsageError for texts
    that are empty, too short or not UTF-8, and the errors of `load`.
    """
    check_tokens(tokens)
    for path in data:
        read_text(path)  # before anything is loaded
    loaded, tokenizer = load(model, config)
    try:
        chosen, text_bytes = windows_of_files(tokenizer, data, loaded.flash.plan.context, tokens)
        found = measure(loaded, chosen, progress)
    finally:
        loaded.flash.close()
    nats = found["nats_per_token"] * found["tokens"]
    return {**found, "bits_per_byte": nats / math.log(2) / text_bytes, "text_bytes": text_bytes}


def check_ids(chosen: Sequence[Window], vocab: int) -> None:
    """Raise UsageError for ids beyond the model's vocabulary."""
    largest = max(max(max(window.prompt), max(window.scored)) for window in chosen)
    if largest >= vocab:
        raise UsageError(f"the tokenizer gives id {largest}, the model has {vocab}: they do not belong together")


def measure(model: Any, chosen: Sequence[Window], progress: bool = False) -> dict[str, Any]:
    """Score windows with a loaded model; reads are counted in decoding steps only."""
    run, plan, begin = model.flash, model.flash.plan, time.perf_counter()
    nats, tokens, stats = 0.0, 0, Stats()
    check_ids(chosen, plan.spec.vocab)
    for window in tqdm(chosen, desc=plan.selector, unit="window", disable=not progress, file=sys.stderr):
        nats += score(model, window)
        tokens += len(window.scored)
        stats.add(run.stats)
    steps = max(1, tokens - len(chosen))  # the first token of a window follows from its prompt
    return {
        "selector": plan.selector,
        "exact": plan.exact,
        "backend": plan.backend_name,
        "tokens": tokens,
        "windows": len(chosen),
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bytes_read_per_token": stats.bytes_read / steps,
        "hit_rate": stats.hit_rate,
        "bundles_per_token": (stats.hits + stats.misses) / steps,
        "ffn_bytes": sum(layout.count * layout.stride for layout in plan.checkpoint.layouts),
        "ffn_resident_bytes": plan.ffn_resident_bytes,
        "resident_bytes": plan.memory.total_bytes,
        "peak_bytes": peak_bytes(),
        "seconds": time.perf_counter() - begin,
    }
