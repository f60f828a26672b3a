"""One HTTP request of `mlx_flash server`, on top of mlx-lm's handler. Needs mlx-lm.

Owns which requests are refused, errors in OpenAI's shape, and how replies are sent: whole or streamed, one choice per
prompt. mlx-lm's handler owns the routes and the other fields of a request. Never touches the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from mlx_flash.errors import UsageError
from mlx_flash.models.mlx.compat import server as mlx_lm_server

from .replies import ChatLogprobs, CompletionLogprobs, ReplyPiece, StreamedReply, joined
from .requests import check_body, check_length, listed_logprobs, prompt_name, prompts_of, without_nulls

MOST_BODY_BYTES = 32 << 20
Listing = ChatLogprobs | CompletionLogprobs


class ErrorBody:
    """A connection's file that turns the text of an error into OpenAI's shape: OpenAI's client shows no other."""

    def __init__(self, file: Any, status: int):
        self._file, self._status = file, status

    def write(self, body: bytes) -> None:
        text = body.decode(errors="replace")
        with contextlib.suppress(ValueError):
            text = json.loads(text)["error"]
        self._file.write(json.dumps(error_body(text, self._status)).encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


@dataclasses.dataclass
class Usage:
    """Token counts of all replies to a request; prompt tokens that a KV cache held are counted in both fields."""

    prompt: int = 0
    made: int = 0
    cached: int = 0

    def add(self, reply: StreamedReply) -> None:
        self.prompt += len(reply.context.prompt)
        self.made += reply.made
        self.cached += max(reply.context.prompt_cache_count, 0)


class Handler(mlx_lm_server.APIHandler):
    """mlx-lm's handler of one request, after a check of the body: only requests that can run reach the generating
    thread."""

    _status = 200
    _streaming = False  # the headers of a stream are sent

    def log_message(self, text: str, *values: Any) -> None:
        logging.info("%s %s", self.address_string(), text % values)

    @property
    def provider(self) -> Any:
        """The provider of the model: its plan, names, tokenizer and texts."""
        return self.response_generator.model_provider

    @property
    def body(self) -> Any:
        return self._body

    @body.setter
    def body(self, body: Any) -> None:
        # mlx-lm reads every field from here, and its defaults stand for those that are missing only.
        self._body = without_nulls(body)

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
        try:
            super().do_POST()
        except (RecursionError, ValueError) as error:
            if hasattr(self, "_body"):
                raise
            self._refuse(400, f"Invalid JSON in request body: {error}")  # too deep, or a number of too many digits

    def validate_model_parameters(self) -> None:
        plan = self.provider.plan
        try:
            listed = listed_logprobs(self.body, self.path)
            self.logprobs, self.top_logprobs = listed >= 0, -1
            super().validate_model_parameters()
            check_body(self.body, self.path, plan.spec.vocab, plan.context)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"a field is of another type than it takes: {error}") from error
        except RecursionError as error:
            raise ValueError("a field is nested too deeply") from error
        self.top_logprobs = listed
        if self.top_k >= plan.spec.vocab:  # no limit
            self.top_k = 0

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        if self.requested_model not in ("default_model", *self.provider.names):
            return self._refuse_model(self.requested_model)
        self.requested_model = self.provider.name
        self.requested_draft_model = "default_model"
        try:
            prompts = [(request, 0)] if request.messages else self._prompts(request)
            (self._send_stream if self.stream else self._send_whole)(prompts, self._arguments(stop_words))
        except ConnectionError:  # the client hung up
            raise
        except Exception as error:
            self._fail(error)

    def _prompts(self, request: Any) -> list[tuple[Any, int]]:
        """A request of ids for each prompt, and the number of characters of the prompt. All are checked before the
        first runs."""
        tokenizer, found = self.provider.tokenizer, []
        prompts = prompts_of(request.prompt)
        for at, prompt in enumerate(prompts):
            name = prompt_name(at, len(prompts))
            if isinstance(prompt, str):
                try:
                    ids, length = list(tokenizer.encode(prompt)), len(prompt)
                except Exception as error:
                    raise UsageError(f"the tokenizer refuses {name}: {error}") from error
            else:
                ids, length = prompt, len(tokenizer.decode(prompt, skip_special_tokens=True))
            check_length(len(ids), self.provider.plan.context, name)
            found.append((dataclasses.replace(request, prompt=ids), length))
        return found

    def _arguments(self, stop_words: list[str]) -> Any:
        """The arguments of mlx-lm's generator, whose fields are named like those of the handler."""

        def made(kind: Any, **given: Any) -> Any:
            names = {each.name for each in dataclasses.fields(kind)} - given.keys()
            return kind(**given, **{name: getattr(self, name) for name in names})

        model = mlx_lm_server.ModelDescription(self.requested_model, self.requested_draft_model, self.adapter)
        sampling = made(mlx_lm_server.SamplingArguments)
        logits = made(mlx_lm_server.LogitsProcessorArguments)
        given = {"model": model, "sampling": sampling, "logits": logits, "stop_words": stop_words}
        return made(mlx_lm_server.GenerationArguments, **given)

    @contextlib.contextmanager
    def _reply(self, request: Any, arguments: Any) -> Iterator[StreamedReply]:
        """A reply that has begun: the generating thread has taken its prompt."""
        context, steps = self.response_generator.generate(
            request, dataclasses.replace(arguments), progress_callback=self._tell_progress
        )
        tokenizer, texts = self.provider.tokenizer, self.provider.texts
        try:
            yield StreamedReply(context, steps, arguments.stop_words, tokenizer.eos_token_ids, texts)
        finally:
            context.stop()

    def _tell_progress(self, processed: int, total: int) -> None:
        if self._streaming:  # so that the connection lives through a long prompt
            self._write_lines(f": keepalive {processed}/{total}")

    def _listing(self, prompt_length: int) -> Listing | None:
        if self.top_logprobs < 0:
            return None
        texts = self.provider.texts
        chat = self.object_type.startswith("chat")
        return ChatLogprobs(texts) if chat else CompletionLogprobs(texts, prompt_length)

    def _response(self, piece: ReplyPiece, index: int, calls: list[Any], listing: Listing | None, usage: Usage) -> Any:
        finish: Any = piece.finish_reason
        response = self.generate_response(
            piece.content,
            finish,
            usage.prompt,
            usage.made,
            usage.cached,
            tool_calls=calls,
            reasoning_text=piece.reasoning,
        )
        logprobs = listing.add(piece.steps) if listing and (piece.steps or not self.stream) else None
        response["choices"][0] |= {"index": index, "logprobs": logprobs}
        return response

    def _send_whole(self, prompts: list[tuple[Any, int]], arguments: Any) -> None:
        choices, usage, response = [], Usage(), {}
        for index, (request, length) in enumerate(prompts):
            with self._reply(request, arguments) as reply:
                piece = joined(reply)
            usage.add(reply)
            calls = mlx_lm_server.ToolCallFormatter(reply.context.tool_parser, request.tools)(piece.calls)
            response = self._response(piece, index, calls, self._listing(length), usage)
            choices += response["choices"]
        sent = json.dumps(response | {"choices": choices}).encode()
        self._set_completion_headers(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def _send_stream(self, prompts: list[tuple[Any, int]], arguments: Any) -> None:
        usage = Usage()
        for index, (request, length) in enumerate(prompts):
            with self._reply(request, arguments) as reply:
                if not self._streaming:
                    self._set_stream_headers(200)
                    self.end_headers()
                    self._streaming = True
                listing = self._listing(length)
                format_calls = mlx_lm_server.ToolCallFormatter(reply.context.tool_parser, request.tools, True)
                for piece in reply:
                    response = self._response(piece, index, format_calls(piece.calls), listing, usage)
                    self._write_lines(f"data: {json.dumps(response)}")
            usage.add(reply)
        if (self.stream_options or {}).get("include_usage"):
            response = self.completion_usage_response(usage.prompt, usage.made, usage.cached)
            self._write_lines(f"data: {json.dumps(response | {'object': self.object_type})}")
        self._write_lines("data: [DONE]")

    def _write_lines(self, text: str) -> None:
        self.wfile.write(f"{text}\n\n".encode())
        self.wfile.flush()

    def _fail(self, error: Exception) -> None:
        """Send an error to the client, also within a stream: without it a broken stream would look like a finished
        reply."""
        status, message = 400 if isinstance(error, UsageError) else 500, str(error)
        if getattr(self.server, "ending", False):
            message = "the server was stopped"
        elif status == 500:
            logging.error("a request from %s failed: %s: %s", self.client_address[0], type(error).__name__, error)
        if self._streaming:
            self._write_lines(f"data: {json.dumps(error_body(message, status))}")
        else:
            self._refuse(status, message)

    def end_headers(self) -> None:
        super().end_headers()
        if self._status >= 400:
            self.wfile: Any = ErrorBody(self.wfile, self._status)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        self._status = status_code
        super()._set_completion_headers(status_code)

    def _refuse(self, status: int, message: str) -> None:
        self._set_completion_headers(status)
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
