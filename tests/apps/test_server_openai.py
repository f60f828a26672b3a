"""OpenAI's schema as `mlx_flash server` reads and answers it: nulls, every form of prompt, logprobs, ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import ReadError
from tests.apps.test_server import CONTEXT, PROMPT, Served
from tests.conftest import shared_path

mx = pytest.importorskip("mlx.core", reason="the server is mlx-lm's")
pytest.importorskip("mlx_lm", reason="the server is mlx-lm's")
openai = pytest.importorskip("openai", reason="tested with OpenAI's client; pip install openai")

from mlx_flash.apps.server.http_server import likeliest  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompt is taken') }}{% endif %}"
    "{% if m.refusal is defined %}{{ raise_exception('a null reached the template') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}{{ tools }}{% endif %}assistant:"
)
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
SAMPLING = (
    *("temperature", "top_p", "max_tokens", "frequency_penalty", "presence_penalty", "stop", "seed", "logit_bias"),
    *("logprobs", "stream", "stream_options", "n", "user", "model"),
)
CHAT_FIELDS = (
    *("max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format", "parallel_tool_calls"),
    *(
        "functions",
        "function_call",
        "metadata",
        "modalities",
        "prediction",
        "reasoning_effort",
        "service_tier",
        "store",
    ),
)
COMPLETION_FIELDS = ("suffix", "echo", "best_of")
OWN_FIELDS = (
    *("top_k", "min_p", "repetition_penalty", "repetition_context_size", "presence_context_size", "draft_model"),
    *("frequency_context_size", "xtc_probability", "xtc_threshold", "chat_template_kwargs", "role_mapping", "adapters"),
)
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
MESSAGES_TEXT = "user: hello\nassistant:"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    source = Path(shutil.copytree(shared_path("data/models/stories260K"), tmp_path_factory.mktemp("openai") / "tiny"))
    source.chmod(0o755)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    found = Served(mlx_flash.convert(source, source.parent / "tiny-flash"), slots=0)
    yield found
    found.close()


def encoded(served: Served, text: str, special: bool = True) -> list[int]:
    return list(served.tokenizer.encode(text, add_special_tokens=special))


def reply_ids(served: Served, prompt: list[int], count: int) -> list[int]:
    steps = mlx_flash.stream_generate(served.model, served.tokenizer, prompt, max_tokens=count)
    return [step.token for step in steps]


def model_logprobs(served: Served, prompt: list[int], reply: list[int]) -> np.ndarray:
    """(T, vocab) in float64 for the tokens of a reply, from the model's own logits over prompt and reply at once."""
    logits = np.array(served.model(mx.array([prompt + reply]))[0, len(prompt) - 1 : -1], np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    return np.asarray(logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True)))


def ask(served: Served, path: str, **fields: Any) -> tuple[int, Any]:
    return served.raw(json.dumps(fields).encode(), path)


def text_of(answer: Any) -> str:
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_null_is_the_default_of_every_field(served: Served, path: str) -> None:
    served.server.provider.cli_args.max_tokens = 9
    given: dict[str, Any] = {"prompt": PROMPT} if path == COMPLETION else {"messages": MESSAGES}
    _, plain = ask(served, path, **given)
    assert plain["usage"]["completion_tokens"] == 9
    fields = SAMPLING + OWN_FIELDS + (COMPLETION_FIELDS if path == COMPLETION else CHAT_FIELDS)
    for name in fields:
        status, answer = ask(served, path, **given, **{name: None})
        assert status == 200 and text_of(answer) == text_of(plain), (name, answer)
    status, answer = ask(served, path, **given, **dict.fromkeys(fields))
    assert status == 200 and text_of(answer) == text_of(plain)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["logprobs"] is None
    served.server.provider.cli_args.max_tokens = 512
    status, answer = ask(served, path, **given, max_completion_tokens=None, max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


def test_null_through_the_client_streamed(served: Served) -> None:
    client: Any = served.client
    nulls = dict.fromkeys(set(SAMPLING + CHAT_FIELDS) - {"stream", "model", "max_tokens", "stream_options"})
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, **nulls)
    chunks = list(
        client.chat.completions.create(
            **{"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "stream": True, **nulls},
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and chunks[-1].usage.completion_tokens == 9
    # A client sends back what it got, nulls and all.
    said = whole.choices[0].message.model_dump() | {"refusal": None, "content": "hi"}
    assert None in said.values()
    again = client.chat.completions.create(model="tiny", messages=[*MESSAGES, said, MESSAGES[0]], max_tokens=5)
    ids = encoded(served, "user: hello\nassistant: hi\nuser: hello\nassistant:", special=False)
    assert again.choices[0].message.content == served.alone(ids, 5)


def test_tools_are_not_offered_where_none_may_be_chosen(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    count = len(encoded(served, MESSAGES_TEXT, special=False))
    for choice, same in (("none", True), ("auto", False)):
        _, answer = ask(served, CHAT, messages=MESSAGES, tools=tools, tool_choice=choice, max_tokens=1)
        assert (answer["usage"]["prompt_tokens"] == count) is same


def test_every_form_of_prompt(served: Served) -> None:
    texts = [PROMPT, "x", "The quick brown fox"]
    ids = [encoded(served, text) for text in texts]
    wanted = [served.alone(text, 10) for text in texts]
    assert len(set(wanted)) == 3
    for prompt, replies, held in (
        ([PROMPT], wanted[:1], ids[:1]),
        (ids[0], wanted[:1], ids[:1]),
        (texts, wanted, ids),
        (ids, wanted, ids),
        ([PROMPT, PROMPT], [wanted[0]] * 2, [ids[0]] * 2),
    ):
        whole = served.client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0)
        assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(replies))
        assert whole.usage is not None and whole.usage.prompt_tokens == sum(map(len, held))
        assert whole.usage.completion_tokens == 10 * len(replies)
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(
            served.client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=10,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        got, ends = [""] * len(replies), [0] * len(replies)
        for chunk in chunks:
            for choice in chunk.choices:
                got[choice.index] += choice.text
                ends[choice.index] += choice.finish_reason is not None
        assert got == replies and ends == [1] * len(replies)
        assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert {chunk.object for chunk in chunks} == {"text_completion"} and len({chunk.id for chunk in chunks}) == 1


def test_a_body_of_any_depth_is_answered(served: Served) -> None:
    statuses = set()
    for depth in range(900, 1010, 6):
        nested = b"[" * depth + b"]" * depth
        status, answer = served.raw(b'{"prompt": "a", "max_tokens": 1, "x": ' + nested + b"}")
        statuses.add(status)
        assert status == 200 or answer["error"]["message"], depth
    assert 400 in statuses and statuses <= {200, 400}


def test_nothing_runs_where_one_of_the_prompts_cannot(served: Served) -> None:
    stats = served.server.provider.model.flash.stats
    stats.reset()
    for stream in (False, True):
        status, answer = ask(served, COMPLETION, prompt=["a", "b", "c " * CONTEXT], max_tokens=50, stream=stream)
        assert status == 400 and "prompt[2] has" in answer["error"]["message"]
    assert stats.hits + stats.misses == 0
    # A prompt that fills the context leaves its own reply one token, and the next prompt's all of them.
    answer = ask(served, COMPLETION, prompt=[[1] * CONTEXT, [1, 403, 407]], max_tokens=7)[1]
    assert answer["usage"]["completion_tokens"] == 1 + 7


@pytest.mark.parametrize("seed", [None, 1], ids=["batch", "alone"])
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_logprobs_of_completions(served: Served, as_ids: bool, seed: int | None) -> None:
    prompt = encoded(served, PROMPT)
    reply = reply_ids(served, prompt, 12)
    wanted = model_logprobs(served, prompt, reply)
    fields: Any = {"model": "tiny", "prompt": prompt if as_ids else PROMPT, "max_tokens": 12, "seed": seed}
    whole = served.client.completions.create(**fields, logprobs=5)
    found, text = whole.choices[0].logprobs, whole.choices[0].text
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    np.testing.assert_allclose(found.token_logprobs, wanted[range(12), reply], atol=1e-4)
    for row, likely, token in zip(wanted, found.top_logprobs, found.tokens, strict=True):
        values = list(likely.values())
        np.testing.assert_allclose(values, -np.sort(-row)[:5], atol=1e-4)
        assert values == sorted(values, reverse=True) and likely[token] == max(values)
    assert "".join(found.tokens).lstrip() == text.lstrip() and any(token.startswith(" ") for token in found.tokens)
    base = len(served.tokenizer.decode(prompt, skip_special_tokens=True)) if as_ids else len(PROMPT)
    for token, at in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert text[at - base :].startswith(token)
    assert found.text_offset[0] == base

    chunks = list(served.client.completions.create(**fields, logprobs=5, stream=True))
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(chunk.choices[0].logprobs, name) for chunk in chunks if chunk.choices[0].logprobs]
        assert [each for part in parts for each in part] == getattr(found, name) and len(parts) > 4

    none = served.client.completions.create(**fields, logprobs=0).choices[0].logprobs
    assert none is not None and none.tokens == found.tokens and none.top_logprobs is not None
    assert [list(each) for each in none.top_logprobs] == [[token] for token in found.tokens]


@pytest.mark.parametrize("seed", [None, 1], ids=["batch", "alone"])
def test_logprobs_of_chats(served: Served, seed: int | None) -> None:
    prompt = encoded(served, MESSAGES_TEXT, special=False)
    reply = reply_ids(served, prompt, 12)
    wanted = model_logprobs(served, prompt, reply)
    fields: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "logprobs": True, "seed": seed}
    whole = served.client.chat.completions.create(**fields, top_logprobs=20)
    content = whole.choices[0].logprobs.content
    np.testing.assert_allclose([each.logprob for each in content], wanted[range(12), reply], atol=1e-4)
    for row, each in zip(wanted, content, strict=True):
        np.testing.assert_allclose([top.logprob for top in each.top_logprobs], -np.sort(-row)[:20], atol=1e-4)
        assert each.top_logprobs[0].token == each.token and each.top_logprobs[0].bytes == each.bytes
    said = b"".join(bytes(each.bytes) for each in content).decode()
    assert said.lstrip() == whole.choices[0].message.content.lstrip()
    chunks = list(served.client.chat.completions.create(**fields, top_logprobs=20, stream=True))
    listed = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [each for part in listed for each in part] == content
    for options in ({}, {"top_logprobs": None}, {"top_logprobs": 0}):
        alone = served.client.chat.completions.create(**fields, **options).choices[0].logprobs.content
        assert [(each.logprob, each.top_logprobs) for each in alone] == [(each.logprob, []) for each in content]


def test_logprobs_of_bytes_that_are_no_characters(served: Served) -> None:
    first = encoded(served, "\U0001f600", special=False)[-4]
    assert served.tokenizer.convert_ids_to_tokens(first) == "<0xF0>"
    asked: dict[str, Any] = {"max_tokens": 2, "logit_bias": {str(first): 1000}}
    _, answer = ask(served, COMPLETION, prompt=PROMPT, logprobs=2, **asked)
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xf0"] * 2 and found["top_logprobs"][0]["bytes:\\xf0"] == 0
    assert min(found["top_logprobs"][0].values()) < -900
    _, answer = ask(served, CHAT, messages=MESSAGES, logprobs=True, **asked)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [(each["token"], each["bytes"]) for each in content] == [("\\xf0", [0xF0])] * 2


def test_logprobs_of_a_model_in_16_bits_add_up() -> None:
    logits = mx.random.normal((500,), key=mx.random.key(3)) * 6 + 20
    exact = np.array(logits.astype(mx.bfloat16).astype(mx.float32), np.float64)
    exact -= np.log(np.exp(exact).sum())
    rounded = logits.astype(mx.bfloat16)
    rounded = rounded - mx.logsumexp(rounded, keepdims=True)
    assert rounded.dtype == mx.bfloat16 and abs(float(rounded.max().item()) - exact.max()) > 0.004
    found = likeliest(rounded, 7, None)
    assert found
    assert [token for token, _ in found.tokens[:2]] == np.argsort(-exact)[:2].tolist()
    np.testing.assert_allclose([logprob for _, logprob in found.tokens], -np.sort(-exact)[:7], atol=0.02)
    np.testing.assert_allclose(found.tokens[0][1], exact.max(), atol=2e-3)
    assert len(likeliest(rounded, 900, None).tokens) == 500 and likeliest(rounded, 0, None).tokens == []
    assert likeliest(rounded, -1, None) == ()


@pytest.mark.parametrize("seed", [None, 1], ids=["batch", "alone"])
def test_a_stop_word_ends_a_reply_however_it_is_spelt(served: Served, seed: int | None) -> None:
    full = served.alone(PROMPT, 40)
    middle = full[len(full) // 2 :]
    for word in (middle[1:6], middle[:1], middle[3:12]):  # cut through tokens
        cut = full[: full.index(word)]
        fields: Any = {"stop": [word, "never said"], "seed": seed, "logprobs": 0}
        whole = served.complete(PROMPT, 40, **fields)
        assert whole.choices[0].text == cut and whole.choices[0].finish_reason == "stop", word
        assert whole.usage.completion_tokens < 40
        tokens = whole.choices[0].logprobs.tokens
        assert "".join(tokens).strip().startswith(cut.strip())
        assert not "".join(tokens[:-1]).strip().startswith(cut.strip() + word)
        chunks = list(served.complete(PROMPT, 40, stream=True, **fields))
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut
        assert chunks[-1].choices[0].finish_reason == "stop"
        listed = [chunk.choices[0].logprobs.tokens for chunk in chunks if chunk.choices[0].logprobs]
        assert [token for part in listed for token in part] == tokens
    half = served.complete(PROMPT, 10, stop=[served.alone(PROMPT, 11)[-3:] + "never"], seed=seed)
    assert half.choices[0].text == served.alone(PROMPT, 10)  # what may have begun a stop word is text after all


def test_every_end_id_of_the_tokenizer_ends_a_reply(served: Served) -> None:
    prompt = encoded(served, PROMPT)
    reply = reply_ids(served, prompt, 30)
    tokenizer = served.server.provider.tokenizer
    before = set(tokenizer.eos_token_ids)
    # The automaton of stop words is made once; a word of its own for each set of ids.
    try:
        for at, number in ((6, 1), (13, 2)):
            end = reply[at]
            first = reply.index(end)
            tokenizer.eos_token_ids = {*before, 510, end, 511}
            wanted = served.tokenizer.decode(reply[:first])
            for seed in (None, 1):
                for stream in (False, True):
                    asked: Any = {"stop": ["never said" * number], "seed": seed, "logprobs": 0, "stream": stream}
                    made = served.complete(PROMPT, 30, **asked)
                    choices = [each.choices[0] for each in made] if stream else [made.choices[0]]
                    assert "".join(choice.text for choice in choices) == wanted
                    assert choices[-1].finish_reason == "stop"
                    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
                    assert len(tokens) == first
    finally:
        tokenizer.eos_token_ids = before


def test_a_template_that_raises_refuses_its_request_only(served: Served) -> None:
    messages: list[Any] = [{"role": "system", "content": "be kind"}, *MESSAGES]
    for stream in (False, True):
        status, answer = ask(served, CHAT, messages=messages, stream=stream)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"] == "the chat template refuses these messages: no system prompt is taken"
        with pytest.raises(openai.BadRequestError, match="no system prompt is taken"):
            served.client.chat.completions.create(model="tiny", messages=messages, stream=stream)
    _, answer = ask(served, CHAT, messages=MESSAGES, max_tokens=5)
    assert text_of(answer) == served.alone(encoded(served, MESSAGES_TEXT, special=False), 5)


def test_a_failure_in_the_midst_of_a_reply_is_told(served: Served) -> None:
    reader = served.server.provider.model.flash.shared.reader
    submit, calls = reader.submit, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 60:
            raise ReadError("cannot read layer-001.safetensors: Input/output error")
        return submit(*arguments)

    reader.submit = failing
    try:
        with pytest.raises(openai.InternalServerError, match="Input/output error"):
            served.complete("w" * 30, 60)
        calls.clear()
        with pytest.raises(openai.APIError, match="Input/output error"):
            list(served.complete("v" * 30, 60, stream=True))
    finally:
        reader.submit = submit
    assert served.complete(PROMPT, 12).choices[0].text == served.alone(PROMPT, 12)
