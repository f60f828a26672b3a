"""A conversation with a loaded model at the terminal, on any backend.

Owns the turns, and which of them still fit the context. With a chat template a message and its reply are turns of user
and assistant; without one each message continues the text.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_flash.errors import FlashError, UsageError
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.text.tokenizer import encode_chat
from mlx_flash.runtime.generation import GenerationResponse, prompt_to_ids, stream_generate

REPLY_SHARE = 4  # a reply has room for a quarter of the context; the oldest turns are forgotten to make it
HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops a reply"
Say = Callable[[str], None]
ReadLine = Callable[[str], str]


@dataclass
class Turn:
    """A message and the reply to it. finish_reason: stop, length, context or interrupted."""

    prompt: str
    reply: str = ""
    finish_reason: str = "interrupted"


@dataclass
class Chat:
    """A conversation with a loaded model.

    forgotten: how many of the oldest turns no longer fit; sampling: the keywords of `stream_generate`
    """

    model: Any
    tokenizer: Any
    system: str | None = None
    template: bool = True
    max_tokens: int = 512
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.template = self.template and self.tokenizer.has_chat_template
        if self.system is not None and not self.template:
            raise UsageError("a system prompt needs a chat template, which this model does not have")
        self.context: int = self.model.flash.plan.context
        self.reset()

    def reset(self) -> None:
        self.turns: list[Turn] = []
        self.forgotten = 0
        self.prompt_cache = PromptCache()

    def ask(self, text: str) -> Iterator[GenerationResponse]:
        """Yield the reply to `text`, step by step. A reply that is abandoned or interrupted stays as far as it came;
        after an error the turn is removed.

        Raises UsageError for a text that is too long on its own, ReadError.
        """
        turn = Turn(text)
        self.turns.append(turn)
        try:
            ids = self._fitting_ids()
            steps = stream_generate(
                self.model,
                self.tokenizer,
                ids,
                max_tokens=self.max_tokens,
                prompt_cache=self.prompt_cache,
                **self.sampling,
            )
            with contextlib.closing(steps):  # type: ignore[type-var]
                for response in steps:
                    turn.reply += response.text
                    turn.finish_reason = response.finish_reason or turn.finish_reason
                    if turn.finish_reason == "length" and len(ids) + response.generation_tokens > self.context:
                        turn.finish_reason = "context"
                    yield response
        except BaseException as error:
            if isinstance(error, FlashError) or not turn.reply:
                self.turns.pop()
            raise

    def _fitting_ids(self) -> list[int]:
        """Ids of the conversation. The oldest turns are forgotten until it fits, with room for a reply."""
        room = self.context - min(self.max_tokens, self.context // REPLY_SHARE)
        before = self.forgotten
        while True:
            ids = self.prompt_ids(self.turns[self.forgotten :])
            last = self.forgotten + 1 >= len(self.turns)
            if len(ids) <= (self.context if last else room):
                return ids
            if last:
                self.forgotten = before
                raise UsageError(f"this takes {len(ids)} tokens, the context has {self.context}: say less at once, or "
                                 "start with a larger --max-context")  # fmt: skip
            self.forgotten += 1

    def prompt_ids(self, turns: list[Turn]) -> list[int]:
        """Ids of these turns, up to where the reply to the last one begins."""
        if not self.template:
            return prompt_to_ids(self.tokenizer, "".join(turn.prompt + turn.reply for turn in turns))
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.reply}]
        return encode_chat(self.tokenizer, messages[:-1])


def read_line(prompt: str) -> str:
    """A line from the terminal, with Python's line editing; the prompt is shown only there. Raises EOFError at the end
    of the input, UsageError for a line that is not UTF-8."""
    if sys.stdin is None:
        raise EOFError
    try:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
            line = input(prompt)
        else:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
        line.encode()
    except UnicodeError:
        raise UsageError("this line is not UTF-8 text") from None
    return line.rstrip("\r\n")


def talk(chat: Chat, say: Say, write: Say, read: ReadLine = read_line) -> bool:
    """Read, answer and print until the user leaves; returns whether the user left by Ctrl-C.

    say: prints notices; write: prints the pieces of replies; read: gives a line, raises as `read_line`
    """
    interrupted = False  # the last thing typed at the prompt was Ctrl-C
    while True:
        try:
            line = read("> ")
            if line in ("/exit", "/quit"):
                return False
            if line == "/reset":
                chat.reset()
                say("(a new conversation)")
            elif line == "/help":
                say(HELP)
            elif line:
                answer(chat, line, say, write)
            interrupted = False
        except EOFError:
            return False
        except KeyboardInterrupt:
            if interrupted:
                return True
            interrupted = True
            say("(Ctrl-C again, Ctrl-D or /exit to leave)")
        except FlashError as error:
            say(f"{type(error).__name__}: {error}")


def answer(chat: Chat, text: str, say: Say, write: Say) -> None:
    """One turn: writes the reply piece by piece, then says why it ended where that is not plain."""
    forgotten, begun = chat.forgotten, False
    try:
        for response in chat.ask(text):
            if not begun and chat.forgotten > forgotten:
                say(f"(the context of {chat.context} tokens is full: the oldest {chat.forgotten} of "
                    f"{len(chat.turns)} turns are forgotten)")  # fmt: skip
            begun = True
            write(response.text)
    except KeyboardInterrupt:
        say("\n(interrupted; what was said stays)")
        return
    finally:
        if begun:
            write("\n")
    reason = chat.turns[-1].finish_reason
    if reason == "context":
        say(f"(the context of {chat.context} tokens is full, which ended this reply; /reset begins anew)")
    elif reason == "length":
        say(f"(--max-tokens {chat.max_tokens} ended this reply)")
