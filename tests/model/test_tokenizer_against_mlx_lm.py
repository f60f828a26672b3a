"""Ids and texts equal mlx-lm's (and so transformers') for the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from mlx_flash.tokenizer import encode_prompt, load_tokenizer

from ..conftest import shared_path
from ..unit.test_tokenizer import (
    CHAT,
    SHARED_MODELS,
    byte_level_folder,
    byte_level_json,
    sentencepiece_folder,
    sentencepiece_model,
    write_folder,
)

# Its wrapper's attributes are compared too, and older releases have fewer of them.
pytest.importorskip("mlx_lm", minversion="0.32")
from mlx_lm.utils import load_tokenizer as load_with_mlx_lm  # noqa: E402

PROMPTS = [
    "",
    "Once upon a time",
    " leading space",
    "  two leading, one trailing ",
    "<s>Once upon",
    "<s> Once upon",
    "<|begin|>Once upon",
    "The end.</s>Then </s> more<|end|>",
    "a\n\nb\tc\r\n  d",
    "\n",
    " ",
    "na\u00efve caf\u00e9 e\u0301 \u4f60\u597d\u4e16\u754c \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "<|user|>hello <|user|> there <|tool \u4f60|>",
    "<0xE2><unk>\u2581x",
    "\u0000\u00a0\ufffd\u2028",
]
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def llama3(folder: Path) -> Path:
    """Llama 3: byte-level tokenizer.json under the name of the Llama 2 class."""
    config = LLAMA | {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True}
    return byte_level_folder(folder, config__json={"model_type": "llama"}, tokenizer_config__json=config)


def shared_under_class(config: dict[str, Any], model: str = "openelm") -> Any:
    def make(folder: Path) -> Path:
        text = (shared_path("data/models/stories260K") / "tokenizer.json").read_text(encoding="utf-8")
        return write_folder(
            folder, tokenizer__json=text, tokenizer_config__json=config, config__json={"model_type": model}
        )

    return make


def sentencepiece(config: dict[str, Any] | None, kind: str = "bpe", model: str = "openelm") -> Any:
    def make(folder: Path) -> Path:
        sentencepiece_folder(folder, kind, tokenizer_config__json=config or {}, config__json={"model_type": model})
        if config is None:
            (folder / "tokenizer_config.json").unlink()
        return folder

    return make


def other_ids(folder: Path) -> Path:
    """A unigram model without byte tokens, without an end token, <unk> at 2."""
    model = sentencepiece_model("unigram", like_llama=False)
    return write_folder(folder, tokenizer__model=model, tokenizer_config__json={"add_bos_token": True})


def without_post_processor(folder: Path) -> Path:
    spec = json.loads(byte_level_json()) | {"post_processor": None}
    config = {"bos_token": "<|begin|>", "add_bos_token": True, "split_special_tokens": True}
    return byte_level_folder(folder, tokenizer__json=spec, tokenizer_config__json=config)


def with_truncation(folder: Path) -> Path:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0}
    padding |= {"pad_to_multiple_of": None, "pad_token": "<|end|>"}
    spec = json.loads(byte_level_json()) | {"truncation": truncation, "padding": padding}
    return byte_level_folder(folder, tokenizer__json=spec)


def opt(folder: Path) -> Path:
    spec = json.loads(byte_level_json())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    token = AddedToken("<|end|>", normalized=True).__getstate__() | {"__type": "AddedToken"}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": token,
        "eos_token": token,
    }
    return write_folder(
        folder,
        vocab__json=spec["model"]["vocab"],
        merges__txt="#version: 0.2\n" + "\n".join(merges) + "\n",
        tokenizer_config__json=config,
        config__json={"model_type": "opt"},
    )


def with_added_tokens(folder: Path) -> Path:
    """Tokens that only tokenizer_config.json knows, beyond the vocabulary."""
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    added = {"401": {"content": "<|tool|>"} | flags, "402": {"content": "plain"} | flags | {"special": False}}
    extra = {"pad_token": "<|pad|>", "additional_special_tokens": ["<|x|>"], "image_token": "<img>"}
    config = {"bos_token": "<|begin|>", "added_tokens_decoder": added} | extra
    return byte_level_folder(folder, tokenizer_config__json=config)


def with_added_tokens_file(folder: Path) -> Path:
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": True}, "pad_token": "<|tool|>"}
    config = LLAMA | {"add_bos_token": True, "legacy": False}
    files = {"special_tokens_map__json": special, "added_tokens__json": {"<|tool|>": 400, "plain": 401}}
    return sentencepiece_folder(folder, tokenizer_config__json=config, **files)


def chat(in_config: bool) -> Any:
    def make(folder: Path) -> Path:
        if not in_config:
            return byte_level_folder(folder, chat_template__jinja=CHAT)
        config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": CHAT}
        return byte_level_folder(folder, tokenizer_config__json=config)

    return make


def chat_without_bos(folder: Path) -> Path:
    template = "{{ messages[0]['content'] }}|{{ enable_thinking }}|{{ tools }}|{{ add_generation_prompt }}"
    return byte_level_folder(folder, chat_template__jinja=template)


def thinking(folder: Path) -> Path:
    template = "{{ enable_thinking }} {{ messages | tojson(indent=1) }}"
    config = {"chat_template": template, "extra_special_tokens": ["<think>", "</think>"]}
    return byte_level_folder(folder, tokenizer_config__json=config)


def processor_template(folder: Path) -> Path:
    """chat_template.json belongs to image processors: transformers' tokenizers do not read it."""
    return byte_level_folder(folder, chat_template__json={"chat_template": "unread"})


FOLDERS: dict[str, Any] = {
    "byte level": byte_level_folder,
    "byte level, no config": lambda folder: write_folder(folder, tokenizer__json=byte_level_json()),
    "byte level, add_bos_token false": lambda folder: byte_level_folder(
        folder, tokenizer_config__json={"bos_token": "<|begin|>", "add_bos_token": False}
    ),
    "Llama 3": llama3,
    "Llama 2 as LlamaTokenizer": shared_under_class(LLAMA | {"legacy": False}),
    "Llama 2 as LlamaTokenizer, legacy": shared_under_class(LLAMA | {"legacy": True}),
    "Llama 2 as LlamaTokenizer, no prefix": shared_under_class(LLAMA | {"add_prefix_space": False}),
    "Llama 2 as LlamaTokenizerFast in Mixtral": shared_under_class(
        {"tokenizer_class": "LlamaTokenizerFast"}, "mixtral"
    ),
    "Llama 2 in Mistral, no class": shared_under_class({"bos_token": "<s>"}, "mistral"),
    "SentencePiece, LlamaTokenizer, BOS": sentencepiece(LLAMA | {"add_bos_token": True}),
    "SentencePiece, LlamaTokenizer, BOS and EOS": sentencepiece(
        LLAMA | {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}
    ),
    "SentencePiece, LlamaTokenizer, silent": sentencepiece(LLAMA, model="llama"),
    "SentencePiece, LlamaTokenizer, legacy": sentencepiece(LLAMA | {"legacy": True, "add_bos_token": True}),
    "SentencePiece, no config": sentencepiece(None),
    "SentencePiece, no class, BOS": sentencepiece({"add_bos_token": True}),
    "SentencePiece unigram, LlamaTokenizer": sentencepiece(LLAMA | {"add_bos_token": True}, "unigram"),
    "SentencePiece unigram, no config": sentencepiece(None, "unigram"),
    "SentencePiece unigram, other ids": other_ids,
    "no post-processor, special tokens split": without_post_processor,
    "truncation and padding": with_truncation,
    "OPT": opt,
    "added tokens": with_added_tokens,
    "added_tokens.json": with_added_tokens_file,
    "chat_template.jinja": chat(in_config=False),
    "chat template in the config": chat(in_config=True),
    "chat template without BOS": chat_without_bos,
    "thinking": thinking,
    "chat_template.json": processor_template,
}


@pytest.fixture(params=[*SHARED_MODELS, *FOLDERS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in SHARED_MODELS:
        return shared_path(f"data/models/{request.param}")
    return FOLDERS[request.param](tmp_path / "model")


def prompt_ids_of_mlx_lm(tokenizer: Any, prompt: str, use_chat_template: bool) -> list[int]:
    """What mlx_lm.generate's main() encodes; for a plain prompt what stream_generate() does with text."""
    if use_chat_template and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=False, add_generation_prompt=True
        )
        return tokenizer.encode(text, add_special_tokens=False)
    special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
    return tokenizer.encode(prompt, add_special_tokens=special)


def test_everything_equals_mlx_lm(folder: Path) -> None:
    theirs, ours = load_with_mlx_lm(folder), load_tokenizer(folder)
    names = ("bos_token", "bos_token_id", "eos_token", "eos_token_id", "eos_token_ids", "vocab_size")
    for name in (*names, "chat_template", "has_chat_template", "has_thinking"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    for prompt in PROMPTS:
        for special in (True, False):
            expected = theirs.encode(prompt, add_special_tokens=special)
            assert ours.encode(prompt, add_special_tokens=special) == expected, (prompt, special)
            for skip in (True, False):
                text = theirs.decode(expected, skip_special_tokens=skip)
                assert ours.decode(expected, skip_special_tokens=skip) == text, (prompt, skip)
        for chat_template in (True, False):
            expected = prompt_ids_of_mlx_lm(theirs, prompt, chat_template)
            assert encode_prompt(ours, prompt, chat_template) == expected, prompt
            assert encode_prompt(theirs, prompt, chat_template) == expected, prompt
    if ours.has_chat_template:
        chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n", "x": None}]]
        for messages in chats:
            for generation in (True, False):
                expected = theirs.apply_chat_template(messages, add_generation_prompt=generation)
                assert ours.apply_chat_template(messages, add_generation_prompt=generation) == expected


def test_stop_ids_with_those_of_the_config(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    for ids in ([5], [5, 7]):
        assert load_tokenizer(folder, ids).eos_token_ids == load_with_mlx_lm(folder, eos_token_ids=ids).eos_token_ids


def test_streamed_text_equals_mlx_lms(folder: Path) -> None:
    """Except for what mlx-lm's fast detokenizers do otherwise than its decode(), where ours follows decode().

    Its byte-level one drops a space at the start of a reply and misreads NUL; its SentencePiece one drops
    every space there instead of one. So replies here start with a word and hold no NUL.
    """
    theirs, ours = load_with_mlx_lm(folder), load_tokenizer(folder)
    for prompt in PROMPTS:
        ids = ours.encode("The" + prompt.replace("\0", ""), add_special_tokens=False)
        texts = []
        for tokenizer in (theirs, ours):
            detokenizer = tokenizer.detokenizer
            for token_id in ids:
                detokenizer.add_token(token_id)
            detokenizer.finalize()
            texts.append(detokenizer.text)
        assert texts[0] == texts[1] == theirs.decode(ids), prompt
