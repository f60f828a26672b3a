"""One reply of the server: takes the steps of mlx-lm's generating thread, gives pieces of text and their logprobs.

Owns where a reply's text ends, which part of it is content, reasoning or a tool call, and the shape of logprobs in
OpenAI's API. Knows neither HTTP nor MLX.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_LOGPROB = -9999.0  # as OpenAI has it: JSON has no infinity
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class TokenTexts:
    """The bytes of single tokens as they stand within a text: a tokenizer drops the space at a text's beginning, and a
    token may end within a character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        probe = list(tokenizer.encode("a a", add_special_tokens=False))
        self._anchor = probe[-1:]  # decoded before each token, which then does not begin the text
        self._before = tokenizer.decode(self._anchor) if probe else ""
        self._byte_level = any("\u0120" in (piece or "") for piece in tokenizer.convert_ids_to_tokens(probe))
        self._characters = byte_characters()
        self._added = set(tokenizer.get_added_vocab().values())
        self._known: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """A token's bytes; none for an id that the tokenizer does not know."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def text(self, token: int) -> str:
        return self.raw(token).decode(errors="replace")

    def name(self, token: int, prefix: str = "") -> str:
        """A token's text, or its bytes as OpenAI spells them where they are no text: prefix and \\xe2\\x82."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in raw)

    def _find(self, token: int) -> bytes:
        if token >= len(self._tokenizer):  # a padded vocabulary
            return b""
        piece = self._tokenizer.convert_ids_to_tokens([token])[0] or ""
        if self._byte_level:
            spelt = token not in self._added and all(character in self._characters for character in piece)
            return bytes(self._characters[character] for character in piece) if spelt else piece.encode()
        if found := BYTE_TOKEN.fullmatch(piece):
            return bytes([int(found[1], 16)])
        text = self._tokenizer.decode([*self._anchor, token])
        if not text.startswith(self._before):
            return str(self._tokenizer.decode([token])).encode()
        return str(text[len(self._before) :]).encode()


class StopWords:
    """Passes text on up to the first stop word, and holds back text that may be the beginning of one.

    met: whether a stop word came; of two that overlap the one that is complete first counts
    """

    def __init__(self, words: Sequence[str]):
        self._words, self._held, self.met = words, "", False

    def add(self, text: str) -> str:
        """The text that passes now."""
        text = self._held + text
        found = [(at + len(word), at) for word in self._words if (at := text.find(word)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self._words), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in self._words)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """The text that is still held back, at the end of a reply."""
        held, self._held = self._held, ""
        return held


@dataclass
class ReplyPiece:
    """A part of a reply. calls: complete tool calls, as the model wrote them; steps: those of the tokens whose text has
    begun, for logprobs."""

    content: str = ""
    reasoning: str = ""
    calls: list[str] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    finish_reason: str | None = None


def joined(pieces: Iterable[ReplyPiece]) -> ReplyPiece:
    whole = ReplyPiece()
    for piece in pieces:
        whole.content += piece.content
        whole.reasoning += piece.reasoning
        whole.calls += piece.calls
        whole.steps += piece.steps
        whole.finish_reason = piece.finish_reason
    return whole


class StreamedReply:
    """The pieces of a reply, each as soon as there is text to show; the last one has the finish reason.

    context, steps: from mlx-lm's generator; end_ids: tokens that end a reply and are not part of its text
    made: tokens so far. Raises RuntimeError when the steps end before the reply does.
    """

    def __init__(
        self, context: Any, steps: Iterator[Any], stop_words: Sequence[str], end_ids: Collection[int], texts: TokenTexts
    ):
        self.context, self.made = context, 0
        self._steps, self._stops, self._end_ids, self._texts = steps, StopWords(stop_words), end_ids, texts
        self._machine = context.text_sm
        self._state, self._kind = self._machine.make_state(context.initial_state), context.initial_state
        self._call, self._called = "", False
        self._waiting: list[tuple[int, Any]] = []  # where the text of each began, for steps not given out yet
        self._seen = self._passed = 0  # characters: of all steps, and of those past the stop words

    def __iter__(self) -> Iterator[ReplyPiece]:
        for step in self._steps:
            piece = self._add(step)
            if piece.finish_reason or piece.content or piece.reasoning or piece.calls:
                yield piece
            if piece.finish_reason:
                return
        raise RuntimeError("the reply was stopped before its end")

    def _add(self, step: Any) -> ReplyPiece:
        self.made += 1
        finish = step.finish_reason
        ended = finish == "stop" and step.token in self._end_ids
        if not ended:
            self._waiting.append((self._seen, step))
            self._seen += len(step.text)
        text = self._stops.add(step.text)
        if finish == "stop" and not ended and not self._stops.met:
            # A stop word by its tokens, the last of which a batch does not decode.
            last = self._stops.add(self._texts.text(step.token))
            text += last if self._stops.met else ""
        whole = not self._stops.met and (ended or finish == "length")
        if self._stops.met:
            finish = "stop"  # also where other tokens than the stop word's own spelt it
        elif whole:
            text += self._stops.rest()
        self._passed += len(text)
        piece = self._split(text, finish)
        if finish or piece.content or piece.reasoning or piece.calls:
            ready = [whole or start < self._passed for start, _ in self._waiting]
            piece.steps = [step for (_, step), now in zip(self._waiting, ready, strict=True) if now]
            self._waiting = [each for each, now in zip(self._waiting, ready, strict=True) if not now]
        return piece

    def _split(self, text: str, finish: str | None) -> ReplyPiece:
        self._state, segments = self._machine.split(self._state, text)
        if finish:
            self._state, rest, kind = self._machine.flush(self._state)
            segments.append((kind, rest))
        piece = ReplyPiece()
        for kind, part in segments:
            if self._kind == "tool" and kind != "tool":
                piece.calls.append(self._call)
                self._call = ""
            if kind == "tool":
                self._call += part
            elif kind == "reasoning":
                piece.reasoning += part
            elif kind == "normal":
                piece.content += part
            self._kind = kind
        if finish and self._kind == "tool" and self._call:
            piece.calls.append(self._call)
        self._called = self._called or bool(piece.calls)
        piece.finish_reason = "tool_calls" if finish == "stop" and self._called else finish
        return piece


@dataclass
class Likeliest:
    """The likeliest tokens of a step (id, logprob), most likely first, at least as many as the request asks for; and
    the correction of the step's own logprob, which is rounded to the model's dtype."""

    tokens: list[tuple[int, float]]
    excess: float


def own_logprob(step: Any) -> float:
    return max(step.logprob - step.top_tokens.excess, LEAST_LOGPROB)


class ChatLogprobs:
    """`logprobs` of a choice of a chat."""

    def __init__(self, texts: TokenTexts):
        self._texts = texts

    def add(self, steps: Sequence[Any]) -> dict[str, Any]:
        content = []
        for step in steps:
            likeliest = [self._entry(token, logprob) for token, logprob in step.top_tokens.tokens]
            content.append(self._entry(step.token, own_logprob(step)) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._texts.name(token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(self._texts.raw(token)),
        }


class CompletionLogprobs:
    """`logprobs` of a choice of a completion, piece by piece.

    offset: characters of the prompt; OpenAI counts `text_offset` from its beginning
    """

    def __init__(self, texts: TokenTexts, offset: int):
        self._texts, self._offset, self._begun = texts, offset, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, steps: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        for step in steps:
            name = self._texts.name(step.token, "bytes:")
            # The token itself may be none of the likeliest; of others with one text the likelier counts.
            likeliest = {name: own_logprob(step)}
            for token, logprob in step.top_tokens.tokens:
                if (other := self._texts.name(token, "bytes:")) not in likeliest or token == step.token:
                    likeliest[other] = max(logprob, LEAST_LOGPROB)
            found["tokens"].append(name)
            found["token_logprobs"].append(own_logprob(step))
            found["top_logprobs"].append(dict(sorted(likeliest.items(), key=lambda each: -each[1])))
            found["text_offset"].append(self._offset)
            self._move(step)
        return found

    def _move(self, step: Any) -> None:
        text = self._decoder.decode(self._texts.raw(step.token))
        dropped = not self._begun and text.startswith(" ") and not step.text.startswith(" ")
        self._begun = True
        self._offset += len(text) - dropped  # detokenizers drop the space that begins a reply
