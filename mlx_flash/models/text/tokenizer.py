"""The tokenizer of a model folder, loaded by transformers, and the ids of a prompt or a chat.

Owns what both backends need: loading offline and without code from the folder, chat templates, errors. On numpy
`Tokenizer` stands for mlx-lm's wrapper; on mlx it is that wrapper itself. Knows nothing of models: ids in, ids out.
transformers is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_flash.errors import ConfigError, FlashError, FormatError, UsageError

from .detokenizer import StreamingDetokenizer
from .time_limit import call_within

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these makes a tokenizer
# Tokens around what a model thinks: templates are told whether there are any (`enable_thinking`), as by mlx-lm 0.32.
THINK_TOKENS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
    ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
)
TEMPLATE_SECONDS = 10.0  # templates take milliseconds; one that takes so long loops


class Tokenizer:
    """transformers' tokenizer with what mlx-lm's TokenizerWrapper adds to it, under the same names.

    tokenizer: of transformers; every other attribute is its own. eos_token_ids: a set that may be added to; generation
    stops at any of them.
    """

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_token_ids = set(eos_ids) | ({own} if own is not None else set())
        vocabulary = tokenizer.get_vocab()
        self.has_thinking = any(all(token in vocabulary for token in tokens) for tokens in THINK_TOKENS)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer."""
        return StreamingDetokenizer(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None or self._template_of_mlx_lm is not None

    @property
    def _template_of_mlx_lm(self) -> str | None:
        name = self._tokenizer.init_kwargs.get("chat_template_type")
        return None if name is None else str(name)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        """As that of transformers, with ids as a list; the template is told whether the model thinks. Raises
        ConfigError for a template that is a part of mlx-lm."""
        if self._template_of_mlx_lm is not None:
            raise ConfigError(
                f"the chat template {self._template_of_mlx_lm!r} ('chat_template_type' in tokenizer_config.json) is a "
                "part of mlx-lm; use --backend mlx, or --ignore-chat-template"
            )
        options = {"enable_thinking": self.has_thinking} | options | {"return_dict": False}
        return self._tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' remarks ("PyTorch was not found", "a model of type ..."), also while it is imported."""
    name = "TRANSFORMERS_VERBOSITY"
    before = os.environ.get(name)
    if "transformers" not in sys.modules:
        os.environ[name] = "error"  # read when it is imported
        try:
            from transformers.utils import logging
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before
        levels = logging.get_log_levels_dict()
        level = levels.get(before or "warning", levels["warning"])
    else:
        from transformers.utils import logging

        level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def reading_tokenizer(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Around loading a folder's tokenizer, by whichever library: gives the keywords that keep `from_pretrained` offline
    and from running code of the folder, and turns what it raises into ConfigError and FormatError."""
    files = [name for name in TOKENIZERS if (folder / name).is_file()]
    if not files:
        raise ConfigError(
            f"{folder} has no tokenizer, none of {', '.join(TOKENIZERS)}; convert again with --tokenizer "
            "(OpenELM uses Llama 2's), or put the files there"
        )
    try:
        with quiet_transformers():
            yield {"trust_remote_code": False, "local_files_only": True}
    except Exception as error:  # ours to name: KeyError, OSError, and tokenizers' own, which is a plain Exception
        text = " ".join(str(error).split())
        if "custom code" in text:
            raise ConfigError(
                f"the tokenizer of {folder} is a program of that folder ('auto_map' in tokenizer_config.json), and "
                "none is run; take a tokenizer that transformers knows, with --tokenizer"
            ) from error
        if "tiktoken" in text and files == ["tokenizer.model"]:  # what transformers tries when SentencePiece fails
            text = "not a SentencePiece model"
        raise FormatError(
            f"cannot read the tokenizer in {folder} ({', '.join(files)}): {type(error).__name__}: {text[:300]}; "
            "download it again, or take another with --tokenizer"
        ) from error


def load_tokenizer(folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a model folder, which stops at its own end token and at `eos_ids`.

    Raises ConfigError where there is none or it is a program, FormatError for a file that cannot be read.
    """
    folder = Path(folder)
    with reading_tokenizer(folder) as keywords:
        from transformers import AutoTokenizer

        return Tokenizer(AutoTokenizer.from_pretrained(str(folder), **keywords), eos_ids)


def encode_plain(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Ids of `text`, after BOS (where the tokenizer adds one and the text does not begin with it) if `special`.

    tokenizer: a `Tokenizer` or mlx-lm's wrapper. Raises UsageError for invalid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
    bos = tokenizer.bos_token
    special = special and (bos is None or not text.startswith(bos))
    return list(tokenizer.encode(text, add_special_tokens=special))


def encode_prompt(tokenizer: Any, prompt: str, use_chat_template: bool = True) -> list[int]:
    """The ids of a prompt, the same as mlx-lm's: the only user message of a chat if there is a chat template, else as
    `encode_plain` gives them."""
    if use_chat_template and tokenizer.has_chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return encode_plain(tokenizer, prompt)


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a chat by the tokenizer's template, up to where the reply begins. Raises what `chat_text` raises."""
    return encode_plain(tokenizer, chat_text(tokenizer, messages), special=False)


def chat_text(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], seconds: float = TEMPLATE_SECONDS, **options: Any
) -> str:
    """A chat, each message a {"role", "content"}, as one prompt by the tokenizer's template.

    seconds: how long the template may take. options: for the template, over add_generation_prompt=True.

    Raises ConfigError where there is no template, and what `apply_template` raises.
    """
    if not tokenizer.has_chat_template:
        raise ConfigError("this tokenizer has no chat template; add chat_template.jinja to its folder")
    if not messages:
        raise UsageError("the chat is empty; give at least one message")
    options = {"add_generation_prompt": True} | options | {"tokenize": False}
    return str(apply_template(lambda: tokenizer.apply_chat_template(list(messages), **options), seconds))


def apply_template(call: Callable[[], Any], seconds: float = TEMPLATE_SECONDS) -> Any:
    """The result of `call()`, which applies a chat template: code that came with the model, run in a sandbox.

    Raises FormatError for a template that is not Jinja, UsageError for messages that it refuses or does not get done
    with in that time.
    """
    from jinja2 import TemplateSyntaxError

    try:
        with quiet_transformers():
            return call_within(seconds, call)
    except TemplateSyntaxError as error:
        raise FormatError(f"the chat template is not valid Jinja at line {error.lineno}: {error.message}") from error
    except TimeoutError as error:
        raise UsageError(
            f"the chat template is not done after {seconds:g} s; --ignore-chat-template leaves it out"
        ) from error
    except FlashError:
        raise
    except Exception as error:  # a template can raise whatever Python raises
        raise UsageError(f"the chat template refuses these messages: {error}") from error
