"""The text of a reply while its tokens arrive, for any tokenizer of transformers, with bounded work per token.

Keeps the tokens whose text is not final yet. Each step decodes the last piece of text anew, with and without the new
tokens, and shows the difference: `tokenizers.DecodeStream` does the same, and raises "Invalid prefix encountered" on
decoders that strip or join (SentencePiece's), so that it is of no use here.
"""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"
# Most tokens held back while the text ends in U+FFFD, which may be an unfinished character or one meant so. A cut
# within a character of a long run of those would show wrong text.
HELD_TOKENS = 64


class StreamingDetokenizer:
    """`add_token(id)` per token; `last_segment` is the text that became final since it was last read.

    tokenizer: of transformers. Characters of several tokens appear once they are complete. The segments joined equal
    `decode` of all ids, except where byte tokens (SentencePiece) are not UTF-8: `decode` replaces every byte of such a
    run, here the characters that were already shown stay.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Start of a reply."""
        self.tokens: list[int] = []
        self._context: list[int] = []  # tokens whose text was shown last, on which the next one's may depend
        self._held: list[int] = []
        self._segments: list[str] = []
        self._read = 0

    def add_token(self, token_id: int) -> None:
        """Take one id of the reply; ids outside the vocabulary add nothing."""
        self.tokens.append(int(token_id))
        self._held.append(int(token_id))
        segment = self._difference()
        if not segment.endswith(REPLACEMENT) or len(self._held) >= HELD_TOKENS:
            self._show(segment)

    def finalize(self) -> None:
        """End of the reply: an unfinished character becomes U+FFFD."""
        self._show(self._difference())

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

    def _show(self, segment: str) -> None:
        self._segments.append(segment)
        # Tokens without text count too: a space that opens a reply is dropped, and the next one is not.
        self._context = self._held if segment else (self._context + self._held)[-HELD_TOKENS:]
        self._held = []

    def _difference(self) -> str:
        before, whole = self._decode(self._context), self._decode(self._context + self._held)
        # Where the new tokens change the text before them (bytes that are not UTF-8), they are shown by themselves.
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._held)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
