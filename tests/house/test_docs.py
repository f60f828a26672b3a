"""README says what the code does: families by backend, selectors, commands, flags."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_flash.cli import make_parser
from mlx_flash.config import SELECTORS
from mlx_flash.models.specs.config_key_tables import FIXED
from mlx_flash.models.specs.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_family_table_is_the_codes() -> None:
    section = README[README.index("| family |") : README.index("| selector |")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    for family in FAMILIES.values():
        name = family.title.split(" ")[0]
        row = next((row for row in rows if re.search(rf"\b{name}\b", row[0])), None)
        assert row is not None, f"README's table lacks {family.title}"
        assert [row[1] == "yes", row[2] == "yes"] == ["mlx" in family.backends, "numpy" in family.backends]


def test_every_selector_is_explained() -> None:
    for name in SELECTORS:
        assert re.search(rf"^\| `{name}[`:]", README, re.MULTILINE), name


def test_every_command_and_flag_in_readme_exists() -> None:
    parser = make_parser()
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for line in re.findall(r"^(?:.*/)?mlx_flash ([a-z-]+ .*)$", README, re.MULTILINE):
        name, *words = line.split()
        known = commands[name]._option_string_actions
        assert all(word in known for word in words if word.startswith("--")), line
    for name in commands:
        assert f"mlx_flash {name}" in README, f"README does not show {name}"


def test_the_two_commands_stand_on_lines_of_their_own() -> None:
    assert len(re.findall(r"^python3 -m venv \.venv-story .*generate.*$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^python3 -m venv \.venv-test .*pytest tests$", README, re.MULTILINE)) == 1


def value_rows() -> list[str]:
    """The table of values that are refused, as docs/refused.md has it."""
    rows = ["| model type | key | what it may be |", "|---|---|---|"]
    for kind, keys in sorted(FIXED.items()):
        for key, values in sorted(keys.items()):
            may = " or ".join(f"`{str(value).lower()}`" for value in values) or "not there"
            rows.append(f"| {kind} | `{key}` | {may} |")
    return rows


def test_the_table_of_refused_values_is_the_codes() -> None:
    text = (ROOT / "docs" / "refused.md").read_text()
    assert text[text.index("| model type |") :].splitlines() == value_rows()
    for path in re.findall(r"\]\((docs/[^)]*)\)", README):
        assert (ROOT / path).is_file(), path
