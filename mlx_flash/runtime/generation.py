"""From a prompt to text: `generate`, `stream_generate`, and the figures of a finished reply."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from mlx_flash.errors import UsageError
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.models.text.tokenizer import encode_plain


@dataclass
class GenerationResponse:
    """One step of `stream_generate`: the text that this token completes, and the figures so far.

    peak_memory in GB (10^9), as in mlx-lm; bytes_read_per_token counts decoding steps only.
    """

    text: str
    token: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    bytes_read_per_token: float
    hit_rate: float


def peak_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prompt_to_ids(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    """Ids of a prompt: BOS once, no chat template (as `mlx_lm.generate` does)."""
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    if not prompt:
        raise UsageError("the prompt is empty")
    return encode_plain(tokenizer, prompt)


def check_prompt(ids: Sequence[int], context: int, vocab: int, max_tokens: int) -> None:
    """Raise UsageError for a prompt that cannot run."""
    if not ids:
        raise UsageError("the prompt is empty")
    if len(ids) > context:
        raise UsageError(f"the prompt has {len(ids)} tokens, the context {context}: shorten it or raise --max-context")
    outside = [i for i in ids if not 0 <= i < vocab]
    if outside:
        raise UsageError(f"the prompt has the token id {outside[0]}, the model's vocabulary {vocab} entries")
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; it must be at least 1")


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[GenerationResponse]:
    """Yield a response per token until an end-of-sequence id, `max_tokens` or the context's end.

    temp 0 is greedy. prompt_cache: a conversation's, so that only the tokens after the last turn are computed. Raises
    UsageError for a prompt that is empty or longer than the context, ReadError when a read fails. The model can be used
    again afterwards.
    """
    run, sampling = model.flash, Sampling(temp, top_p, top_k, seed)
    ids = prompt_to_ids(tokenizer, prompt)
    check_prompt(ids, run.plan.context, run.plan.spec.vocab, max_tokens)
    # The last token sampled need not fit the cache: nothing follows it.
    limit = min(max_tokens, run.plan.context - len(ids) + 1)
    eos, detokenizer = set(tokenizer.eos_token_ids), tokenizer.detokenizer
    run.stats.reset()
    begin = time.perf_counter()
    prompt_s = decode_begin = 0.0
    steps = run.steps(model, ids, limit, sampling, prompt_cache)
    try:
        for made, token in enumerate(steps, 1):
            now = time.perf_counter()
            if made == 1:
                prompt_s, decode_begin = now - begin, now
                run.stats.reset()  # from here on only decoding is counted
            finish = "stop" if token in eos else "length" if made == limit else None
            if finish != "stop":
                detokenizer.add_token(token)
            if finish:
                detokenizer.finalize()
            decoded = made - 1
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                prompt_tokens=len(ids),
                prompt_tps=len(ids) / max(prompt_s, 1e-9),
                generation_tokens=made,
                generation_tps=decoded / max(now - decode_begin, 1e-9) if decoded else 0.0,
                peak_memory=peak_bytes() / 1e9,
                finish_reason=finish,
                bytes_read_per_token=run.stats.bytes_read / decoded if decoded else 0.0,
                hit_rate=run.stats.hit_rate,
            )
            if finish:
                return
    finally:
        steps.close()


def generate(model: Any, tokenizer: Any, prompt: str | Sequence[int], **options: Any) -> str:
    """The reply to a prompt as text; options are those of `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


@dataclass
class Reply:
    """A finished reply and its figures, as `generate --json` prints them."""

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    bytes_read_per_token: float
    hit_rate: float
    resident_bytes: int
    peak_bytes: int
    selector: str
    exact: bool


def make_reply(model: Any, tokenizer: Any, responses: Sequence[GenerationResponse], finish_reason: str) -> Reply:
    """Sum up a reply; `tokens` leaves out the end-of-sequence id."""
    plan, last = model.flash.plan, responses[-1]
    tokens = [r.token for r in responses if r.finish_reason != "stop"]
    return Reply(
        text="".join(r.text for r in responses),
        tokens=tokens,
        finish_reason=finish_reason,
        prompt_tokens_per_s=last.prompt_tps,
        decode_tokens_per_s=last.generation_tps,
        bytes_read_per_token=last.bytes_read_per_token,
        hit_rate=last.hit_rate,
        resident_bytes=plan.memory.total_bytes,
        peak_bytes=peak_bytes(),
        selector=plan.selector,
        exact=plan.exact,
    )
