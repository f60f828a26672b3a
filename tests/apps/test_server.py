"""`mlx_flash server` over HTTP with OpenAI's client: replies, refusals, and failures that the server survives."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash import cli
from mlx_flash.config import FlashConfig
from mlx_flash.errors import ReadError
from tests.conftest import shared_path

mx = pytest.importorskip("mlx.core", reason="the server is mlx-lm's")
pytest.importorskip("mlx_lm", reason="the server is mlx-lm's")
openai = pytest.importorskip("openai", reason="tested with OpenAI's client; pip install openai")

from mlx_lm.models.cache import KVCache, RotatingKVCache  # noqa: E402

from mlx_flash.apps.server.http_server import Caches, Server  # noqa: E402
from mlx_flash.apps.server.server_plan import plan_server  # noqa: E402

PROMPT = "Once upon a time"
CONTEXT = 200
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    "{% if loops %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(shutil.copytree(shared_path("data/models/stories260K"), tmp_path_factory.mktemp("served") / "tiny"))
    source.chmod(0o755)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return mlx_flash.convert(source, source.parent / "tiny-flash")


class Served:
    """A server in threads of this process, and what the same model says without one."""

    def __init__(self, path: Path, replies: int = 2, kept: int = 1, **fields: Any):
        plan, replies = plan_server(str(path), FlashConfig(max_context=CONTEXT, **fields), replies, kept)
        self.server = Server(plan, ("tiny", str(path)), "127.0.0.1", 0, replies, template_seconds=0.5)
        self.server.start()
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()
        self.client = openai.OpenAI(base_url=self.server.url, api_key="none", max_retries=0, timeout=60)
        self.model, self.tokenizer = mlx_flash.load(path, backend="mlx", max_context=CONTEXT)

    def alone(self, prompt: str | list[int], tokens: int) -> str:
        return mlx_flash.generate(self.model, self.tokenizer, prompt, max_tokens=tokens)

    def complete(self, prompt: str, tokens: int, **options: Any) -> Any:
        return self.client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, **options)

    def raw(self, body: bytes | None, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        host = self.server.url.split("/")[2]
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.putrequest("POST" if body is not None else "GET", path)
        if body is not None and "Content-Length" not in {name.replace("_", "-") for name in headers}:
            headers["Content_Length"] = str(len(body))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def close(self) -> None:
        self.client.close()
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.model.flash.close()


@pytest.fixture(scope="module")
def served(flash: Path) -> Iterator[Served]:
    """Nothing of the FFN stays in memory."""
    found = Served(flash, slots=0)
    assert found.server.plan.memory.capacities == (0,) * 5
    yield found
    found.close()


def test_completions_and_chats_streamed_and_whole(served: Served) -> None:
    wanted = served.alone(PROMPT, 12)
    whole = served.complete(PROMPT, 12)
    assert whole.choices[0].text == wanted and whole.choices[0].finish_reason == "length"
    assert whole.model == "tiny" and whole.usage.completion_tokens == 12
    chunks = list(served.complete(PROMPT, 12, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == wanted
    assert chunks[-1].usage.completion_tokens == 12 and len(chunks) > 4

    text = "user: hello\nassistant:"
    wanted = served.alone(served.tokenizer.encode(text, add_special_tokens=False), 12)
    options = {"model": "default_model", "max_tokens": 12, "temperature": 0}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    chat = served.client.chat.completions.create(messages=messages, **options)
    assert chat.choices[0].message.content == wanted
    streamed = served.client.chat.completions.create(messages=messages, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == wanted
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"


def test_requests_at_once_get_what_each_gets_alone(served: Served) -> None:
    prompts = [PROMPT, "x", "The quick brown fox jumps over the lazy dog", PROMPT + "!"]
    wanted = [served.alone(prompt, 25) for prompt in prompts]
    assert len(set(wanted)) == len(wanted)

    def ask(prompt: str) -> str:
        return "".join(chunk.choices[0].text for chunk in served.complete(prompt, 25, stream=True))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, prompts)) == wanted
        seeded = pool.submit(served.complete, PROMPT, 9, seed=3)  # not in a batch: what is under way ends first
        assert ask("x") == wanted[1] and seeded.result().choices[0].text == served.alone(PROMPT, 9)


def test_a_conversation_goes_on_from_its_kv_cache(served: Served) -> None:
    first = served.complete(PROMPT, 8)
    longer = PROMPT + "s there was"
    again = served.complete(longer, 8)
    assert again.choices[0].text == served.alone(longer, 8)
    assert again.usage.prompt_tokens_details.cached_tokens >= 4
    assert served.complete(longer, 8).choices[0].text == again.choices[0].text
    assert first.choices[0].text == served.alone(PROMPT, 8)
    caches = served.server.caches
    assert 0 < caches.nbytes <= caches.max_bytes


def test_a_prompt_that_is_cached_whole_runs_its_last_token() -> None:
    caches, held = Caches(100, 1000), KVCache()
    held.update_and_fetch(mx.zeros((1, 1, 3, 8)), mx.zeros((1, 1, 3, 8)))
    caches.insert_cache("tiny", [1, 2, 3], [held])
    cache, rest = caches.fetch_nearest_cache("tiny", [1, 2, 3])
    assert rest == [3] and cache[0].offset == 2 and held.offset == 3
    cache, rest = caches.fetch_nearest_cache("tiny", [1, 2, 3, 4])
    assert rest == [4] and cache[0].offset == 3
    caches.insert_cache("tiny", [7, 8], [fixed := RotatingKVCache(max_size=1)])
    fixed.update_and_fetch(mx.zeros((1, 1, 2, 8)), mx.zeros((1, 1, 2, 8)))
    assert caches.fetch_nearest_cache("tiny", [7, 8]) == (None, [7, 8])
    none = Caches(0, 1000)
    none.insert_cache("tiny", [1, 2, 3], [held])
    assert len(none) == 0 and none.fetch_nearest_cache("tiny", [1, 2, 3]) == (None, [1, 2, 3])


def test_the_context_is_the_limit(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=rf"has \d+ tokens, the context {CONTEXT}: .*--max-context"):
        served.complete("a " * CONTEXT, 5)
    text = "b" * 180
    count = len(served.tokenizer.encode(text))
    assert 10 < CONTEXT - count < 40
    full = served.complete(text, 400)
    assert full.choices[0].text == served.alone(text, 400) and full.choices[0].finish_reason == "length"
    assert full.usage.completion_tokens == CONTEXT - count + 1


def test_another_model_is_not_loaded(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="'other/model' is not served here.*'tiny'"):
        served.client.completions.create(model="other/model", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        served.client.models.retrieve("other")


BAD_BODIES: list[tuple[Any, str]] = [
    (b"{", "Invalid JSON"),
    (b"\xff{}", "not UTF-8 .*byte 0"),
    (b"[]", "dictionary"),
    ({}, "prompt must be a text"),
    ({"prompt": ""}, "at least one character"),
    ({"prompt": []}, "prompt must be a text.* it is an empty list"),
    ({"prompt": 5}, "prompt must be a text.* it is a number"),
    ({"prompt": {"a": 1}}, "it is an object"),
    ({"prompt": None}, "it is missing"),
    ({"prompt": ["a", ""]}, r"prompt\[1\] is an empty text"),
    ({"prompt": ["a", 5]}, r"prompt\[1\] is a number, prompt\[0\] is a text"),
    ({"prompt": [[1], "a"]}, r"prompt\[1\] is a text, prompt\[0\] is a list"),
    ({"prompt": [[1], []]}, r"prompt\[1\] is an empty list"),
    ({"prompt": [True]}, r"prompt\[0\] is true or false"),
    ({"prompt": [1, "a"]}, "ids only; at 1 is a text"),
    ({"prompt": [1, True]}, "ids only; at 1 is true or false"),
    ({"prompt": [1, 2.5]}, "ids only; at 1 is a fraction"),
    ({"prompt": [1, 512]}, "the prompt has the id 512 at 1; the vocabulary has the ids 0 to 511"),
    ({"prompt": [[1], [5, -1]]}, r"prompt\[1\] has the id -1 at 1"),
    ({"prompt": [10**30]}, "has the id 1000"),
    ({"prompt": [1] * 201}, "the prompt has 201 tokens, the context 200: .*--max-context"),
    ({"prompt": [1] * 10**6}, "the prompt has 1000000 tokens, the context 200"),
    ({"prompt": ["a", "a " * 300]}, r"prompt\[1\] has \d+ tokens, the context 200"),
    ({"prompt": [[1], [1] * 300]}, r"prompt\[1\] has 300 tokens, the context 200"),
    ({"prompt": ["a"] * 3000}, "prompt has 3000 prompts; at most 2048"),
    ({"prompt": "\ud800"}, "not valid Unicode at character 0"),
    ({"prompt": "a", "stop": "a\ud800"}, "not valid Unicode at character 1"),
    (b"[" * 100000, "Invalid JSON"),
    (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "ids only; at 0 is a list|Invalid JSON|too deeply"),
    (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "Invalid JSON"),
    ({"prompt": "a", "logprobs": True}, "logprobs is True; for completions it must be a number"),
    ({"prompt": "a", "logprobs": -1}, "logprobs is -1"),
    ({"prompt": "a", "logprobs": 21}, "logprobs is 21; .* 0 to 20"),
    ({"prompt": "a", "logprobs": "5"}, "logprobs is 5; .*number"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens must be a number"),
    ({"prompt": "a", "best_of": 2}, "best_of must be 1"),
    ({"prompt": "a", "echo": True}, "echo is not supported"),
    ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
    ({"prompt": "a", "response_format": "json"}, "response_format must be an object"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1"),
    ({"prompt": "a", "max_tokens": "4"}, "max_tokens must be of type int"),
    ({"prompt": "a", "temperature": float("nan")}, "range"),
    ({"prompt": "a", "temperature": 10**400}, "range"),
    ({"prompt": "a", "stop": 5}, "stop must be"),
    ({"prompt": "a", "stop": [""]}, "stop must be"),
    ({"prompt": "a", "n": 2}, "n must be 1"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "logit_bias": {"512": 1}}, "'512'.*0 to 511"),
    ({"prompt": "a", "logit_bias": {"5": [1]}}, "another type"),
    ({"prompt": "a", "xtc_threshold": 0.9}, "xtc_threshold"),
    ({"prompt": "a", "stream": True, "stream_options": 5}, "stream_options must be an object"),
    ({"prompt": "a", "adapters": "/etc"}, "adapters is not known here"),
    ({"prompt": "a", "draft_model": "x/y"}, "draft_model is not known here"),
]
BAD_CHATS: list[tuple[Any, str]] = [
    ({}, "messages must be a list"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": ["hello"]}, "messages must be a list"),
    ({"messages": [{"content": "hello"}]}, "role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content must be a text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "only text",
    ),
    ({"messages": [{"role": "user", "content": "a"}], "logprobs": 5}, "logprobs is 5; for chats it must be true"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 5}, "top_logprobs needs logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21}, "0 to 20"),
    ({"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": True}, "top_logprobs is True"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": "a"}, "tools must be a list"),
    ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 1}, "chat_template_kwargs must be"),
    (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tokenize": 1}},
        "refuses these messages",
    ),
    ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"loops": 1}}, "not done after 0.5 s"),
]


def test_a_bad_body_is_refused_and_stops_nothing(served: Served) -> None:
    bad = [("/v1/completions", *each) for each in BAD_BODIES] + [("/v1/chat/completions", *each) for each in BAD_CHATS]
    for path, body, words in bad:
        status, answer = served.raw(body if isinstance(body, bytes) else json.dumps(body).encode(), path)
        assert status == 400 and re.search(words, answer["error"]["message"]), (body, status, answer)
    assert served.raw(b"", Content_Length="-1")[0] == 400
    assert served.raw(b"", Content_Length="x")[0] == 400
    assert served.raw(b"", Content_Length=str(1 << 40))[0] == 413
    assert served.raw(None, "/health") == (200, {"status": "ok"})
    top_k = served.complete(PROMPT, 6, extra_body={"top_k": 10**6})  # all of them
    assert top_k.choices[0].text == served.alone(PROMPT, 6)


def test_a_client_that_hangs_up_stops_its_reply_only(served: Served) -> None:
    wanted, stats = served.alone(PROMPT, 60), served.server.provider.model.flash.stats
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(served.complete, PROMPT, 60)
        for _ in range(3):
            stream = served.complete("x", 180, stream=True)
            next(iter(stream))
            stream.close()
        assert other.result().choices[0].text == wanted
    stats.reset()
    assert served.complete(PROMPT, 60).choices[0].text == wanted
    alone = stats.hits + stats.misses
    assert served.complete("y" * 9, 60).choices[0].text == served.alone("y" * 9, 60)
    assert stats.hits + stats.misses - alone <= 1.2 * alone


def test_a_failed_read_ends_its_replies_and_the_next_are_right(served: Served) -> None:
    reader = served.server.provider.model.flash.shared.reader
    submit, calls = reader.submit, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 30:
            raise ReadError("cannot read layer-001.safetensors: Input/output error")
        return submit(*arguments)

    reader.submit = failing
    try:
        with pytest.raises(openai.APIError, match="Input/output error|500|Connection|incomplete"):
            served.complete("z" * 60, 60)
    finally:
        reader.submit = submit
    assert len(calls) >= 30
    assert served.complete(PROMPT, 12).choices[0].text == served.alone(PROMPT, 12)


def test_a_lossy_selector_serves_one_reply_after_the_other(flash: Path) -> None:
    found = Served(flash, select="prompt:0.5")
    try:
        model, tokenizer = mlx_flash.load(flash, backend="mlx", max_context=CONTEXT, select="prompt:0.5")
        import mlx_lm

        prompts = [PROMPT, "x" * 20, PROMPT]
        wanted = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=12) for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            texts = [each.choices[0].text for each in pool.map(lambda p: found.complete(p, 12), prompts)]
        assert texts == wanted and found.server.plan.config.sequences == 1
        model.flash.close()
        # A reply under way, outside of a batch, ends when the server does.
        layer = found.server.provider.model.layers[0].mlp
        layer._ffn = lambda x, ffn=layer._ffn: (time.sleep(0.05), ffn(x))[1]
        stream = found.complete("x", 180, stream=True, seed=1)
        next(iter(stream))
        begin = time.monotonic()
        found.server.stop()
        found.thread.join()
        assert time.monotonic() - begin < 4
    finally:
        found.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = cli.main(["server", *[str(a) for a in arguments], "--json"])
    return status, json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_server_that_cannot_start_says_why(capsys: pytest.CaptureFixture[str], flash: Path, served: Served) -> None:
    port = served.server.url.split(":")[2].split("/")[0]
    for options, words in (
        (("--port", port), f"port {port}.*--port"),
        (("--port", 70000), "--port is 70000"),
        (("--host", "192.0.2.1"), "cannot listen"),
        (("--backend", "numpy"), "mlx backend only"),
        (("--replies", 0), "--replies is 0"),
        (("--kept-prompts", -1), "--kept-prompts is -1"),
        (("--temp", -1), "temp"),
        (("--max-tokens", 0), "--max-tokens is 0"),
        (("--memory", "1kB"), "KV cache"),
    ):
        status, message = run(capsys, "--model", flash, *options)
        assert status == 2 and re.search(words, message), message


def test_every_reply_at_once_has_a_kv_cache_in_the_budget(flash: Path) -> None:
    one, _ = plan_server(str(flash), FlashConfig(max_context=CONTEXT), 1, 0)
    four, replies = plan_server(str(flash), FlashConfig(max_context=CONTEXT), 3, 1)
    assert four.costs.fixed["KV cache"] == 4 * one.costs.fixed["KV cache"] and replies == 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_the_command_serves_until_it_is_interrupted(flash: Path) -> None:
    command = [sys.executable, "-m", "mlx_flash.cli", "server", "--model", str(flash), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"tiny-flash at (http://127.0.0.1:\d+/v1)", line)
        assert found, line
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=60)
        text = client.completions.create(model="tiny-flash", prompt=PROMPT, max_tokens=5).choices[0].text
        assert text
        stream = client.completions.create(model="tiny-flash", prompt=PROMPT, max_tokens=400, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in errors
    finally:
        process.kill()
