"""What is checked of a request's body before it runs: what mlx-lm's server does not check, or reads wrongly."""

from __future__ import annotations

from typing import Any


def check_body(body: dict[str, Any], path: str, vocab: int) -> None:
    """Raise ValueError for what mlx-lm does not check, and what would stop its generating thread or be read wrongly."""
    if path == "/v1/completions":
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise ValueError("prompt must be a text of at least one character")
    else:
        check_messages(body.get("messages"))
    for name in ("adapters", "draft_model"):
        if body.get(name) not in (None, "default_model"):
            raise ValueError(f"{name} is not known here: one model is served as it is")
    if body.get("n") not in (None, 1):
        raise ValueError("n must be 1: one reply is made for a request")
    stop = body.get("stop") or []
    if not isinstance(stop, (str, list)) or not all(isinstance(word, str) and word for word in stop):
        raise ValueError("stop must be a text or a list of texts")
    for name in ("stream_options", "chat_template_kwargs", "role_mapping"):
        if not isinstance(body.get(name), (dict, type(None))):
            raise ValueError(f"{name} must be an object")
    (body.get("stream_options") or {}).setdefault("include_usage", False)
    if (body.get("seed") or 0) < 0:
        raise ValueError("seed must be at least 0")
    if body.get("xtc_threshold", 0.1) > 0.5:
        raise ValueError("xtc_threshold must be at most 0.5")
    for token in body.get("logit_bias") or {}:
        if not str(token).isdecimal() or int(token) >= vocab:
            raise ValueError(f"logit_bias has the token {token!r}; the vocabulary has the ids 0 to {vocab - 1}")
    check_numbers(body)


def check_numbers(value: Any) -> None:
    """Raise ValueError for what no field takes: NaN, which every comparison lets pass, and what no number of 64 bits
    holds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            check_numbers(each)
    elif isinstance(value, (int, float)) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {str(value)[:40]} is out of every field's range")


def check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ValueError("messages must be a list of at least one object")
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise ValueError("every message needs a role")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, (str, list, type(None))):
            raise ValueError("a message's content must be a text, or a list of parts")
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            raise ValueError("only text is read: every part of a message must be of the type 'text'")
