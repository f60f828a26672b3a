"""A conversation on every backend: each reply follows from the whole conversation, and only the user ends it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash import cli
from mlx_flash.apps.chat import Chat, answer, talk
from mlx_flash.errors import ReadError, UsageError
from mlx_flash.models.prompt_cache import PromptCache
from tests.conftest import shared_path

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def make(tmp_path: Path, template: bool) -> Path:
    source = Path(shutil.copytree(shared_path("data/models/stories260K"), tmp_path / f"source-{template}"))
    source.chmod(0o755)
    if template:
        (source / "chat_template.jinja").write_text(TEMPLATE)
    return mlx_flash.convert(source, tmp_path / f"flash-{template}")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("chat")
    return {template: make(folder, template) for template in (False, True)}


class Loaded:
    def __init__(self, path: Path, backend: str, **fields: Any):
        if backend == "mlx":
            pytest.importorskip("mlx_lm")
        self.model, self.tokenizer = mlx_flash.load(path, backend=backend, **fields)
        self.ran = 0
        layer = self.model.layers[0]
        holder, name = (layer.mlp, "_ffn") if backend == "mlx" else (layer, "ffn")
        ffn = getattr(holder, name)

        def counting(x: Any) -> Any:
            self.ran += x.shape[-2]
            return ffn(x)

        setattr(holder, name, counting)

    def alone(self, prompt: str, tokens: int, encode: bool = True) -> str:
        ids = self.tokenizer.encode(prompt, add_special_tokens=encode)
        return mlx_flash.generate(self.model, self.tokenizer, ids, max_tokens=tokens)


@pytest.fixture(params=["numpy", "mlx"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_model(paths: dict[bool, Path], backend: str) -> Iterator[Any]:
    opened: list[Loaded] = []

    def load(template: bool, **fields: Any) -> Loaded:
        opened.append(Loaded(paths[template], backend, **fields))
        return opened[-1]

    yield load
    for each in opened:
        each.model.flash.close()


def reply(chat: Chat, text: str) -> str:
    return "".join(response.text for response in chat.ask(text))


def test_a_chat_with_a_template(open_model: Any) -> None:
    loaded = open_model(True, slots=0)
    chat = Chat(loaded.model, loaded.tokenizer, system="Be brief.", max_tokens=20)
    prompts, replies, text = [], [], "system: Be brief.\n"
    for said in ("Once upon a time", "there was a dog", "and a cat"):
        prompts.append(f"{text}user: {said}\nassistant:")
        before = loaded.ran
        replies.append(reply(chat, said))
        ran = loaded.ran - before
        text = f"{prompts[-1]} {replies[-1]}\n"
    assert [turn.finish_reason for turn in chat.turns] == ["length"] * 3
    count = len(loaded.tokenizer.encode(prompts[-1], add_special_tokens=False))
    assert 20 < ran < 20 + count // 2  # not the whole conversation again
    held = chat.prompt_cache.ids
    assert held[:count] == loaded.tokenizer.encode(prompts[-1], add_special_tokens=False) and len(held) == count + 19
    assert replies == [loaded.alone(prompt, 20, encode=False) for prompt in prompts] and all(replies)
    # Another reply on the same model came between: the cache that was kept may be void.
    assert reply(chat, "and") == loaded.alone(f"{text}user: and\nassistant:", 20, encode=False)
    chat.reset()
    assert chat.turns == [] and reply(chat, "Once upon a time") == replies[0]


def test_without_a_template_the_text_goes_on(open_model: Any) -> None:
    loaded = open_model(False)
    chat = Chat(loaded.model, loaded.tokenizer, max_tokens=16)
    texts, replies, text = [], [], ""
    for said in ("Once upon a time", " She was sad.", " Then"):
        texts.append(text + said)
        before = loaded.ran
        replies.append(reply(chat, said))
        ran = loaded.ran - before
        text = texts[-1] + replies[-1]
    count = len(loaded.tokenizer.encode(texts[-1]))
    assert ran < 16 + count // 2 and len(chat.prompt_cache.ids) == count + 15
    assert replies == [loaded.alone(text, 16) for text in texts]
    with pytest.raises(UsageError, match="system prompt needs a chat template"):
        Chat(loaded.model, loaded.tokenizer, system="Be brief.")


def test_the_conversation_stays_within_the_context(open_model: Any) -> None:
    loaded = open_model(True, max_context=100)
    chat = Chat(loaded.model, loaded.tokenizer, max_tokens=60)
    said: list[str] = []
    for text in ("Once upon a time there was a girl", "She had a dog", "The dog was big"):
        answer(chat, text, said.append, lambda piece: None)
        count = len(chat.prompt_ids(chat.turns[chat.forgotten :]))
        assert count <= 100
    assert chat.forgotten == 2 and any("the oldest 2 of 3 turns are forgotten" in each for each in said)
    assert chat.turns[-1].reply == loaded.alone("user: The dog was big\nassistant:", 60, encode=False)
    turns = [*chat.turns]
    with pytest.raises(UsageError, match="takes [0-9]+ tokens, the context has 100"):
        reply(chat, "long " * 100)
    assert chat.turns == turns and chat.forgotten == 2
    chat.reset()
    chat.max_tokens = 400
    answer(chat, "Once upon a time", said.append, lambda piece: None)
    assert chat.turns[0].finish_reason == "context" and "which ended this reply" in said[-1]


def test_an_interrupt_ends_the_reply_and_not_the_chat(open_model: Any) -> None:
    loaded = open_model(True, slots=0)
    chat = Chat(loaded.model, loaded.tokenizer, max_tokens=30)
    reply(chat, "hello")
    pieces: list[str] = []

    def stop_after_five(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    said: list[str] = []
    answer(chat, "Once upon a time", said.append, stop_after_five)
    kept = chat.turns[-1]
    assert kept.finish_reason == "interrupted" and kept.reply == "".join(pieces[:5]) and "interrupted" in said[0]

    # In the midst of a step too, on any layer.
    shared = loaded.model.flash.shared
    for at in (2, 40):
        calls, begin = [0], shared.begin

        def interrupted(selector: Any, calls: list[int] = calls, begin: Any = begin, at: int = at) -> None:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            begin(selector)

        shared.begin = interrupted
        answer(chat, "She had", said.append, lambda piece: None)
        shared.begin = begin
    assert len(chat.turns) == 3  # the first of the two had no reply yet
    text = "".join(f"user: {turn.prompt}\nassistant: {turn.reply}\n" for turn in chat.turns) + "user: And\nassistant:"
    assert reply(chat, "And") == loaded.alone(text, 30, encode=False)


def test_a_failed_read_takes_the_turn_back(open_model: Any) -> None:
    loaded = open_model(True, slots=0)
    chat = Chat(loaded.model, loaded.tokenizer, max_tokens=10)
    first = reply(chat, "hello")
    reader = loaded.model.flash.shared.reader
    submit, calls = reader.submit, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 20:
            raise ReadError("the disk is gone")
        return submit(*arguments)

    reader.submit = failing
    with pytest.raises(ReadError):
        reply(chat, "Once upon a time")
    reader.submit = submit
    assert [turn.reply for turn in chat.turns] == [first]
    text = f"user: hello\nassistant: {first}\nuser: Once\nassistant:"
    assert reply(chat, "Once") == loaded.alone(text, 10, encode=False)


def test_a_lossy_selection_is_made_from_the_whole_conversation(open_model: Any) -> None:
    loaded = open_model(False, select="prompt:0.5")
    chat = Chat(loaded.model, loaded.tokenizer, max_tokens=8)
    first = reply(chat, "Once upon a time")
    assert reply(chat, " She") == loaded.alone(f"Once upon a time{first} She", 8)


def test_what_is_kept_is_cut_where_prompts_part() -> None:
    kept = PromptCache(object(), [1, 2, 3, 4])
    assert [kept.prefix_length(ids) for ids in ([1, 2, 9, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4], [1], [9], [1, 2])] == [
        2, 4, 3, 0, 0, 1,
    ]  # fmt: skip


def typed(*found: Any) -> Callable[[str], str]:
    """A function that reads these lines, raises the errors among them, and then the end of the input."""
    waiting = list(found)

    def read(prompt: str) -> str:
        value = waiting.pop(0) if waiting else EOFError()
        if isinstance(value, BaseException):
            raise value
        return str(value)

    return read


def test_commands_and_interrupts_at_the_prompt(open_model: Any) -> None:
    loaded = open_model(False)
    chat = Chat(loaded.model, loaded.tokenizer, max_tokens=3)
    said: list[str] = []
    written: list[str] = []

    def run(*found: Any) -> bool:
        return talk(chat, said.append, written.append, typed(*found))

    assert run("Once", "", "/help", KeyboardInterrupt(), " upon", UsageError("not text"), "/exit", "never") is False
    assert [turn.prompt for turn in chat.turns] == ["Once", " upon"] and "UsageError: not text" in said
    assert "".join(written) == chat.turns[0].reply + "\n" + chat.turns[1].reply + "\n"
    assert run("/reset") is False and chat.turns == []
    assert run(KeyboardInterrupt(), KeyboardInterrupt(), "never") is True
    assert run("x" * 2000, "Once") is False and len(chat.turns) == 1 and "the context has 512" in said[-2]


def test_the_command(paths: dict[bool, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "mlx_flash.cli", "chat", "--model", str(paths[False]), "--backend", "numpy"]
    command += ["--max-tokens", "8"]
    lines = b"Once upon a time\n a\xff\n\n She\n/reset\nOnce upon a time\n/exit\nnever\n"
    done = subprocess.run(command, input=lines, capture_output=True)
    assert done.returncode == 0 and b"UsageError: this line is not UTF-8" in done.stderr, done.stderr
    texts = done.stdout.decode().split("\n")
    done = subprocess.run([*command, "--json"], input=b"Once upon a time\n She", capture_output=True)
    found = json.loads(done.stdout)
    assert [turn["text"] for turn in found["turns"]] == texts[:2] and texts[2:] == [texts[0], ""]
    assert found["turns"][0]["finish_reason"] == "length" and found["forgotten"] == 0
    for options, words in (
        (["--temp", "-1"], "temp"),
        (["--max-tokens", "0"], "max-tokens"),
        (["--system", "x"], "tem"),
    ):
        assert cli.main(["chat", "--model", str(paths[False]), *options]) == 2
        assert words in capsys.readouterr().err
