"""Links within the repository lead somewhere, and files that the pages name are there."""

from __future__ import annotations

import ast
import re

import pytest

import mlx_flash

from .pages import ROOT, Page, all_pages, read_page

PAGES = all_pages()
FOLDERS = ("mlx_flash", "models", "tests", "examples", "scripts", "benchmarks", "docs", ".ci")
PACKAGE = (
    "engine",
    "models",
    "runtime",
    "tools",
    "apps",
)  # whose files docs/how-it-works.md names without `mlx_flash/`
BARE = re.compile(r"[\w-]+\.(py|md|csv|png)")  # a file by its name alone


def dead_links(page: Page) -> list[str]:
    dead = []
    for link in page.links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.path.parent / target).resolve() if target else page.path
        there = path.is_relative_to(ROOT) and (path.exists() or not target)
        if there and anchor:
            there = anchor in (read_page(path) if target else page).anchors
        if not there:
            dead.append(link)
    return dead


def missing_files(page: Page) -> list[str]:
    """Files named in code, and programs that shell lines start, which are not there."""
    started = [word for words in page.commands if words[0] == "python" for word in words if word.endswith(".py")]
    missing = []
    for word in [code.split()[0] for code in page.inline_code if code.strip()] + started:
        if word.split("/")[0] in (*FOLDERS, *PACKAGE) and "/" in word:
            there = any(list(folder.glob(word.rstrip("/"))) for folder in (ROOT, ROOT / "mlx_flash"))
        elif BARE.fullmatch(word):
            near = [page.path.parent / word, ROOT / word]
            there = any(path.exists() for path in near) or any(list((ROOT / folder).rglob(word)) for folder in FOLDERS)
        else:
            continue
        if not there:
            missing.append(word)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    assert dead_links(page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Page) -> None:
    assert missing_files(page) == []


def test_every_page_can_be_reached_from_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            links = (link.partition("#")[0] for link in read_page(path).links if link.partition("#")[0].endswith(".md"))
            todo += [(path.parent / link).resolve() for link in links if not re.match(r"[a-z]+:", link)]
    assert {page.path for page in PAGES} <= reached


def test_python_in_the_pages_is_python_and_names_what_there_is() -> None:
    blocks = [block for page in PAGES for block in page.code("python")]
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mlx_flash":
                assert hasattr(mlx_flash, node.attr), node.attr


def test_what_is_dead_is_found() -> None:
    text = """# One thing: `two`

[a](#one-thing-two) [b](#three) [c](nowhere.md) [d](https://example.org) [e](memory.md#x)
[f](memory.md#the-smallest-budget)
`scripts/nothing.py` `scripts/check` `mlx_flash generate` `nothing.csv` `config.json`
`growth-vm.csv` `tests/*/none.py` `engine/none.py`

    python gone.py --x
"""
    page = Page(ROOT / "docs" / "page.md", text)
    assert dead_links(page) == ["#three", "nowhere.md", "memory.md#x"]
    assert missing_files(page) == ["scripts/nothing.py", "nothing.csv", "tests/*/none.py", "engine/none.py", "gone.py"]
