"""Commands that the pages show parse, and their options are those of --help."""

from __future__ import annotations

import re
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO

import pytest

from mlx_flash.apps.options import run_config
from mlx_flash.cli import make_parser
from mlx_flash.errors import UsageError

from .pages import ROOT, Page, all_pages

PAGES = all_pages()


@cache
def help_of(*command: str) -> str:
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        make_parser().parse_args([*command, "--help"])
    return text.getvalue()


@cache
def commands() -> tuple[str, ...]:
    return tuple(re.findall(r"^ {4}([a-z][a-z-]*)(?: |$)", help_of(), re.MULTILINE))


@cache
def flags(command: str) -> frozenset[str]:
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_of(command)))


def ours(page: Page) -> list[list[str]]:
    """The arguments of every `mlx_flash` that a page's shell lines start."""
    return [words[1:] for words in page.commands if words[0].rpartition("/")[2] == "mlx_flash"]


def check(arguments: list[str]) -> None:
    """Raise UsageError for what the command line would refuse before it opens a model."""
    args = make_parser().parse_args(arguments)
    if hasattr(args, "slots"):
        run_config(args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Page) -> None:
    for arguments in ours(page):
        check(arguments)


def test_a_command_that_does_not_parse_is_found() -> None:
    block = "```sh\ncd x && .venv/bin/mlx_flash generate --model M --select predictr --prompt x  # why\n```\n"
    page = Page(ROOT / "README.md", block)
    assert ours(page) == [["generate", "--model", "M", "--select", "predictr", "--prompt", "x"]]
    for arguments in (*ours(page), ["generate"], ["inspect", "--modell", "M"], ["compress"]):
        with pytest.raises(UsageError):
            check(arguments)


def test_every_command_is_shown_with_its_arguments() -> None:
    shown = {arguments[0] for page in PAGES for arguments in ours(page)}
    assert commands() and set(commands()) == shown
    table = next(page for page in PAGES if page.name == "docs/commands.md").text
    for name in commands():
        assert re.search(rf"^\|[^|]*`{name}`", table, re.MULTILINE), name


def unknown(code: str) -> list[str]:
    """What code in a text (`--memory SIZE`, `bench --probe`, `mlx_flash verify`) names and --help does not have.
    Other programs' commands are not looked at."""
    words = code.split() or [""]
    if words[0].startswith("--"):
        known = frozenset().union(*map(flags, commands()))
    elif words[0] == "mlx_flash" and len(words) > 1 and words[1] != "COMMAND":
        if words[1] not in commands():
            return [words[1]]
        known = flags(words[1])
    elif words[0] in commands():
        known = flags(words[0])
    else:
        return []
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_text_exist(page: Page) -> None:
    assert [code for code in page.inline_code if unknown(code)] == []


def test_a_command_that_does_not_exist_is_found() -> None:
    assert unknown("mlx_flash compress") == ["compress"]
    assert unknown("--memory 2GB --swap on") == ["--swap"]
    assert unknown("bench --probe --temp 1") == ["--temp"]
    for code in ("mlx_flash bench --probe", "python3 --version", "mlx_flash COMMAND --help", " "):
        assert unknown(code) == []


def test_options_that_commands_share_are_explained() -> None:
    codes = [code for page in PAGES if page.name.startswith("docs/") for code in page.inline_code]
    explained = {word for code in codes for word in code.split() if word.startswith("--")}
    shared = flags("generate") | flags("server") | flags("convert")
    assert sorted(shared - explained - {"--help"}) == []
