"""mlx-lm's HTTP server over one model whose FFN is read from flash. Needs mlx-lm.

Owns what happens when a run fails, and which KV caches are kept. Routes, sampling and batching are mlx-lm's; handler.py
reads a request. One thread loads the model and generates; the threads that serve HTTP never touch the model.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from http.server import ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_flash.errors import FlashError, UsageError
from mlx_flash.models.mlx.compat import (
    LRUPromptCache,
    can_trim_prompt_cache,
    check_server,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_flash.models.mlx.compat import server as mlx_lm_server
from mlx_flash.models.text.tokenizer import TEMPLATE_SECONDS, apply_template
from mlx_flash.runtime.loading import load_planned
from mlx_flash.runtime.planning.run_plan import RunPlan

from .handler import Handler
from .replies import Likeliest, TokenTexts
from .requests import check_length

MOST_WAITING = 256


class Provider(mlx_lm_server.ModelProvider):
    """The one model that mlx-lm's server can ask for; the generating thread loads it.

    names: names that requests may use for the model; replies give the first one
    """

    def __init__(self, plan: RunPlan, names: tuple[str, ...], settings: SimpleNamespace):
        # Not the base's own beginning: it prepares to load by path.
        self.plan, self.names, self.name = plan, names, names[0]
        self.cli_args: Any = settings
        self.model_key: Any = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.texts: Any = None
        self.draft_model = self.processor = None
        self.is_batchable = False
        self.loaded = threading.Event()  # or failed
        self.failure: BaseException | None = None

    def load_default(self) -> None:
        if self.model is not None:
            return
        try:
            self.model, self.tokenizer = load_planned(self.plan)
            self.texts = TokenTexts(self.tokenizer)
        except BaseException as error:
            self.failure = error
            raise
        else:
            self.model_key = (self.name, None, None)
            self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model))
        finally:
            self.loaded.set()

    def load(self, model_path: Any, adapter_path: Any = None, draft_model_path: Any = None) -> tuple[Any, Any]:
        """The one model, whatever the name: the handler has refused requests for others."""
        return self.model, self.tokenizer

    def reset(self) -> None:
        """Called when the server ends: closes the model."""
        if self.model is not None:
            self.model.flash.close()
        self.model = self.tokenizer = None


def likeliest(logprobs: mx.array, count: int, tokenizer: Any) -> Likeliest | tuple[()]:
    """The `count` likeliest tokens of a step, logprobs (vocab,); nothing for a count below 0. Replaces mlx-lm's
    function, which does not order them and takes logprobs rounded to the model's dtype: in 16 bits their probabilities
    need not add up to 1."""
    if count < 0:
        return ()
    exact = logprobs.astype(mx.float32)
    excess: Any = mx.logsumexp(exact).item()
    if not (count := min(count, exact.size)):
        return Likeliest([], excess)
    ids: Any = mx.argpartition(-exact, kth=count - 1)[:count]
    found = zip(ids.tolist(), (exact[ids] - excess).tolist(), strict=True)
    return Likeliest(sorted(found, key=lambda each: (-each[1], each[0])), excess)


class PromptIds:
    """Replaces the tokenizer for a prompt that is given as ids."""

    def encode(self, ids: list[int]) -> list[int]:
        return list(ids)


class Generator(mlx_lm_server.ResponseGenerator):
    """mlx-lm's generating thread, except that it goes on after a failure and keeps replies within the context."""

    def __init__(self, provider: Provider, prompt_cache: LRUPromptCache):
        self._waiting: list[Queue[Any]] = []  # of the last requests
        self._replies: list[Any] = []  # begun last; ended ones do no harm
        self.model_provider: Provider
        replaced: Any = mlx_lm_server
        replaced._format_top_logprobs = likeliest
        super().__init__(provider, prompt_cache)

    def _run_generate(self) -> None:
        while True:
            try:
                return self._generate()
            except Exception as error:
                if self.model_provider.failure is not None:
                    self._generation_failed = True
                    return
                # A failed read, memory: all replies under way end, and the next request finds the model in order.
                logging.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, FlashError))
                waiting, self._waiting = self._waiting, []
                for queue in waiting:
                    queue.put(error)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        context, reply = super().generate(*arguments, **options)
        self._replies = [*self._replies[-MOST_WAITING:], context]
        return context, reply

    def stop_and_join(self) -> None:
        for context in self._replies:
            context.stop()
        super().stop_and_join()

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is not None:
            self._waiting = [*self._waiting[-MOST_WAITING:], request[0]]
        return request

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if request.messages:
            limit = self.model_provider.cli_args.template_seconds
            made = apply_template(partial(super()._tokenize, tokenizer, request, args), limit)
        else:
            made = super()._tokenize(PromptIds(), request, args)
        count, context = len(made[0]), self.model_provider.plan.context
        check_length(count, context, "the prompt")
        args.max_tokens = min(args.max_tokens, context - count + 1)
        return made


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True  # a client that reads nothing does not keep the process alive

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._answering: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.ending = False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._answering.add(threading.current_thread())
        super().process_request_thread(request, client_address)

    def wait_for_answers(self, seconds: float) -> None:
        """Wait until the threads that answer have ended, at most so many seconds: Python aborts if one still writes at
        its exit."""
        end = time.monotonic() + seconds
        for thread in list(self._answering):
            thread.join(max(0.0, end - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        if self.ending:  # the generating thread has ended
            logging.info("the reply to %s ended with the server", client_address[0])
        elif isinstance(sys.exc_info()[1], ConnectionError):  # the client hung up: its reply has been stopped
            logging.info("%s hung up", client_address[0])
        else:
            logging.exception("a request from %s failed", client_address[0])


class Caches(LRUPromptCache):
    """KV caches of replies that ended, for prompts with the same beginning: at most `tokens` tokens of them, 0 for
    none."""

    def __init__(self, tokens: int, bytes_per_token: int):
        super().__init__(max_size=1 << 20 if tokens else 0, max_bytes=tokens * bytes_per_token)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest or cache is None:
            return cache, rest
        # All of the prompt is there, but something must run to give the next token's logits.
        if not can_trim_prompt_cache(cache):
            return None, tokens
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]


class Server:
    """A model behind an HTTP socket that is bound at once: `start` loads the model, `serve` answers until `stop`.

    plan: the model to load; names: names that requests may use for it; replies give the first one
    host, port: port 0 takes a free one; replies: generated at once. The plan's `sequences` beyond these hold the KV
    caches of replies that ended. origins: web pages whose requests are allowed
    max_tokens, temp, top_p, top_k: for requests that do not set them; template_seconds: for a chat template to run
    """

    def __init__(
        self,
        plan: RunPlan,
        names: tuple[str, ...],
        host: str,
        port: int,
        replies: int = 1,
        origins: Sequence[str] = (),
        template_seconds: float = TEMPLATE_SECONDS,
        **defaults: Any,
    ):
        check_server()
        settings = SimpleNamespace(
            **{"max_tokens": 512, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | defaults,
            template_seconds=template_seconds,
            model=names[0],
            allowed_origins=list(origins),
            chat_template_args={},
            num_draft_tokens=0,
            decode_concurrency=replies,
            prompt_concurrency=1,
            prefill_step_size=min(plan.config.prefill_chunk, plan.context),
            prompt_cache_bytes=None,
            kv_bits=None,
            kv_group_size=64,
            quantized_kv_start=0,
        )
        self.plan, self.provider = plan, Provider(plan, names, settings)
        # A selector that is not exact learns from a whole prompt, so it cannot continue from a kept KV cache.
        kept = (plan.config.sequences - replies) * plan.context if plan.exact else 0
        self.caches = Caches(kept, plan.costs.fixed["KV cache"] // (plan.config.sequences * plan.context))
        self.generator: Generator | None = None
        self._fingerprint = mlx_lm_server.get_system_fingerprint()
        self._socket = self._bind(host, port)

    def _bind(self, host: str, port: int) -> HttpServer:
        def handle(*arguments: Any) -> Handler:
            assert self.generator is not None
            return Handler(self.generator, *arguments, system_fingerprint=self._fingerprint)

        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            bound: type[HttpServer] = type("Bound", (HttpServer,), {"address_family": found[0]})
            address: Any = found[4]
            return bound(address, handle)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host} port {port}: {error}; choose another --port or --host"
            ) from error

    @property
    def url(self) -> str:
        host, port = self._socket.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/v1"

    def start(self) -> None:
        """Load the model in the thread that will generate. Raises the errors of loading."""
        self.generator = Generator(self.provider, self.caches)
        self.provider.loaded.wait()
        if self.provider.failure is not None:
            self.generator.join()
            self._socket.server_close()
            raise self.provider.failure

    def serve(self) -> None:
        """Answer requests until `stop` or an interrupt; replies that are under way end then."""
        assert self.generator is not None
        try:
            self._socket.serve_forever(poll_interval=0.1)
        finally:
            self._socket.ending = True
            self._socket.server_close()
            self.generator.stop_and_join()
            self._socket.wait_for_answers(5)

    def stop(self) -> None:
        """End `serve`, from another thread."""
        self._socket.shutdown()
