"""Streaming: the segments joined are the decoded text, characters come whole, work per token is bounded."""

from __future__ import annotations

from functools import lru_cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_flash.models.text.detokenizer import HELD_TOKENS, StreamingDetokenizer
from mlx_flash.models.text.tokenizer import Tokenizer
from tests.conftest import shared_path

from .test_tokenizer import SHARED_MODELS, byte_level_json, tokenizer_of

# Letters, spaces, combining marks, CJK, emoji with joiners and modifiers, and anything else.
PIECES = ["a", "The", " ", "  ", "\n", "e\u0301", "\u0e01\u0e33", "\u4f60\u597d", "\U0001f600", "\ufffd"]
PIECES += [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd",
    "\u2581",
    "<s>",
    "</s>",
    "<0xE2>",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
)
ALL = (*SHARED_MODELS, "byte level", "sentencepiece", "metaspace", "no decoder", "other decoder")


@lru_cache(maxsize=8)
def tokenizer_with(name: str) -> Tokenizer:
    """A tokenizer by name; the last three of ALL have decoders that no published model has."""
    if name == "metaspace":
        backend = tokenizers.Tokenizer.from_str(byte_level_json())
        backend.decoder = decoders.Metaspace(replacement="\u0120")
    elif name == "other decoder":
        backend = tokenizers.Tokenizer.from_file(str(shared_path("data/models/stories260K") / "tokenizer.json"))
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Replace("zzzz", "z")])
    elif name == "no decoder":
        backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        return tokenizer_of(name)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The segment after each token, and the last after finalize()."""
    detokenizer = tokenizer.detokenizer
    segments = []
    for token_id in ids:
        detokenizer.add_token(token_id)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    segments.append(detokenizer.last_segment)
    assert "".join(segments) == detokenizer.text
    assert detokenizer.tokens == ids
    return segments


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="\ufffd\ufffd\u0e01\u0e33")  # characters that look unfinished, then one that is
def test_segments_joined_are_the_decoded_text(name: str, text: str) -> None:
    tokenizer = tokenizer_with(name)
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ALL)
def test_ids_outside_the_vocabulary_are_nothing(name: str) -> None:
    tokenizer = tokenizer_with(name)
    good = tokenizer.encode("a b a \U0001f680 b", add_special_tokens=False)
    ids = [token_id for pair in zip(good, [9999] * len(good), strict=True) for token_id in pair]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(good) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 420), max_size=20))
def test_byte_level_segments_equal_decode_for_any_ids(ids: list[int]) -> None:
    tokenizer = tokenizer_of("byte level")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", [*SHARED_MODELS, "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_of_sentencepiece_are_shown(name: str, data: st.DataObject) -> None:
    """What `tokenizers.DecodeStream` raises on. The text equals decode's wherever the bytes are UTF-8."""
    tokenizer = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=30))
    shown, whole = "".join(stream(tokenizer, ids)), tokenizer.decode(ids)
    assert shown.replace("\ufffd", "") == whole or "\ufffd" in whole
    if "\ufffd" not in whole:
        assert shown == whole


@pytest.mark.parametrize("name", ["byte level", "sentencepiece", "stories260K"])
@pytest.mark.parametrize("character", ["\u00df", "\u2603", "\U0001f680"])
def test_a_character_appears_with_its_last_token(name: str, character: str) -> None:
    tokenizer = tokenizer_with(name)
    ids = tokenizer.encode(f"a{character}", add_special_tokens=False)
    *before, last, after_end = stream(tokenizer, ids)
    assert len(ids) > 2
    assert "".join(before).strip() == "a"
    assert last == character
    assert after_end == ""


def test_characters_that_follow_each_other_in_byte_tokens_are_not_held_back() -> None:
    tokenizer = tokenizer_of("stories260K")
    ids = tokenizer.encode("\u2603\u2603", add_special_tokens=False)[-6:]
    assert stream(tokenizer, ids) == ["", "", "\u2603", "", "", "\u2603", ""]


def test_byte_tokens_that_are_no_character_become_replacements() -> None:
    tokenizer = tokenizer_of("stories260K")
    byte = {value: tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in (0xE2, 0x82, 0xAC, 0xC3, 0xA9)}
    lone = [byte[0xE2], byte[0x82], tokenizer.eos_token_id]
    assert "".join(stream(tokenizer, lone)) == tokenizer.decode(lone) == "\ufffd\ufffd</s>"
    # The one exception: decode() takes back the good character in front of the bad byte.
    mixed = [byte[0xC3], byte[0xA9], byte[0xE2]]
    assert tokenizer.decode(mixed) == "\ufffd\ufffd\ufffd"
    assert stream(tokenizer, mixed) == ["", "\u00e9", "", "\ufffd"]
    spaced = [byte[0xE2], *tokenizer.encode("the", add_special_tokens=False)]
    assert "".join(stream(tokenizer, spaced)) == tokenizer.decode(spaced) == "\ufffd the"
    four = [byte[0xE2]] * 4 + spaced[1:]
    assert "".join(stream(tokenizer, four)) == tokenizer.decode(four) == "\ufffd\ufffd\ufffd\ufffd the"
    endless = stream(tokenizer, [byte[0xAC]] * 200)
    assert "".join(endless) == "\ufffd" * 200
    assert "\ufffd" in "".join(endless[:100]), "garbage must not be held back for ever"


def test_reset_starts_a_new_reply_and_each_detokenizer_is_fresh() -> None:
    tokenizer = tokenizer_of("stories260K")
    ids = tokenizer.encode("Once upon", add_special_tokens=False)
    first = tokenizer.detokenizer
    first.add_token(ids[0])
    assert tokenizer.detokenizer.text == ""
    first.reset()
    assert (first.text, first.tokens, first.last_segment) == ("", [], "")
    for token_id in ids:
        first.add_token(token_id)
    first.finalize()
    assert first.text == "Once upon"


def test_work_per_token_does_not_grow_with_the_reply() -> None:
    """Counts calls of decode: a few per token, none with more ids than may be held back."""
    tokenizer = tokenizer_with("metaspace")
    lengths: list[int] = []

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    detokenizer = StreamingDetokenizer(Counting())
    ids = tokenizer.encode("Once upon a time there was a ball. " * 20) + [9999] * 500
    for token_id in ids:
        detokenizer.add_token(token_id)
    assert max(lengths) <= 2 * HELD_TOKENS
    assert len(lengths) <= 3 * len(ids)
