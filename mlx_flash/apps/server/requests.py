"""Checks of a request's body before it runs: fields that mlx-lm's server does not check, or reads wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_flash.errors import UsageError

COMPLETIONS = "/v1/completions"
MOST_PROMPTS = 2048
MOST_LOGPROBS = 20
NUMBERS = (
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "top_logprobs", "xtc_probability"),
)
OBJECTS = ("stream_options", "chat_template_kwargs", "role_mapping", "response_format")
PROMPT = "prompt must be a text of at least one character, a list of texts, a list of token ids or a list of such lists"


def without_nulls(body: Any) -> Any:
    """The body without fields that are null, also in its messages: in OpenAI's schema null means the default. Anything
    but an object is returned as it is."""
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if value is not None}
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [without_nulls(message) for message in messages]
    if body.get("tool_choice") == "none":
        body.pop("tools", None)
    return body


def listed_logprobs(body: dict[str, Any], path: str) -> int:
    """How many of the likeliest tokens a request wants beside each token's own logprob; -1 where it wants no logprobs.
    Raises ValueError."""
    asked, top = body.get("logprobs", False), body.get("top_logprobs", -1)
    if path == COMPLETIONS:
        if asked is False:
            return -1
        if type(asked) is not int or not 0 <= asked <= MOST_LOGPROBS:
            raise ValueError(
                f"logprobs is {str(asked)[:40]}; for completions it must be a number of tokens, 0 to {MOST_LOGPROBS}"
            )
        return asked
    if not isinstance(asked, bool):
        raise ValueError(f"logprobs is {str(asked)[:40]}; for chats it must be true or false")
    if type(top) is not int or not -1 <= top <= MOST_LOGPROBS:
        raise ValueError(f"top_logprobs is {str(top)[:40]}; it must be a number of tokens, 0 to {MOST_LOGPROBS}")
    if top > 0 and not asked:
        raise ValueError("top_logprobs needs logprobs to be true")
    return max(top, 0) if asked else -1


def check_body(body: dict[str, Any], path: str, vocab: int, context: int) -> None:
    """Raise ValueError for values that mlx-lm does not check, and that would stop its generating thread or be read
    wrongly."""
    if path == COMPLETIONS:
        check_prompts(body.get("prompt"), vocab, context)
    else:
        check_messages(body.get("messages"))
    check_values(body)
    for name in NUMBERS:
        if isinstance(body.get(name), bool):
            raise ValueError(f"{name} must be a number, not true or false")
    for name in ("adapters", "draft_model"):
        if body.get(name) not in (None, "default_model"):
            raise ValueError(f"{name} is not known here: one model is served as it is")
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise ValueError(f"{name} must be 1: one reply is made for a prompt")
    if body.get("echo") not in (None, False):
        raise ValueError("echo is not supported: a reply does not repeat its prompt")
    if body.get("suffix") not in (None, ""):
        raise ValueError("suffix is not supported: text is only continued")
    stop = body.get("stop") or []
    if not isinstance(stop, (str, list)) or not all(isinstance(word, str) and word for word in stop):
        raise ValueError("stop must be a text or a list of texts")
    for name in OBJECTS:
        if not isinstance(body.get(name), (dict, type(None))):
            raise ValueError(f"{name} must be an object")
    (body.get("stream_options") or {}).setdefault("include_usage", False)
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of objects")
    if (body.get("seed") or 0) < 0:
        raise ValueError("seed must be at least 0")
    if body.get("xtc_threshold", 0.1) > 0.5:
        raise ValueError("xtc_threshold must be at most 0.5")
    for token in body.get("logit_bias") or {}:
        if not str(token).isdecimal() or int(token) >= vocab:
            raise ValueError(f"logit_bias has the token {token!r}; the vocabulary has the ids 0 to {vocab - 1}")


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts of a body's `prompt`, each a text or a list of ids. Raises ValueError for a value that is in none of
    the four forms; ids are only looked at as far as needed."""
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{PROMPT}; it is {_kind(prompt)}")
    if type(prompt[0]) is int:
        return [prompt]
    if len(prompt) > MOST_PROMPTS:
        raise ValueError(f"prompt has {len(prompt)} prompts; at most {MOST_PROMPTS} are taken")
    kind = type(prompt[0])
    for at, each in enumerate(prompt):
        if type(each) is not kind or kind not in (str, list) or not each:
            raise ValueError(f"{PROMPT}; prompt[{at}] is {_kind(each)}, prompt[0] is {_kind(prompt[0])}")
    return prompt


def prompt_name(at: int, count: int) -> str:
    return "the prompt" if count == 1 else f"prompt[{at}]"


def check_prompts(prompt: Any, vocab: int, context: int) -> None:
    """Raise ValueError for prompts of another form, or whose ids cannot run."""
    prompts = prompts_of(prompt)
    for at, ids in enumerate(prompts):
        if isinstance(ids, str):
            continue
        name = prompt_name(at, len(prompts))
        try:
            check_length(len(ids), context, name)
        except UsageError as error:
            raise ValueError(str(error)) from None
        for place, token in enumerate(ids):
            if type(token) is not int:
                raise ValueError(f"{name} must hold token ids only; at {place} is {_kind(token)}")
            if not 0 <= token < vocab:
                raise ValueError(
                    f"{name} has the id {str(token)[:40]} at {place}; the vocabulary has the ids 0 to {vocab - 1}"
                )


def check_length(count: int, context: int, name: str) -> None:
    """Raise UsageError for a prompt of so many tokens that does not fit the context."""
    if not count:
        raise UsageError(f"{name} is empty")
    if count > context:
        raise UsageError(f"{name} has {count} tokens, the context {context}: shorten it, or start the server "
                         "with a larger --max-context")  # fmt: skip


def _kind(value: Any) -> str:
    """A JSON value's kind, for messages."""
    if value is None:
        return "missing"
    if isinstance(value, (str, list)):
        name = "text" if isinstance(value, str) else "list"
        return f"a {name}" if value else f"an empty {name}"
    names = {bool: "true or false", int: "a number", float: "a fraction", dict: "an object"}
    return names[type(value)]


def check_values(value: Any) -> None:
    """Raise ValueError for values that no field takes: NaN, which passes every comparison, numbers beyond 64 bits, and
    text with half a UTF-16 character, which no tokenizer reads."""
    if isinstance(value, dict):
        check_values(list(value.keys()))
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            check_values(each)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text is not valid Unicode at character {error.start}") from None
    elif isinstance(value, (int, float)) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {str(value)[:40]} is out of every field's range")


def check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ValueError("messages must be a list of at least one object")
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise ValueError("every message needs a role")
        content = message.get("content")
        parts: Sequence[Any] = content if isinstance(content, list) else []
        if not isinstance(content, (str, list, type(None))):
            raise ValueError("a message's content must be a text, or a list of parts")
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise ValueError("only text is read: every part of a message must be of the type 'text'")
