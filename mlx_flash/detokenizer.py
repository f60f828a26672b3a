"""Text of a reply while its tokens arrive, in bounded work per token.

Owns the state between two tokens: bytes of an unfinished character, the space SentencePiece puts in front.
The segments joined equal `decode` of all ids; see `StreamingDetokenizer` for the one exception.
"""

from __future__ import annotations

import codecs
import json
import re
from functools import lru_cache
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\ufffd"
SPACE = "\u2581"  # SentencePiece writes a space as this character
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Most tokens held back while the text ends in U+FFFD, which may be an unfinished character or one meant so. A cut
# within a character of a long run of those would show wrong text.
HELD_TOKENS = 64


class _Stream(Protocol):
    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class StreamingDetokenizer:
    """`add_token(id)` per token; `last_segment` is the text that became final since it was last read.

    Multi-byte characters appear once complete. If a run of byte tokens (SentencePiece) is not UTF-8, `decode`
    replaces every byte of it; here the characters already shown stay.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._kind = _stream_kind(backend)
        self.reset()

    def reset(self) -> None:
        """Start of a reply."""
        self.tokens: list[int] = []
        self._stream = _make_stream(self._backend, self._kind)
        self._segments: list[str] = []
        self._read = 0

    def add_token(self, token_id: int) -> None:
        """Take one id of the reply; ids outside the vocabulary add nothing."""
        self.tokens.append(int(token_id))
        self._segments.append(self._stream.feed(int(token_id)))

    def finalize(self) -> None:
        """End of the reply: an unfinished character becomes U+FFFD."""
        self._segments.append(self._stream.flush())

    @property
    def text(self) -> str:
        """All text so far; may lack the last characters until finalize()."""
        return "".join(self._segments)

    @property
    def last_segment(self) -> str:
        """Text since this was last read."""
        segment = "".join(self._segments[self._read :])
        self._read = len(self._segments)
        return segment


def _stream_kind(backend: tokenizers.Tokenizer) -> str:
    """Which stream follows this decoder: byte_level, sentencepiece, sentencepiece_strip or window (any)."""
    if backend.decoder is None:
        return "window"
    steps = _steps(json.loads(backend.decoder.__getstate__()))
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return "byte_level"
    start = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if steps == start:
        return "sentencepiece"
    if steps == [*start, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
        return "sentencepiece_strip"
    return "window"


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _make_stream(backend: tokenizers.Tokenizer, kind: str) -> _Stream:
    if kind == "byte_level":
        return _ByteLevel(backend)
    if kind == "window":
        return _Window(backend)
    return _SentencePiece(backend, strip=kind == "sentencepiece_strip")


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 is itself, other bytes are U+0100 and up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}


class _ByteLevel:
    """Byte-level BPE: every token is bytes, so an incremental UTF-8 decoder is all it takes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id) or ""
        table = _byte_of_char()
        # A token with a character outside the alphabet was added as text.
        raw = bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        return self._decoder.decode(raw)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _SentencePiece:
    """Pieces with U+2581 for a space, and byte tokens; `strip` drops one leading space."""

    def __init__(self, backend: tokenizers.Tokenizer, strip: bool) -> None:
        self._backend = backend
        self._strip = strip
        self._held = b""

    def feed(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return ""
        byte = BYTE_TOKEN.fullmatch(token)
        if byte is None:
            return self._first(self.flush() + token.replace(SPACE, " "))
        self._held += bytes([int(byte[1], 16)])
        try:
            text = self._held.decode()
        except UnicodeDecodeError:
            return self.flush() if len(self._held) > 3 else ""
        self._held = b""
        return self._first(text)

    def flush(self) -> str:
        text = REPLACEMENT * len(self._held)
        self._held = b""
        self._strip &= not text
        return text

    def _first(self, text: str) -> str:
        if not self._strip or not text:
            return text
        self._strip = False
        return text.removeprefix(" ")


class _Window:
    """Any other decoder: the last segment's tokens decoded with and without the new one; the rest is new."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._context: list[int] = []  # tokens whose text is out already, for what the next one depends on
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        if self._backend.id_to_token(token_id) is None:
            return ""
        self._held.append(token_id)
        segment = self._difference()
        if segment.endswith(REPLACEMENT) and len(self._held) < HELD_TOKENS:
            return ""
        self._context = self._held if segment else self._context + self._held
        self._held = []
        return segment

    def flush(self) -> str:
        segment = self._difference()
        self._held = []
        return segment

    def _difference(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)
