"""Text to ids and back for a Hugging Face tokenizer folder, without transformers.

Owns encoding, decoding, chat templates and which ids a prompt becomes. The vocabulary files are read in
tokenizer_files.py, streaming is in detokenizer.py. Knows nothing of models: ids in, ids out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .detokenizer import StreamingDetokenizer
from .errors import ConfigError, FormatError, UsageError
from .tokenizer_files import load_backend, read_json

THINK_TOKENS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
    ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
)


class Tokenizer:
    """The part of mlx-lm's TokenizerWrapper that scripts use, under the same names.

    eos_token_ids is a set that may be added to; generation stops at any of them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: str | Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = chat_templates
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self.bos_token_id = self._token_id(self.bos_token)
        self.eos_token_id = self._token_id(self.eos_token)
        self.eos_token_ids = set(eos_ids) | ({self.eos_token_id} if self.eos_token_id is not None else set())

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Tokens of the base vocabulary, without added ones; len() counts those too."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens spelt out in it count. Raises UsageError for invalid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`; ids outside the vocabulary (a padded one) decode to nothing."""
        listed = [ids] if isinstance(ids, int) else [int(i) for i in ids]
        return self._backend.decode(listed, skip_special_tokens=skip_special_tokens)

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer."""
        return StreamingDetokenizer(self._backend)

    @property
    def chat_template(self) -> str | None:
        """The template used for plain chats, as Jinja source."""
        if self._chat_templates is None or isinstance(self._chat_templates, str):
            return self._chat_templates
        return self._chat_templates.get("default")

    @property
    def has_chat_template(self) -> bool:
        return self._chat_templates is not None

    @property
    def has_thinking(self) -> bool:
        """Whether the vocabulary has tokens that wrap reasoning; templates are told so, as mlx-lm does."""
        return any(all(self._backend.token_to_id(t) is not None for t in pair) for pair in THINK_TOKENS)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> list[int] | str:
        """Messages ({"role", "content"}) as one prompt: ids, or its text with tokenize=False.

        `tools`, `documents` and any further keyword reach the template. Raises ConfigError without one,
        UsageError for messages it refuses, FormatError if it is not Jinja.
        """
        if kwargs.pop("continue_final_message", False):
            raise UsageError("continue_final_message is not supported; append the text to the rendered prompt")
        if not messages:
            raise UsageError("the chat is empty; give at least one message")
        template = compile_template(self._template(with_tools=kwargs.get("tools") is not None))
        values = {"tools": None, "documents": None, "enable_thinking": self.has_thinking}
        values |= self._special_tokens | kwargs
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            text = template.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(self, with_tools: bool) -> str:
        templates = self._chat_templates
        if templates is None:
            raise ConfigError("this tokenizer has no chat template; add chat_template.jinja to its folder")
        if isinstance(templates, str):
            return templates
        if with_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" not in templates:
            raise ConfigError(f"none of the chat templates is the default: {', '.join(sorted(templates))}")
        return templates["default"]

    def _token_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def load_tokenizer(folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a model folder; `eos_ids` are those of its config.json.

    Reads tokenizer.json, else tokenizer.model, else vocab.json with merges.txt. eos_token_ids is the union of
    `eos_ids`, the tokenizer's own and generation_config.json's. Raises ConfigError where there is none,
    FormatError for a file that cannot be read.
    """
    folder = Path(folder)
    settings = read_json(folder / "tokenizer_config.json")
    backend, special_tokens = load_backend(folder, settings)
    more = read_json(folder / "generation_config.json").get("eos_token_id")
    stops = [*eos_ids, *(more if isinstance(more, list) else [] if more is None else [more])]
    if not all(type(i) is int for i in stops):
        raise FormatError(
            f"generation_config.json: 'eos_token_id' is {str(more)[:80]}; it must be an id or a list of ids"
        )
    return Tokenizer(backend, special_tokens, _chat_templates(folder, settings), stops)


def encode_prompt(tokenizer: Any, prompt: str, use_chat_template: bool = True) -> list[int]:
    """Ids the model is fed for `prompt`, the same as mlx-lm's. `tokenizer`: a Tokenizer or mlx-lm's wrapper.

    As the only user message of the chat template where there is one. Otherwise as it is, after BOS where the
    tokenizer adds one and the prompt does not begin with it already.
    """
    if use_chat_template and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    bos = tokenizer.bos_token
    return list(tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos)))


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    if settings.get("chat_template_type"):
        raise ConfigError(
            f"the chat template {settings['chat_template_type']!r} is a part of mlx-lm, not of the folder; "
            "add chat_template.jinja and remove chat_template_type from tokenizer_config.json"
        )
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    found: Any = {name: _read_text(path) for name, path in files.items()} or settings.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    return found["default"] if isinstance(found, dict) and set(found) == {"default"} else found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path.name} is not UTF-8 text (byte {error.start})") from None


class _Namespace(Namespace):
    """Jinja's namespace without underscore names: templates come from strangers, internals stay shut."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)  # Namespace answers self.x with the template's values
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here only what is inside matters."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """A chat template in the sandbox transformers gives it. Raises FormatError if it is not Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"the chat template is not valid Jinja at line {error.lineno}: {error.message}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a model would read literally.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
