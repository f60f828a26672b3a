"""The project's Markdown pages, cut into what tests look at: links, headings, code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Page:
    path: Path
    text: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def prose(self) -> str:
        """The text without its blocks of code."""
        unfenced = FENCE.sub("", self.text)
        return re.sub(r"(?m)^ {4}\S.*\n", "", unfenced)

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", INLINE.sub("code", self.prose))

    @property
    def inline_code(self) -> list[str]:
        return INLINE.findall(self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """Headings as GitHub makes addresses of them."""
        found: set[str] = set()
        for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", self.text), re.MULTILINE):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            slug = base = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            number = 0
            while slug in found:
                number += 1
                slug = f"{base}-{number}"
            found.add(slug)
        return found

    def code(self, language: str) -> list[str]:
        """Blocks fenced in the name of a language."""
        return [body for _, name, body in FENCE.findall(self.text) if name == language]

    @property
    def shell_lines(self) -> list[str]:
        """Lines of shell blocks and of indented ones."""
        indented = re.findall(r"(?m)^ {4}(\S.*)$", FENCE.sub("", self.text))
        return [line for block in self.code("sh") for line in block.splitlines()] + indented

    @property
    def commands(self) -> list[list[str]]:
        """Shell commands, as words."""
        words = [shlex.split(part, comments=True) for line in self.shell_lines for part in line.split(" && ")]
        return [each for each in words if each]


def read_page(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))


def all_pages() -> list[Page]:
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*/README.md")]
    return [read_page(path) for path in sorted(paths)]


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with `header`, without that line and the next."""
    lines = text[text.index(header) :].splitlines()
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]
