"""The reply loop on mlx-lm's models: the prompt in chunks, then token by token, a step ahead where nothing is read.

Needs mlx-lm. Knows models and KV caches; neither folders nor selectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.models.prompt_cache import PromptCache

from .compat import can_trim_prompt_cache, generation_stream, make_prompt_cache, wired_limit

Sampler = Callable[[mx.array], mx.array]


def never_reads(plan: Any) -> bool:
    """Whether a run's plan leaves nothing to read while decoding, once every slot has been filled."""
    if plan.exact or plan.all_resident:
        return bool(plan.all_resident)
    if plan.selection.name not in ("prompt", "static") or plan.config.reselect is not None:
        return False
    slots = zip(plan.memory.capacities, plan.costs.counts, strict=True)
    return all(capacity >= round(plan.selection.fraction * count) for capacity, count in slots)


class MlxReply:
    """One reply of a model: runs the prompt and then single tokens, with their keys and values in one cache.

    prompt_cache: that of the last reply, whose beginning this one uses if the prompts begin alike
    """

    def __init__(self, model: nn.Module, prefill_chunk: int, prompt_cache: PromptCache):
        self.model, self.chunk, self.prompt_cache = model, prefill_chunk, prompt_cache
        self.cache: list[Any] = []

    def _take_up(self, ids: Sequence[int]) -> int:
        """How many tokens of the prompt the last reply's cache holds, which is cut to them; a new cache if none."""
        held, cache = self.prompt_cache.prefix_length(ids), self.prompt_cache.cache
        if held and can_trim_prompt_cache(cache):
            for layer in cache:  # each by itself: an interrupt leaves some of them a token ahead
                layer.trim(layer.offset - held)
        else:
            held, cache = 0, make_prompt_cache(self.model)
        self.cache = self.prompt_cache.cache = cache
        self.prompt_cache.ids = list(ids[:held])
        return held

    def prefill(self, ids: Sequence[int]) -> mx.array:  # (T,) -> (1, vocab)
        """The logits after the prompt. With an exact selector the last token runs alone, as in mlx-lm, so that the head
        runs for one token only; a lossy selector must not select for a token of the prompt."""
        alone = 1 if self.model.flash.plan.exact else 0
        prompt = mx.array(list(ids[self._take_up(ids) :]), mx.int32)
        self.model.flash.shared.begin_reply()
        while prompt.size > max(alone, 1):
            count = min(self.chunk, prompt.size - alone)
            logits = self._logits(prompt[:count], decoding=False)
            prompt = prompt[count:]
            if prompt.size:
                mx.eval([layer.state for layer in self.cache])
                mx.clear_cache()
        if prompt.size:
            logits = self._logits(prompt, decoding=False)
        self.prompt_cache.ids = list(ids)
        return logits

    def decode(self, token: mx.array) -> mx.array:  # (1,) -> (1, vocab)
        return self._logits(token, decoding=True)

    def _logits(self, ids: mx.array, decoding: bool) -> mx.array:
        with mx.stream(generation_stream), self.model.flash.shared.phase(decoding):
            return self.model(ids[None], cache=self.cache)[:, -1, :]


def _sample(logits: mx.array, sampler: Sampler) -> mx.array:
    """logits (1, vocab) -> the token (1,), begun but not waited for."""
    with mx.stream(generation_stream):
        token = sampler(logits - mx.logsumexp(logits, keepdims=True))
        mx.async_eval(token)
    return token


def steps_ahead(reply: MlxReply, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> Iterator[int]:
    """The ids of a reply. Each step begins before the token before it is yielded, so that the GPU does not wait for
    Python. The first step is an exception: it may have to read what it selects."""
    token = _sample(reply.prefill(prompt), sampler)
    known = _as_int(token)
    yield known
    if max_tokens > 1:
        token = _sample(reply.decode(token), sampler)
    for made in range(2, max_tokens + 1):
        reply.prompt_cache.ids.append(known)
        following = _sample(reply.decode(token), sampler) if made < max_tokens else token
        known = _as_int(token)
        yield known
        token = following


def steps_in_turn(reply: MlxReply, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> Iterator[int]:
    """The ids of a reply, one step at a time: where steps read, a step ahead would delay each token by the reads of the
    next one."""
    token = _sample(reply.prefill(prompt), sampler)
    for made in range(1, max_tokens + 1):
        known = _as_int(token)
        yield known
        if made < max_tokens:
            token = _sample(reply.decode(token), sampler)
            reply.prompt_cache.ids.append(known)


def _as_int(token: mx.array) -> int:
    found = token.item()
    assert isinstance(found, int)
    return found


@contextmanager
def wired(model: nn.Module) -> Iterator[None]:
    """On Metal, wire what is allocated now (dense part, slabs, staging) and no more: mlx-lm's own limit is the most
    that the machine recommends. Theirs is put back at the end. Not run: needs Metal."""
    with wired_limit(model, [generation_stream]):  # type: ignore[list-item]
        most = mx.device_info().get("max_recommended_working_set_size")
        if most is not None:
            mx.set_wired_limit(min(int(most), mx.get_active_memory()))
        yield
