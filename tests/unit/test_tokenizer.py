"""The tokenizer, its files, chat templates and streaming. The comparison with mlx-lm is in tests/model."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mlx_flash.errors import ConfigError, FormatError, UsageError
from mlx_flash.sentencepiece_file import parse_sentencepiece
from mlx_flash.tokenizer import Tokenizer, encode_prompt, load_tokenizer

from ..conftest import shared_path

CORPUS = [
    "Once upon a time, there was a little girl named Lily. She liked to play outside in the park.",
    "One day she saw a big red ball, and she wanted it. \u00abCaf\u00e9\u00bb, said the na\u00efve dog;  two  spaces!",
    "He said: \u201cit's 12:30\u201d\n\nThen they went home and were happy."
    " \u4f60\u597d\u4e16\u754c \U0001f600\n\tThe end.",
] * 4
SHARED_MODELS = ("stories260K", "llama2xs", "babyllama361")
CHAT = (
    "{% for message in messages %}\n  {% if message.role == 'system' %}\n"
    "    {{ raise_exception('no system') }}\n"
    "  {% endif %}\n{{ bos_token if loop.first }}<|{{ message.role }}|> {{ message.content | trim }}"
    "{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@lru_cache(maxsize=1)
def byte_level_json() -> str:
    """A byte-level BPE of 400 tokens that puts <|begin|> in front."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.add_special_tokens(["<|tool \u4f60|>"])
    return tokenizer.to_str()


@lru_cache(maxsize=4)
def sentencepiece_model(kind: str = "bpe", like_llama: bool = True) -> bytes:
    """A SentencePiece model of 400 pieces, one user-defined; like Llama's: byte tokens and the same ids."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    import io

    out = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type=kind,
        vocab_size=400,
        byte_fallback=like_llama,
        hard_vocab_limit=False,
        unk_id=0 if like_llama else 2,
        bos_id=1,
        eos_id=2 if like_llama else -1,
        user_defined_symbols=["<|user|>"],
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def write_folder(folder: Path, **files: Any) -> Path:
    """A folder with these files; __ in a name stands for a dot, objects are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def byte_level_folder(folder: Path, **files: Any) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return write_folder(folder, **{"tokenizer__json": byte_level_json(), "tokenizer_config__json": config} | files)


def sentencepiece_folder(folder: Path, kind: str = "bpe", **files: Any) -> Path:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    return write_folder(
        folder, **{"tokenizer__model": sentencepiece_model(kind), "tokenizer_config__json": config} | files
    )


@lru_cache(maxsize=8)
def tokenizer_of(name: str) -> Tokenizer:
    """A shared model's tokenizer, or the "byte level" or "sentencepiece" one trained here."""
    if name in SHARED_MODELS:
        return load_tokenizer(shared_path(f"data/models/{name}"))
    with tempfile.TemporaryDirectory() as folder:
        make = byte_level_folder if name == "byte level" else sentencepiece_folder
        return load_tokenizer(make(Path(folder)))


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_bos_is_put_in_front_once(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    plain = tokenizer.encode("Once upon a time", add_special_tokens=False)
    assert 1 not in plain
    assert encode_prompt(tokenizer, "Once upon a time") == [1, *plain]
    assert encode_prompt(tokenizer, "<s>Once").count(1) == 1
    assert encode_prompt(tokenizer, "") == [1]


def test_special_tokens_in_the_text_are_tokens() -> None:
    tokenizer = tokenizer_of("stories260K")
    ids = tokenizer.encode("The end.</s>", add_special_tokens=False)
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids) == "The end.</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The end."


def test_add_bos_token_counts_only_without_tokenizer_json(tmp_path: Path) -> None:
    for wanted in (True, False):
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": wanted}
        folder = sentencepiece_folder(tmp_path / f"s{wanted}", tokenizer_config__json=config)
        ids = load_tokenizer(folder).encode("Once")
        assert (ids[0] == 1) is wanted
        config = {"bos_token": "<|begin|>", "add_bos_token": wanted}
        byte_level = load_tokenizer(byte_level_folder(tmp_path / f"b{wanted}", tokenizer_config__json=config))
        assert byte_level.encode("Once")[0] == byte_level.bos_token_id
    silent = json.loads(byte_level_json()) | {"post_processor": None}
    config = {"bos_token": "<|begin|>", "add_bos_token": True}
    folder = byte_level_folder(tmp_path / "silent", tokenizer__json=silent, tokenizer_config__json=config)
    assert load_tokenizer(folder).encode("Once")[0] != 0


def test_add_eos_token_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    ids = load_tokenizer(sentencepiece_folder(tmp_path, tokenizer_config__json=config)).encode("Once")
    assert (ids[0], ids[-1]) == (1, 2)


def test_sentencepiece_pieces_and_leading_space(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path))
    assert len(tokenizer) == tokenizer.vocab_size == processor.get_piece_size()
    for text in ("Once upon a time, there was a ball.", "She liked to play outside", "it's 12:30"):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
        assert tokenizer.decode(processor.encode(text)) == text
    assert tokenizer.encode("Once")[1:] != tokenizer.encode("</s>Once", add_special_tokens=False)[1:]


def test_legacy_puts_a_space_after_special_tokens_too(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, tokenizer_config__json=config))
    assert tokenizer.encode("</s>Once") == [2, *tokenizer.encode("Once")]


def test_stop_ids_are_the_configs_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, generation_config__json={"eos_token_id": [7, 8]})
    tokenizer = load_tokenizer(folder, eos_ids=[5])
    assert tokenizer.eos_token_ids == {5, 7, 8, tokenizer.eos_token_id}
    write_folder(tmp_path, generation_config__json={"eos_token_id": 9})
    assert load_tokenizer(folder).eos_token_ids == {9, tokenizer.eos_token_id}


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    token = {
        "content": "<|begin|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    tokens = {"bos_token": token, "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, tokenizer_config__json={}, special_tokens_map__json=tokens))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    assert tokenizer.encode("<|pad|>", add_special_tokens=False) == [len(tokenizer) - 1]
    assert tokenizer.vocab_size < len(tokenizer)


def test_template_is_rendered_as_transformers_would(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, chat_template__jinja=CHAT))
    chat = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes", "tool_calls": None}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|begin|><|user|> Hi<|end|>\n<|assistant|> Yes<|end|>\n<|assistant|>"
    assert tokenizer.apply_chat_template(chat) == tokenizer.encode(text, add_special_tokens=False)
    assert not tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False).endswith("t|>")
    assert encode_prompt(tokenizer, "Hi").count(tokenizer.bos_token_id) == 1
    plain = encode_prompt(tokenizer, "Hi", use_chat_template=False)
    assert plain == tokenizer.encode("Hi") == [0, *tokenizer.encode("Hi", add_special_tokens=False)]


def render(folder: Path, template: str, **kwargs: Any) -> str:
    tokenizer = load_tokenizer(byte_level_folder(folder, chat_template__jinja=template))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


def test_what_templates_may_use(tmp_path: Path) -> None:
    assert render(tmp_path, "{{ {'a': '<\u00e9>'} | tojson }}") == '{"a": "<\u00e9>"}'
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(tmp_path, loop) == "01"
    assert len(render(tmp_path, "{{ strftime_now('%Y') }}")) == 4
    assert render(tmp_path, "{{ tools is none }}{{ documents is none }}{{ colour }}", colour="red") == "TrueTruered"
    assert render(tmp_path, "{{ enable_thinking }}") == "False"
    assert render(tmp_path, "{% generation %}in{% endgeneration %}") == "in"
    assert render(tmp_path, "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}") == "2"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_templates_that_refuse_or_reach_out_are_usage_errors(tmp_path: Path, template: str) -> None:
    with pytest.raises(UsageError, match="refuses"):
        render(tmp_path, template)


def test_named_templates(tmp_path: Path) -> None:
    pair = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = byte_level_folder(tmp_path / "a", tokenizer_config__json={"chat_template": pair})
    tokenizer = load_tokenizer(folder)
    chat = [{"role": "user", "content": "x"}]
    assert (tokenizer.chat_template, tokenizer.apply_chat_template(chat, tokenize=False)) == ("D", "D")
    assert tokenizer.apply_chat_template(chat, tokenize=False, tools=[{}]) == "T"
    write_folder(folder, chat_template__jinja="F\n")
    assert load_tokenizer(folder).chat_template == "F\n"
    only = byte_level_folder(tmp_path / "b", tokenizer_config__json={"chat_template": pair[1:]})
    with pytest.raises(ConfigError, match="tool_use"):
        encode_prompt(load_tokenizer(only), "x")


def test_errors_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="chat_template.jinja"):
        tokenizer_of("byte level").apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(UsageError, match="character 1"):
        tokenizer_of("byte level").encode("a\udcff")
    with pytest.raises(UsageError, match="empty"):
        tokenizer_of("byte level").apply_chat_template([])
    with pytest.raises(ConfigError, match="deepseek"):
        config = {"chat_template_type": "deepseek_v32"}
        load_tokenizer(byte_level_folder(tmp_path / "t", tokenizer_config__json=config))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer__json", "{"),
        ("tokenizer__json", "{}"),
        ("tokenizer__json", byte_level_json()[:-200]),
        ("tokenizer_config__json", "nonsense"),
        ("tokenizer_config__json", []),
        ("tokenizer_config__json", {"added_tokens_decoder": {"x": 1}}),
        ("tokenizer_config__json", {"added_tokens_decoder": [1]}),
        ("special_tokens_map__json", {"bos_token": {"no": "content"}}),
        ("generation_config__json", b"\xff\xfe"),
        ("chat_template__jinja", b"\xff"),
    ],
)
def test_files_that_cannot_be_read_are_format_errors(tmp_path: Path, file: str, content: Any) -> None:
    files = {"tokenizer_config__json": {}, file: content}
    with pytest.raises(FormatError):
        load_tokenizer(byte_level_folder(tmp_path, **files))


def test_a_template_that_is_not_jinja_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="line 1"):
        render(tmp_path, "{% for %}")


def test_ids_and_names_in_a_tokenizer_model() -> None:
    llama = parse_sentencepiece(sentencepiece_model())
    assert (llama.unk_id, llama.unigram, llama.byte_fallback) == (0, False, True)
    assert llama.named == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    other = parse_sentencepiece(sentencepiece_model("unigram", like_llama=False))
    assert (other.unk_id, other.unigram, other.byte_fallback) == (2, True, False)
    assert other.named == {"unk_token": "<unk>", "bos_token": "<s>"}


@pytest.mark.parametrize("cut", [1, 3, 50, -1])
def test_a_truncated_tokenizer_model_is_a_format_error(tmp_path: Path, cut: int) -> None:
    with pytest.raises(FormatError, match="tokenizer.model"):
        load_tokenizer(sentencepiece_folder(tmp_path, tokenizer__model=sentencepiece_model()[:cut]))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_parse_or_raise_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        assert not parse_sentencepiece(data).pieces
        raise ValueError


def test_vocab_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    spec = json.loads(byte_level_json())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    folder = write_folder(
        tmp_path,
        vocab__json=spec["model"]["vocab"],
        merges__txt="#version: 0.2\n" + "\n".join(merges) + "\n",
        tokenizer_config__json={
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "bos_token": "<|end|>",
        },
    )
    ids = load_tokenizer(folder).encode("Once upon")
    assert ids == [1, *tokenizer_of("byte level").encode("Once upon", add_special_tokens=False)]
    shutil.copy(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(FormatError, match="vocab.json"):
        load_tokenizer(folder)
