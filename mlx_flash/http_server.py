"""`mlx_flash server`: mlx-lm's HTTP server over one model that reads its FFN from flash. Needs mlx-lm.

Owns what is checked of a request before it runs, and what happens when a run fails. Routes, sampling, streaming and
batching are mlx-lm's. One thread loads the model and generates; those that serve HTTP never touch it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from mlx_lm import server as mlx_lm_server
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from .errors import BackendError, FlashError, UsageError
from .experts import ExpertPlan
from .http_requests import check_body
from .load import RunPlan, load_planned

MOST_BODY_BYTES = 32 << 20
MOST_WAITING = 256
NEEDED = {
    "ResponseGenerator": ("_run_generate", "_generate", "_next_request", "_tokenize", "generate", "stop_and_join"),
    "APIHandler": ("validate_model_parameters", "handle_completion", "handle_models_request"),
}


def check_mlx_lm() -> None:
    """Raise BackendError for an mlx-lm whose server is not made of the pieces used here."""
    for name, methods in NEEDED.items():
        if not all(hasattr(getattr(mlx_lm_server, name, None), method) for method in methods):
            raise BackendError("mlx_flash server needs mlx-lm 0.32 or later; pip install -U mlx-lm")


class Provider(mlx_lm_server.ModelProvider):
    """What mlx-lm's server asks for models: one model, loaded by the thread that generates, and no other ever.

    names: what requests may call it, the one that replies give first
    """

    def __init__(self, plan: RunPlan | ExpertPlan, names: tuple[str, ...], settings: SimpleNamespace):
        # Not the base's own beginning: it prepares to load by path.
        self.plan, self.names, self.name = plan, names, names[0]
        self.cli_args: Any = settings
        self.model_key: Any = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.draft_model = self.processor = None
        self.is_batchable = False
        self.loaded = threading.Event()  # or failed
        self.failure: BaseException | None = None

    def load_default(self) -> None:
        if self.model is not None:
            return
        try:
            self.model, self.tokenizer = load_planned(self.plan)
        except BaseException as error:
            self.failure = error
            raise
        else:
            self.model_key = (self.name, None, None)
            self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(self.model))
        finally:
            self.loaded.set()

    def load(self, model_path: Any, adapter_path: Any = None, draft_model_path: Any = None) -> tuple[Any, Any]:
        """The one model, whatever the name: requests for others were refused before."""
        return self.model, self.tokenizer

    def reset(self) -> None:
        """The server ends."""
        if self.model is not None:
            self.model.flash.close()
        self.model = self.tokenizer = None


class Generator(mlx_lm_server.ResponseGenerator):
    """mlx-lm's generating thread, which goes on after a failure and keeps replies within the context."""

    def __init__(self, provider: Provider, prompt_cache: LRUPromptCache):
        self._waiting: list[Queue[Any]] = []  # of the last requests
        self._replies: list[Any] = []  # begun last; ended ones do no harm
        self.model_provider: Provider
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
        try:
            made = super()._tokenize(tokenizer, request, args)
        except Exception as error:  # the template's own, or what Jinja and tokenizers raise
            raise UsageError(f"the tokenizer refuses this prompt: {error}") from error
        count, context = len(made[0]), self.model_provider.plan.context
        if not count:
            raise UsageError("the prompt is empty")
        if count > context:
            raise UsageError(f"the prompt has {count} tokens, the context {context}: shorten it, or start the server "
                             "with a larger --max-context")  # fmt: skip
        args.max_tokens = min(args.max_tokens, context - count + 1)
        return made


class ErrorBody:
    """A connection's file, to which an error's text is written in OpenAI's shape: its client shows no other."""

    def __init__(self, file: Any, status: int):
        self._file, self._status = file, status

    def write(self, body: bytes) -> None:
        text = body.decode(errors="replace")
        with contextlib.suppress(ValueError):
            text = json.loads(text)["error"]
        kind = "invalid_request_error" if self._status < 500 else "server_error"
        error = {"message": text, "type": kind, "param": None, "code": str(self._status)}
        self._file.write(json.dumps({"error": error}).encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Handler(mlx_lm_server.APIHandler):
    """mlx-lm's handler of one request, after its body was checked: what reaches the generating thread can run."""

    _status = 200

    def log_message(self, text: str, *values: Any) -> None:
        logging.info("%s %s", self.address_string(), text % values)

    @property
    def provider(self) -> Provider:
        found = self.response_generator.model_provider
        assert isinstance(found, Provider)
        return found

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if length.isdecimal():  # mlx-lm answers for one that is missing or no number; a negative one is read for ever
            if int(length) > MOST_BODY_BYTES:
                return self._refuse(413, f"the body has {length} bytes; at most {MOST_BODY_BYTES} are read")
            body = self.rfile.read(int(length))
            try:
                body.decode()
            except UnicodeDecodeError as error:
                return self._refuse(400, f"the body is not UTF-8 text (byte {error.start})")
            self.rfile = io.BytesIO(body)
        elif length.lstrip("+-").isdecimal():
            return self._refuse(400, f"the Content-Length is {length}; it must be a number of bytes")
        super().do_POST()

    def validate_model_parameters(self) -> None:
        try:
            super().validate_model_parameters()
            check_body(self.body, self.path, self.provider.plan.spec.vocab)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"a field is of another type than it takes: {error}") from error
        if self.top_k >= self.provider.plan.spec.vocab:  # no limit
            self.top_k = 0

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        if self.requested_model not in ("default_model", *self.provider.names):
            return self._refuse_model(self.requested_model)
        self.requested_model = self.provider.name
        self.requested_draft_model = "default_model"
        super().handle_completion(request, stop_words)

    def end_headers(self) -> None:
        super().end_headers()
        if self._status >= 400:
            self.wfile: Any = ErrorBody(self.wfile, self._status)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # mlx-lm answers 404 to whatever fails before the first token.
        error = sys.exc_info()[1] if status_code == 404 else None
        if error is not None:
            status_code = 400 if isinstance(error, UsageError) else 500
        self._status = status_code
        super()._set_completion_headers(status_code)

    def _refuse(self, status: int, message: str) -> None:
        self._status = status
        super()._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": message}).encode())

    def _refuse_model(self, asked: str) -> None:
        self._refuse(404, f"the model {asked[:80]!r} is not served here; this server has {self.provider.name!r} only")

    def handle_models_request(self) -> None:
        asked = unquote(self.path.removeprefix("/v1/models").removeprefix("/"))
        if asked and asked not in self.provider.names:
            return self._refuse_model(asked)
        model = {"id": self.provider.name, "object": "model", "created": self.created, "owned_by": "mlx_flash"}
        self._set_completion_headers(200)
        self.end_headers()
        self.wfile.write(json.dumps(model if asked else {"object": "list", "data": [model]}).encode())


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True  # a client that reads nothing keeps nobody from ending

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._answering: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.ending = False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._answering.add(threading.current_thread())
        super().process_request_thread(request, client_address)

    def wait_for_answers(self, seconds: float) -> None:
        """Until the threads that answer have ended, so long at most: Python aborts if one is writing when it ends."""
        end = time.monotonic() + seconds
        for thread in list(self._answering):
            thread.join(max(0.0, end - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        if self.ending:  # nobody generates any more
            logging.info("the reply to %s ended with the server", client_address[0])
        elif isinstance(sys.exc_info()[1], ConnectionError):  # the client hung up: its reply has been stopped
            logging.info("%s hung up", client_address[0])
        else:
            logging.exception("a request from %s failed", client_address[0])


class Caches(LRUPromptCache):
    """KV caches of replies that ended, for prompts that begin as they did: at most `tokens` of them, 0 for none."""

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
    """A model behind an HTTP socket, bound at once: `start` loads it, `serve` answers until `stop`.

    plan: what is loaded; names: of the model, in requests, the one that replies give first
    host, port: port 0 takes a free one; replies: made at once. What `sequences` of the plan holds beyond these keeps
    the KV caches of replies that ended. origins: of web pages whose requests are let through
    max_tokens, temp, top_p, top_k: for requests that do not say
    """

    def __init__(
        self,
        plan: RunPlan | ExpertPlan,
        names: tuple[str, ...],
        host: str,
        port: int,
        replies: int = 1,
        origins: Sequence[str] = (),
        **defaults: Any,
    ):
        check_mlx_lm()
        settings = SimpleNamespace(
            **{"max_tokens": 512, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | defaults,
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
        # What is not exact learns from a whole prompt: none is taken up half way.
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
        """Load the model in the thread that will generate. Raises what loading raises."""
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
