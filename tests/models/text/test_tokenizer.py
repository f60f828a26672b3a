"""The tokenizer of a folder, chat templates, and what goes wrong with them. Streaming is in test_detokenizer.py, the
comparison with AutoTokenizer in test_tokenizer_against_transformers.py."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mlx_flash.errors import ConfigError, FormatError, UsageError
from mlx_flash.models.text.tokenizer import Tokenizer, chat_text, encode_chat, encode_prompt, load_tokenizer
from tests.conftest import shared_path

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
    out = io.BytesIO()
    SentencePieceTrainer.train(
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


def test_sentencepiece_pieces_and_leading_space(tmp_path: Path) -> None:
    processor = SentencePieceProcessor(model_proto=sentencepiece_model())
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path))
    assert len(tokenizer) == tokenizer.vocab_size == processor.get_piece_size()
    for text in ("Once upon a time, there was a ball.", "She liked to play outside", "it's 12:30"):
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
        assert tokenizer.decode(processor.encode(text)) == text
    assert tokenizer.encode("Once")[1:] != tokenizer.encode("</s>Once", add_special_tokens=False)[1:]


def test_stop_ids_are_the_configs_and_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path), eos_ids=[5, 7])
    assert tokenizer.eos_token_ids == {5, 7, tokenizer.eos_token_id}


def test_template_is_rendered_as_transformers_would(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, chat_template__jinja=CHAT))
    chat = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes", "tool_calls": None}]
    text = chat_text(tokenizer, chat)
    assert text == "<|begin|><|user|> Hi<|end|>\n<|assistant|> Yes<|end|>\n<|assistant|>"
    assert encode_chat(tokenizer, chat) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == encode_chat(tokenizer, chat)
    assert not chat_text(tokenizer, chat, add_generation_prompt=False).endswith("t|>")
    assert encode_prompt(tokenizer, "Hi").count(tokenizer.bos_token_id) == 1
    plain = encode_prompt(tokenizer, "Hi", use_chat_template=False)
    assert plain == tokenizer.encode("Hi") == [0, *tokenizer.encode("Hi", add_special_tokens=False)]


def render(folder: Path, template: str, **kwargs: Any) -> str:
    tokenizer = load_tokenizer(byte_level_folder(folder, chat_template__jinja=template))
    return chat_text(tokenizer, [{"role": "user", "content": "x"}], **kwargs)


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


def test_errors_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="chat_template.jinja"):
        chat_text(tokenizer_of("byte level"), [{"role": "user", "content": "x"}])
    with pytest.raises(UsageError, match="character 1"):
        encode_prompt(tokenizer_of("byte level"), "a\udcff")
    with_template = load_tokenizer(byte_level_folder(tmp_path / "c", chat_template__jinja=CHAT))
    with pytest.raises(UsageError, match="empty"):
        chat_text(with_template, [])
    config = {"chat_template_type": "deepseek_v32"}
    folder = byte_level_folder(tmp_path / "t", tokenizer_config__json=config)
    with pytest.raises(ConfigError, match="deepseek.*--backend mlx"):
        encode_prompt(load_tokenizer(folder), "x")


def test_a_tokenizer_that_is_a_program_is_refused(tmp_path: Path) -> None:
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    program = "raise SystemExit('the program ran')"
    folder = byte_level_folder(tmp_path, tokenizer_config__json=config, own__py=program)
    with pytest.raises(ConfigError, match="auto_map.*--tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
    ],
)
def test_a_template_that_loops_is_ended(tmp_path: Path, template: str) -> None:
    before = threading.active_count()
    with pytest.raises(UsageError, match="not done after 0.3 s|refuses"):
        render(tmp_path, template, seconds=0.3)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before, "the loop goes on in its thread"


def test_nothing_but_the_result_is_printed_and_help_loads_no_transformers(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, config__json={"model_type": "openelm"})
    program = (
        "import sys, mlx_flash.cli, mlx_flash.models.text.tokenizer as t\n"
        "from pathlib import Path\n"
        "try: mlx_flash.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "del __import__('os').environ['TRANSFORMERS_VERBOSITY']\n"
        "assert 'transformers' not in sys.modules and 'jinja2' not in sys.modules\n"
        f"t.load_tokenizer(Path({str(folder)!r}))\n"
        "from transformers.utils import logging\n"
        "assert logging.get_verbosity() == 30, 'what the user sees of transformers is as before'\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_no_remarks_of_transformers(tmp_path: Path) -> None:
    """A prompt beyond what the folder calls the longest, and spaces that are not cleaned up."""
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "model_max_length": 3}
    folder = byte_level_folder(tmp_path, tokenizer_config__json=config | {"clean_up_tokenization_spaces": True})
    text = f"import mlx_flash.models.text.tokenizer as t; x = t.load_tokenizer({str(folder)!r}); "
    text += "x.decode(x.encode('Once upon a time'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    said = []
    run = "import mlx_flash.cli; mlx_flash.cli.main(['verify', '--model', '/none']); "
    for command in ("", run):
        program = f"import sys; {command}sys.stderr.flush(); {text}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr.count("longer than") + done.stderr.count("clean_up"))
    assert said[0] > 0 == said[1]


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


@pytest.mark.parametrize("cut", [1, 3, 50, -1])
def test_a_truncated_tokenizer_model_is_a_format_error(tmp_path: Path, cut: int) -> None:
    with pytest.raises(FormatError, match="tokenizer.model"):
        load_tokenizer(sentencepiece_folder(tmp_path, tokenizer__model=sentencepiece_model()[:cut]))


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
