"""Ids and texts equal those of transformers' AutoTokenizer for the same folder, streamed and whole, and the ids of a
prompt equal mlx-lm's."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mlx_flash.models.text.tokenizer import encode_prompt, load_tokenizer
from mlx_flash.runtime.model_path import DEFAULT_MODEL, models_folder
from tests.conftest import SHARED, shared_path

from .test_tokenizer import CHAT, SHARED_MODELS, byte_level_folder, byte_level_json, sentencepiece_folder

ODD = [
    "",
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
    "don't , they 're . \u0e01\u0e33\ufffd\ufffd\u0e01\u0e33",
]
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


@lru_cache(maxsize=1)
def texts() -> list[str]:
    """Odd strings, and pieces of every shared text."""
    files = sorted(SHARED.glob("data/text/**/*.txt")) + sorted(SHARED.glob("data/stories/**/*.txt"))
    return ODD + [path.read_text(encoding="utf-8")[2000:3000] for path in files]


def llama3(folder: Path) -> Path:
    """Byte-level tokenizer.json under the name of the Llama 2 class."""
    config = LLAMA | {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True}
    return byte_level_folder(folder, config__json={"model_type": "llama"}, tokenizer_config__json=config)


def vocabulary_and_merges(folder: Path) -> Path:
    spec = json.loads(byte_level_json())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    byte_level_folder(
        folder,
        vocab__json=spec["model"]["vocab"],
        merges__txt="#version: 0.2\n" + "\n".join(merges) + "\n",
        tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end|>", "eos_token": "<|end|>"},
        config__json={"model_type": "opt"},
    )
    (folder / "tokenizer.json").unlink()
    return folder


FOLDERS: dict[str, Any] = {
    "byte level": byte_level_folder,
    "Llama 3": llama3,
    "vocab.json and merges.txt": vocabulary_and_merges,
    "tokenizer.model": lambda folder: sentencepiece_folder(
        folder, tokenizer_config__json=LLAMA | {"add_bos_token": True}, config__json={"model_type": "llama"}
    ),
    "tokenizer.model alone": lambda folder: sentencepiece_folder(folder, tokenizer_config__json={}),
    "tokenizer.model, unigram, unknown family": lambda folder: sentencepiece_folder(
        folder, "unigram", tokenizer_config__json={}, config__json={"model_type": "openelm"}
    ),
    "chat template": lambda folder: byte_level_folder(folder, chat_template__jinja=CHAT),
    "thinking": lambda folder: byte_level_folder(
        folder,
        tokenizer_config__json={
            "chat_template": "{{ enable_thinking }} {{ messages | tojson(indent=1) }}{{ add_generation_prompt }}",
            "extra_special_tokens": ["<think>", "</think>"],
        },
    ),
}


@pytest.fixture(params=[*SHARED_MODELS, DEFAULT_MODEL, *FOLDERS])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in SHARED_MODELS:
        return shared_path(f"data/models/{request.param}")
    if request.param == DEFAULT_MODEL:
        return models_folder() / DEFAULT_MODEL
    return FOLDERS[request.param](tmp_path / "model")


def test_ids_and_texts_equal_transformers(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for name in ("bos_token", "bos_token_id", "eos_token", "eos_token_id", "vocab_size", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    for text in texts():
        expected = theirs.encode(text)
        assert ours.encode(text) == expected
        whole = theirs.decode(expected)
        assert ours.decode(expected) == whole
        detokenizer = ours.detokenizer
        for token in expected:
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert detokenizer.text == whole, text


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="compares with mlx-lm, which is not installed")
def test_prompts_equal_mlx_lms(folder: Path) -> None:
    from mlx_lm.utils import load_tokenizer as load_with_mlx_lm

    theirs, ours = load_with_mlx_lm(folder), load_tokenizer(folder)
    for name in ("has_chat_template", "has_thinking", "eos_token_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in texts()[: len(ODD) + 3]:
        for chat in (True, False):
            if chat and theirs.has_chat_template:  # as its command does
                messages = [{"role": "user", "content": text}]
                prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                expected = theirs.encode(prompt, add_special_tokens=False)
            else:
                special = theirs.bos_token is None or not text.startswith(theirs.bos_token)
                expected = theirs.encode(text, add_special_tokens=special)
            assert encode_prompt(ours, text, chat) == encode_prompt(theirs, text, chat) == expected, text
