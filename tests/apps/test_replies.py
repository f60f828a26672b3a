"""Replies of the server: where they end, which part is content, and the texts of tokens. No model, no HTTP."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_flash.apps.server.replies import (
    CompletionLogprobs,
    Likeliest,
    ReplyPiece,
    StopWords,
    StreamedReply,
    TokenTexts,
    joined,
)
from mlx_flash.apps.server.requests import MOST_LOGPROBS, listed_logprobs, without_nulls

generate = pytest.importorskip("mlx_lm.generate", reason="the server is mlx-lm's")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

END = 99


def passed(words: list[str], parts: list[str]) -> tuple[str, bool]:
    stops = StopWords(words)
    text = ""
    for part in parts:
        text += stops.add(part)
        if stops.met:
            return text, True
    return text + stops.rest(), False


@pytest.mark.parametrize(
    ("words", "text", "wanted"),
    [
        ([], "abc", "abc"),
        (["b"], "abc", "a"),
        (["bc"], "abbc", "ab"),
        (["aab"], "aaab", "a"),
        (["bc", "abcd"], "xabcd", "xa"),  # complete first
        (["abc", "c"], "abc", ""),
        (["never"], "a nev", "a nev"),
        (["x"], "", ""),
    ],
)
def test_text_passes_up_to_a_stop_word_however_it_comes(words: list[str], text: str, wanted: str) -> None:
    for size in (1, 2, 3, 9):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        assert passed(words, parts) == (wanted, wanted != text), size


class Words:
    """Token i of a list of texts."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def text(self, token: int) -> str:
        return self.texts[token]


def reply_of(
    texts: list[str], finish: str = "length", stops: list[str] | None = None, initial: str = "normal", end: bool = False
) -> list[ReplyPiece]:
    """The pieces of a reply whose tokens have these texts; a last one of `end` is no text."""
    transitions = {
        "normal": [("<think>", "reasoning"), ("<call>", "tool")],
        "reasoning": [("</think>", "normal"), ("<call>", "tool")],
        "tool": [("</call>", "normal")],
    }
    context = SimpleNamespace(text_sm=generate.TextStateMachine(transitions), initial_state=initial)
    steps = [SimpleNamespace(text=text, token=i, finish_reason=None) for i, text in enumerate(texts)]
    if end:
        steps.append(SimpleNamespace(text="", token=END, finish_reason=None))
    steps[-1].finish_reason = finish
    reply: Any = StreamedReply(context, iter(steps), stops or [], {END}, Words(texts))  # type: ignore[arg-type]
    return list(reply)


def test_content_reasoning_and_calls_are_told_apart() -> None:
    texts = ["Hm", "m</thi", "nk>", "It ", "is<ca", 'll>{"a"', ": 1}</call>", "<call>b", "</call>so"]
    pieces = reply_of(texts, "stop", initial="reasoning", end=True)
    whole = joined(pieces)
    assert (whole.reasoning, whole.content, whole.calls) == ("Hmm", "It isso", ['{"a": 1}', "b"])
    assert whole.finish_reason == "tool_calls" and [step.token for step in whole.steps] == list(range(9))
    assert all(piece.content or piece.reasoning or piece.calls for piece in pieces[:-1])
    cut = joined(reply_of(["<call>", "b"]))
    assert cut.calls == ["b"] and cut.finish_reason == "length"
    direct = joined(reply_of(["<think>a", "<call>b</call>"], "stop", end=True))
    assert (direct.reasoning, direct.calls, direct.finish_reason) == ("a", ["b"], "tool_calls")


@pytest.mark.parametrize("decoded", [True, False], ids=["alone", "batch"])
def test_a_stop_word_known_by_its_tokens_is_cut_out(decoded: bool) -> None:
    """In a batch the last token's text does not come."""
    texts = ["a ", "b", "St", "op"]
    context = SimpleNamespace(text_sm=generate.TextStateMachine({}), initial_state="normal")
    steps = [SimpleNamespace(text=text, token=i, finish_reason=None) for i, text in enumerate(texts)]
    steps[-1].finish_reason = "stop"
    if not decoded:
        steps[-1].text = ""
    reply: Any = StreamedReply(context, iter(steps), ["Stop", "bSto!"], {END}, Words(texts))  # type: ignore[arg-type]
    whole = joined(reply)
    assert whole.content == "a b" and whole.finish_reason == "stop" and reply.made == 4
    assert [step.token for step in whole.steps] == [0, 1]


def test_an_end_keeps_what_only_looked_like_a_stop_word() -> None:
    whole = joined(reply_of(["a", "\n\n"], "stop", ["\n\nUser"], end=True))
    assert whole.content == "a\n\n" and [step.token for step in whole.steps] == [0, 1]
    whole = joined(reply_of(["a", "<thi"], "stop", end=True))
    assert whole.content == "a<thi"


def test_steps_come_with_the_piece_in_which_their_text_begins() -> None:
    pieces = reply_of(["a", "", "b", "S", "t", "x"], stops=["Stop"])
    assert [(piece.content, [step.token for step in piece.steps]) for piece in pieces] == [
        ("a", [0]),
        ("b", [1, 2]),
        ("Stx", [3, 4, 5]),
    ]


def test_a_reply_that_is_stopped_is_no_whole_one() -> None:
    context = SimpleNamespace(text_sm=generate.TextStateMachine({}), initial_state="normal")
    steps = iter([SimpleNamespace(text="a", token=0, finish_reason=None)])
    with pytest.raises(RuntimeError, match="stopped"):
        joined(StreamedReply(context, steps, [], {END}, Words(["a"])))  # type: ignore[arg-type]


def byte_level() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end\u00e9|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a the the then they a cat \u00e9\u00e9"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end\u00e9|>")


def test_bytes_of_tokens_make_up_the_text() -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    for text in ("the then a cat", " a  b\n\tc", "\u00e9 \u20ac \U0001f600!", "\x00\x7f\u00ad"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(texts.raw, ids)) == text.encode()
    everything = [texts.raw(token) for token in range(len(tokenizer))]
    assert len({raw for raw in everything if len(raw) == 1}) == 256
    assert texts.text(tokenizer.eos_token_id) == "<|end\u00e9|>"
    assert texts.name(tokenizer.encode("\u20ac")[0]) == "\\xe2"
    assert texts.name(tokenizer.encode("\u20ac")[0], "bytes:") == "bytes:\\xe2"
    assert texts.raw(len(tokenizer) + 5) == b""


def test_offsets_count_characters_of_the_text_that_came() -> None:
    """Its first space was dropped, and a character came in three tokens."""
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(" the \u20aca", add_special_tokens=False)
    text, steps = "the \u20aca", []
    for token in ids:
        step = SimpleNamespace(token=token, logprob=-1.0, top_tokens=Likeliest([], 0.0), text="")
        steps.append(step)
    steps[0].text = texts.text(ids[0]).lstrip()
    found = CompletionLogprobs(texts, 7).add(steps)
    raws = [texts.raw(token) for token in ids]
    ends = list(accumulate(map(len, raws)))
    whole = (" " + text).encode()
    wanted = [7] + [7 + len(whole[:end].decode(errors="ignore")) - 1 for end in ends[:-1]]
    assert found["text_offset"] == wanted and wanted[-1] == 7 + len(text) - 1


def test_logprobs_of_tokens_with_one_text_and_of_none() -> None:
    texts: Any = SimpleNamespace(name=lambda token, prefix="": ["a", "b", "a"][token], raw=lambda token: b"a")
    step = SimpleNamespace(
        token=1,
        logprob=-float("inf"),
        text="b",
        top_tokens=Likeliest([(2, -0.5), (0, -0.75), (1, -float("inf"))], 0.0),
    )
    found = CompletionLogprobs(texts, 0).add([step])
    assert found["top_logprobs"] == [{"a": -0.5, "b": -9999.0}] and found["token_logprobs"] == [-9999.0]


def test_nulls_are_dropped_from_the_body_and_its_messages() -> None:
    body = {"a": None, "b": 0, "messages": [{"role": "user", "content": None}, 5], "tools": [1], "tool_choice": "none"}
    assert without_nulls(body) == {"b": 0, "messages": [{"role": "user"}, 5], "tool_choice": "none"}
    assert without_nulls([None]) == [None] and body["a"] is None


def test_how_many_logprobs_are_asked_for() -> None:
    chat, completion = "/v1/chat/completions", "/v1/completions"
    for path, body, wanted in (
        (completion, {}, -1),
        (completion, {"logprobs": False}, -1),
        (completion, {"logprobs": 0}, 0),
        (completion, {"logprobs": MOST_LOGPROBS}, MOST_LOGPROBS),
        (chat, {}, -1),
        (chat, {"top_logprobs": 0}, -1),
        (chat, {"logprobs": False}, -1),
        (chat, {"logprobs": True}, 0),
        (chat, {"logprobs": True, "top_logprobs": 3}, 3),
    ):
        assert listed_logprobs(body, path) == wanted
